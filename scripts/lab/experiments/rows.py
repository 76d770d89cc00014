"""The rows of results/TABLE.csv, one a run, and of results/TABLE_epochs.csv, one an epoch of a run."""

from __future__ import annotations

import csv
import fcntl
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.cli import UserError, explained
from lab.experiments.table import Key, Table, rate
from lab.experiments.tuning import tuning_of
from lab.files import read_rows, write_rows

# status: "done"; "collapsed" (a loss that isn't finite, or top-1 within 2 points of chance); "failed" (diverged).
COLUMNS = (
    *("phase", "variant", "lr", "seed", "subset", "split", "status"),
    *("epochs", "top1", "top5", "train_loss", "dead_units", "sparsity"),
    *("device", "torch", "timm", "timm_sugar", "command"),
)
PHASES = ("tune", "final")
CURVES = ("phase", "variant", "lr", "seed", "epoch", "train_loss", "top1", "dead_units", "sparsity")
WHOLE = ("seed", "epoch")
NUMBERS = ("lr", "epochs", "train_loss", "top1", "top5", "dead_units", "sparsity")  # or empty
NEAR_CHANCE = 2.0  # points of top-1


def key_of(row: Mapping[str, Any]) -> Key:
    """Which run a row is about."""
    return Key(row["phase"], row["variant"], row["lr"], int(row["seed"]))


def status_of(table: Table, top1: str, train_loss: str) -> str:
    """Whether a run that went to its end collapsed, by its last epoch."""
    finite = all(math.isfinite(float(number)) for number in (top1, train_loss) if number)
    guessing = table.chance is not None and top1 != "" and float(top1) <= table.chance + NEAR_CHANCE
    return "collapsed" if guessing or not finite else "done"


def where(table: Table, key: Key) -> dict[str, str]:
    """The columns `subset` and `split` of a run: what it trained on, and what top-1 is of."""
    if not table.takes_images:
        return {"subset": "", "split": ""}
    chosen = table.images(key)
    held_out = chosen.pop("held_out", 0)
    subset = "-".join(f"{name}-{value}" for name, value in chosen.items())
    return {"subset": subset or "all", "split": f"held_out-{held_out}" if held_out else "validation"}


def load_rows(table: Table, results: Path, epochs: bool = False) -> list[dict[str, str]]:
    """The rows of results/TABLE.csv, or of results/TABLE_epochs.csv, with the columns of today."""
    path = results / f"{table.name}{'_epochs' if epochs else ''}.csv"
    with explained(f"{path} is damaged; mend or remove it", csv.Error):
        rows = [modern(table, row) for row in read_rows(path) if row["variant"] in table.variants]
        for row in rows:
            for name in CURVES if epochs else COLUMNS:
                if row[name] is None:
                    raise ValueError(f"a row of {row['variant']} has no {name}")
                if name in NUMBERS:
                    float(row[name] or 0)
                if name in WHOLE:
                    int(row[name])
            if row["phase"] not in PHASES:
                raise ValueError(f"a row of {row['variant']} has the phase {row['phase']!r}")
            if row["lr"] and row["lr"] != rate(float(row["lr"])):
                raise ValueError(f"a row of {row['variant']} has the rate {row['lr']}, not {rate(float(row['lr']))}")
        return rows


def modern(table: Table, row: dict[str, Any]) -> dict[str, Any]:
    """A row with the columns of today; those of an older version had no phase."""
    if "phase" in row:
        return row
    if table.tune:
        raise ValueError("there is no column phase")
    key = Key("final", row["variant"], "", int(row["seed"]))
    row = {**key._asdict(), "lr": rate(table.settings(key).get("lr")), **row}
    if "command" in row:
        row |= {**where(table, key), "status": status_of(table, row["top1"], row["train_loss"])}
    return row


def read_results(table: Table, results: Path) -> dict[Key, dict[str, str]]:
    """The rows that the table would still make in the same way, by their keys."""
    rows = {key_of(row): row for row in load_rows(table, results)}
    rows = {key: row for key, row in rows.items() if is_current(table, key, row)}
    tuning = tuning_of(table, rows)
    if tuning and tuning.done:  # a final run at a rate that another choice has replaced
        rows = {key: row for key, row in rows.items() if key.phase == "tune" or tuning.best.get(key.variant) == key.lr}
    return rows


def is_current(table: Table, key: Key, row: Mapping[str, str]) -> bool:
    """Whether the table would make this row with the same command on the same images."""
    if key.phase == "tune" and not table.tune:
        return False
    same_images = all(row[name] == value for name, value in where(table, key).items())
    return same_images and row["command"] == table.command(key)


def final_rows(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The rows that statistics are made of, without those of tuning."""
    return [row for row in rows if row["phase"] == "final"]


def done_rows(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The final rows whose runs neither collapsed nor failed."""
    return [row for row in final_rows(rows) if row["status"] == "done"]


def done_epochs(table: Table, results: Path) -> list[dict[str, str]]:
    """The epochs of the final runs that neither collapsed nor failed."""
    wanted = {key_of(row) for row in done_rows(load_rows(table, results))}
    return [row for row in load_rows(table, results, True) if key_of(row) in wanted]


class Busy(UserError):
    """Another process works there."""


@contextmanager
def locked(path: Path, place: Path | None = None) -> Iterator[int]:
    """Hold a file, whose descriptor is the value, as long as we or a process that we give it to live.

    Waits until no other process holds it, or with the `place` that it stands for raises Busy.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if place else 0))
        except BlockingIOError:
            raise Busy(f"another process works in {place}: wait for it or end it") from None
        yield file.fileno()


def collect(table: Table, results: Path, records: list[dict[str, Any]], lock: Path) -> None:
    """Add records of runs to the results, in the order of the table; rows that it wouldn't make any more go.

    `lock` is a file that keeps two processes from writing at once.
    """
    new = {key_of(record["row"]): record for record in records}
    place = {name: i for i, name in enumerate(table.variants)}

    def order(row: Mapping[str, Any]) -> tuple[Any, ...]:
        lr = float(row["lr"]) if row["lr"] else 0.0
        return row["phase"] == "final", place[row["variant"]], lr, int(row["seed"]), int(row.get("epoch", 0))

    with locked(lock), explained(f"can't write to {results}"):
        kept = read_results(table, results)
        epochs = [row for row in load_rows(table, results, True) if key_of(row) in kept.keys() - new.keys()]
        epochs += [row for record in records for row in record["epochs"]]
        rows = [row for key, row in kept.items() if key not in new] + [record["row"] for record in records]
        write_rows(results / f"{table.name}_epochs.csv", sorted(epochs, key=order), CURVES)
        write_rows(results / f"{table.name}.csv", sorted(rows, key=order), COLUMNS)
