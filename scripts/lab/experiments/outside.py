"""What tests and fault reports of other projects say of SUGAR, as tables in Markdown."""

from __future__ import annotations

from pathlib import Path

from lab.files import markdown_table, read_rows

_NOT_RUN = "Not run yet."


def acceptance(results: Path) -> str:
    """How many of timm's own tests pass on SUGAR models, from acceptance.csv in the folder of results."""
    rows = read_rows(results / "acceptance.csv")
    if not rows:
        return _NOT_RUN
    counts = [sum(int(row[key]) for row in rows) for key in ("passed", "failed", "skipped")]
    body = [str(len(rows)), str(len({row["family"] for row in rows})), *map(str, counts), *_versions(rows)]
    return markdown_table(("architectures", "families", "passed", "failed", "skipped", "timm", "torch"), [body])


def replay(results: Path) -> str:
    """The replayed reports and what SUGAR did, from replay.csv in the folder of results."""
    rows = read_rows(results / "replay.csv")
    if not rows:
        return _NOT_RUN
    wrong = sum(row["outcome"] != "right" for row in rows)
    timm, torch = _versions(rows)
    body = [[f"`{row['source']}`", row["case"], row["outcome"]] for row in rows]
    table = markdown_table(("reported as", "fault", "here"), body)
    return f"{table}\n\n{len(rows)} cases, {wrong} wrong; timm {timm}, torch {torch}."


def _versions(rows: list[dict[str, str]]) -> tuple[str, str]:
    """Releases of timm and torch that the rows were made with."""
    timm, torch = (", ".join(sorted({row[key] for row in rows})) for key in ("timm", "torch"))
    return timm, torch
