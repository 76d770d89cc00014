"""One run of a table: a process of its own, its folder, and beside that the record that is written when it is done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lab.cli import UserError, as_options, choose_device, explained
from lab.experiments.rows import COLUMNS, CURVES, Busy, is_current, key_of, locked, modern, status_of, where
from lab.experiments.table import TABLES, Key, Table, load_table, rate
from lab.files import environment, read_rows, write_atomically
from lab.training.divergence import STATUS
from lab.training.runs import START, is_saved, read_summary

SCRIPTS = Path(__file__).resolve().parents[2]
METRICS = ("top1", "top5", "dead_units", "sparsity")


class TableRun:
    """A run of a table with its key, below a folder that holds all runs of the table."""

    def __init__(self, table: Table, key: Key, folder: Path) -> None:
        self.table, self.key = table, key
        self.name = run_name(table, key)
        self.folder, self.record = folder / self.name, folder / f"{self.name}.json"
        self.begun = folder / f"{self.name}.begun"  # what the table said when the run was begun
        self.settings, self.command = table.settings(key), table.command(key)

    def read(self) -> dict[str, Any] | None:
        """The record of a run that is done. Raises UserError if the table has other settings since it was begun."""
        record = None
        if self.record.exists():
            with explained(f"{self.record} is damaged: remove it", AttributeError):
                record = json.loads(self.record.read_text())
                epochs = [modern(self.table, row) for row in record["epochs"]]
                record = {"row": modern(self.table, record["row"]), "epochs": epochs}
                same = key_of(record["row"]) == self.key and is_current(self.table, self.key, record["row"])
        elif (self.folder / "args.yaml").exists():
            same = self.begun.exists() and self.begun.read_text() == self.as_begun()
        else:
            return None
        if not same:
            raise UserError(
                f"{self.folder} was made with other settings than the table has now: choose another --output, or "
                "remove this folder"
            )
        return record

    def as_begun(self) -> str:
        """All that the table says of the run: its command, and the images that it trains on and is scored on."""
        return json.dumps({**where(self.table, self.key), "command": self.command}, indent=1)

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Keep other processes out of the run for as long as we or the process that trains live: a file descriptor."""
        self.record.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.record.with_name(f"{self.name}.lock"), self.folder) as file:
            yield file

    def is_busy(self) -> bool:
        """Whether another process works on the run."""
        try:
            with self.locked():
                return False
        except Busy:
            return True

    def train(self, options: Sequence[str]) -> None:
        """Start or continue the run, and write its record, also if it diverges.

        Raises Busy if another process works on it, UserError if it fails.
        """
        with self.locked() as lock:
            if self.record.exists():  # written since we looked
                return
            epochs, status = self.settings["epochs"], 0
            is_trained = len(read_summary(self.folder, epochs)) >= epochs
            if not is_trained or (self.table.takes_images and not is_saved(self.folder)):  # which comes after the row
                status = self.start(options, lock)
                if status == 130:
                    raise KeyboardInterrupt
                if status not in (0, STATUS):
                    raise UserError(f"run {self.name} failed (status {status}), see above; then the same again")
            write_atomically(self.record, json.dumps(self.as_row(epochs, failed=status == STATUS), indent=1))

    def start(self, options: Sequence[str], lock: int) -> int:
        """Train in a process of its own; returns its exit status."""
        words = [word for name, value in self.settings.items() for word in as_options(name, value)]
        place = ["--output", str(self.folder.parent), "--experiment", self.name]
        path = os.pathsep.join(filter(None, [str(TABLES), os.environ.get("PYTHONPATH")]))
        if not (self.folder / "args.yaml").exists():
            write_atomically(self.begun, self.as_begun())
        return subprocess.run(
            [sys.executable, str(SCRIPTS.parent / self.table.script), *words, *place, *options],
            env={**os.environ, "PYTHONPATH": path}, pass_fds=(lock,), check=False,
        ).returncode  # fmt: skip

    def as_row(self, epochs: int, failed: bool = False) -> dict[str, Any]:
        """The rows of the results: one of the run, and one for each epoch."""
        file, own = self.folder / "args.yaml", self.key._asdict()
        args = yaml.safe_load(file.read_text()) if file.exists() else {}
        curves = []
        for row in [*read_rows(self.folder / START), *read_summary(self.folder, epochs)]:
            numbers = {name: shown(row.get(f"eval_{name}")).replace("nan", "") for name in METRICS}  # no such units
            curves.append({"epoch": int(row["epoch"]), **own, "train_loss": shown(row.get("train_loss")), **numbers})
        last = curves[-1] if curves and not failed else {}
        numbers = {name: last.get(name, "") for name in ("train_loss", *METRICS)}
        status = "failed" if failed else status_of(self.table, numbers["top1"], numbers["train_loss"])
        row = {
            **own, **where(self.table, self.key), "status": status, "epochs": epochs, **numbers,
            **environment(choose_device(args.get("device"))), "command": self.command,
        }  # fmt: skip
        return {
            "row": {name: row[name] for name in COLUMNS},
            "epochs": [{name: line[name] for name in CURVES} for line in curves],
        }


def run_name(table: Table, key: Key) -> str:
    """The name of a run's folder: with its rate where tuning chooses one."""
    words = ["tune"] if key.phase == "tune" else []
    words += [key.variant, *(["lr", key.lr] if table.tune else []), str(key.seed)]
    return "-".join(words)


def shown(number: str | None) -> str:
    """Four decimals; what isn't there stays empty."""
    return f"{float(number):.4f}" if number else ""


def start_of(run: TableRun, output: Path) -> TableRun | None:
    """The run whose checkpoint this one starts from, if that isn't whole and a table beside this one makes it.

    `output` is the folder of all tables' runs. Raises UserError if that run diverged.
    """
    path = Path(run.settings.get("initial_checkpoint") or run.settings.get("checkpoint") or "")
    if not path.name or path.parent.parent.parent.resolve() != output.resolve():
        return None
    file = run.table.folder / f"{path.parent.parent.name}.yaml"
    variant, _, seed = path.parent.name.rpartition("-")
    table = load_table(str(file)) if file.exists() else None
    if table is None or variant not in table.variants or not seed.isdecimal():
        return None
    settings = table.settings(Key("final", variant, "", int(seed)))
    before = TableRun(table, Key("final", variant, rate(settings.get("lr")), int(seed)), output / table.name)
    record = before.read()  # complains about other settings
    if record and record["row"]["status"] == "failed":
        raise UserError(f"{run.name} starts from {before.folder}, which diverged: give {table.name} a lower rate")
    if record and path.exists():
        return None
    if not path.exists():  # then what else there is of the run is of no use
        (before.folder / "summary.csv").unlink(missing_ok=True)
        before.record.unlink(missing_ok=True)
    return before
