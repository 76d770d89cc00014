"""Files of the laboratory: written whole or not at all, tables as CSV and Markdown, pictures."""

from __future__ import annotations

import csv
import errno
import io
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch

import timm_sugar
from lab.cli import UserError
from timm_sugar.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_checkout() -> None:
    """Raises UserError if the library is not the one of this checkout, whose files would be taken for this one's."""
    library, here = Path(timm_sugar.__file__).resolve().parents[1], Path(__file__).resolve().parents[2]
    if library != here:
        raise UserError(f"timm_sugar comes from {library}, not from {here}: install it with pip install -e {here}")


def environment(device: str) -> dict[str, str]:
    """What a measurement ran on: device and versions, as columns of results/*.csv."""
    versions = {"torch": str(torch.__version__), "timm": timm.__version__, "timm_sugar": __version__}
    return {"device": f"{device}, {os.cpu_count()} cores, {platform.machine()}", **versions}


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: a kill or a full disk leaves the old one. A device is written to, no link.

    Raises OSError, with a line on it if another process writes the same file.
    """
    content = content.encode() if isinstance(content, str) else content
    if path.is_char_device() or path.is_fifo():  # which a new file would replace
        path.write_bytes(content)
        return
    partial_path = path.with_name(f"tmp-{path.name}")
    partial_path.unlink(missing_ok=True)  # left by a kill, or a link to another file
    try:
        with open(partial_path, "xb") as file:
            file.write(content)
        os.replace(partial_path, path)
    except (FileExistsError, FileNotFoundError) as error:
        if not path.parent.is_dir():
            raise
        advice = "another process writes this file, too: give the command again when that has ended"
        raise OSError(errno.EBUSY, advice, str(path)) from error
    except BaseException:  # a full disk, a folder of that name, Ctrl-C
        partial_path.unlink(missing_ok=True)
        raise


def read_rows(path: Path) -> list[dict[str, str]]:
    """All rows of a CSV file, none if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8-sig") as file:  # a spreadsheet puts a mark before the first column
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """A CSV file, whole or not at all. Raises ValueError for a row that has other columns too."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue())


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; all rows have as many cells as the head."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  ", "| ") for line in lines)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture as PNG, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    write_atomically(path, picture.getvalue())
