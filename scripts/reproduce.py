#!/usr/bin/env python3
"""Run a table of experiments: one process of scripts/train.py for each variant and seed.

    python scripts/reproduce.py cifar10_resnet18 --data-dir DATA
    python scripts/reproduce.py cifar100_resnet18 --data-dir DIR --dataset torch/cifar100 --dataset-download
    python scripts/reproduce.py resnet18_small --data-dir DATA --seeds 2 --only 'sugar-*' relu
    python scripts/reproduce.py resnet18_small --smoke     # random images, two minutes, nothing in results/
    python scripts/reproduce.py                            # the page and the pictures again, from the numbers

A table is a YAML file in scripts/reproduce/, or one of your own (timm_sugar/experiments.py says what is in it). The
same command again skips what is done and continues what was cut off. After each run, results/TABLE.csv gets its row and
results/TABLE_epochs.csv its epochs; at the end come the picture, results/README.md and, here, the differences.

A table with a `subset` trains on a fixed part of the training split (timm_sugar/subset.py), which is written to OUTPUT.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from lab.cli import Parser, UserError, as_options, choose_device, explained
from lab.experiments.evidence import DEPTHS, compare, draw_depth, write_page, write_picture
from lab.experiments.subset import make_noise, make_subset
from lab.experiments.table import COLUMNS, CURVES, TABLES, Table, list_tables, load_table
from lab.files import environment, read_rows, write_atomically, write_rows
from lab.training.data import open_dataset
from lab.training.runs import START, read_summary

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("top1", "top5", "dead_units", "sparsity")
SMOKE = {"epochs": 1, "batch_size": 8, "warmup_epochs": 0}


def build_parser() -> Parser:
    """All options."""
    parser = Parser("reproduce.py", description=__doc__, epilog=f"Tables: {', '.join(list_tables())}.")
    add = parser.add_argument
    add("table", nargs="?", metavar="TABLE", help="name of a table, or a YAML file")
    add("--seeds", type=int, metavar="N", help="run the seeds 0 to N - 1 (default: as many as the table says)")
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="variants to run, e.g. relu 'sugar-*'")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on after what is there (default)")
    add("--smoke", action="store_true", help="one epoch of up to four variants on random images, in OUTPUT/smoke")
    add("--data-dir", metavar="DIR", help="as for scripts/train.py")
    add("--dataset", metavar="NAME", help="as for scripts/train.py, e.g. torch/cifar100")
    add("--dataset-download", action="store_true", help="as for scripts/train.py")
    add("--device", metavar="NAME", help="as for scripts/train.py")
    add("-j", "--workers", type=int, default=4, metavar="N", help="as for scripts/train.py (default: %(default)s)")
    add("--output", type=Path, default=Path("output/reproduce"), metavar="DIR", help="of runs (default: %(default)s)")
    add("--results", type=Path, default=ROOT / "results", metavar="DIR", help="of the numbers (default: results/)")
    return parser


def data_options(table: Table, args: argparse.Namespace) -> list[str]:
    """Where scripts/train.py finds the images; makes a subset if the table asks for one that isn't there yet."""
    if not table.network:
        return []
    open_split = partial(open_dataset, args.dataset or "", args.data_dir, download=args.dataset_download)
    if args.smoke or table.subset:
        name = "noise" if args.smoke else "-".join(["subset", *(f"{k}-{v}" for k, v in (table.subset or {}).items())])
        root = args.output / name
        root.parent.mkdir(parents=True, exist_ok=True)
        if args.smoke:
            make_noise(root, table.options.get("img_size", 32))
        elif not root.exists():
            print(f"choosing the images of {root}", flush=True)
            with explained(f"can't write {root}"):
                make_subset(open_split, root, **(table.subset or {}))
        return ["--data-dir", str(root)]
    named = {"data_dir": args.data_dir, "dataset": args.dataset, "dataset_download": args.dataset_download}
    return [word for key, value in named.items() if value for word in as_options(key, value)]


class Run:
    """One run of a table: its folder, and beside it the record that is written when it is done."""

    def __init__(self, table: Table, variant: str, seed: int, folder: Path) -> None:
        self.table, self.variant, self.seed = table, variant, seed
        self.name = f"{variant}-{seed}"
        self.folder, self.record = folder / self.name, folder / f"{self.name}.json"
        self.settings, self.command = table.settings(variant, seed), table.command(variant, seed)

    def read(self) -> dict[str, Any] | None:
        """The record of a run that is done. Raises UserError if the table has other settings since it was begun."""
        record = None
        if self.record.exists():
            record = json.loads(self.record.read_text())
            same = record["row"]["command"] == self.command
        elif (self.folder / "args.yaml").exists():
            args = yaml.safe_load((self.folder / "args.yaml").read_text())
            same = all(args.get(key) == value for key, value in self.settings.items())
        else:
            return None
        if not same:
            raise UserError(
                f"{self.folder} was made with other settings than the table has now: choose another --output"
            )
        return record

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Keep other processes out of the run for as long as we or the process that trains live: a file descriptor."""
        with open(self.record.with_suffix(".lock"), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process works in {self.folder}: wait for it or end it") from None
            yield file.fileno()

    def train(self, options: Sequence[str]) -> None:
        """Start or continue the run, and write its record. Raises UserError if that fails."""
        with self.locked() as lock:
            epochs = self.settings["epochs"]
            if len(read_summary(self.folder, epochs)) < epochs:
                status = self.start(options, lock)
                if status == 130:
                    raise KeyboardInterrupt
                if status:
                    raise UserError(f"run {self.name} failed (status {status}), see above; then the same again")
            write_atomically(self.record, json.dumps(self.summarize(epochs), indent=1))

    def start(self, options: Sequence[str], lock: int) -> int:
        """Train in a process of its own; returns its exit status."""
        words = [word for key, value in self.settings.items() for word in as_options(key, value)]
        place = ["--output", str(self.folder.parent), "--experiment", self.name]
        path = os.pathsep.join(filter(None, [str(TABLES), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, str(ROOT / self.table.script), *words, *place, *options],
            env={**os.environ, "PYTHONPATH": path}, pass_fds=(lock,), check=False,
        ).returncode  # fmt: skip

    def summarize(self, epochs: int) -> dict[str, Any]:
        """The rows of the results: one of the run, and one for each epoch."""
        args = yaml.safe_load((self.folder / "args.yaml").read_text())
        own, curves = {"variant": self.variant, "seed": self.seed}, []
        for row in [*read_rows(self.folder / START), *read_summary(self.folder, epochs)]:
            numbers = {key: shown(row.get(f"eval_{key}")).replace("nan", "") for key in METRICS}  # no such units
            curves.append({"epoch": int(row["epoch"]), **own, "train_loss": shown(row.get("train_loss")), **numbers})
        last = {key: value for key, value in curves[-1].items() if key in COLUMNS}
        device = environment(choose_device(args.get("device")))
        curves = [{key: row[key] for key in CURVES} for row in curves]
        return {"row": {**last, "epochs": epochs, **device, "command": self.command}, "epochs": curves}


def shown(number: str | None) -> str:
    """Four decimals; what isn't there stays empty."""
    return f"{float(number):.4f}" if number else ""


def collect(table: Table, results: Path, records: list[dict[str, Any]]) -> None:
    """Write the results: these runs, and from the files those that the table would still run in the same way."""
    path, curves = results / f"{table.name}.csv", results / f"{table.name}_epochs.csv"
    kept = {run_of(row) for row in read_rows(path) if row["command"] == still_run(table, row)}
    kept -= {run_of(record["row"]) for record in records}
    rows = [row for row in read_rows(path) if run_of(row) in kept] + [record["row"] for record in records]
    epochs = [row for row in read_rows(curves) if run_of(row) in kept]
    epochs += [row for record in records for row in record["epochs"]]
    place = {name: i for i, name in enumerate(table.variants)}
    rows.sort(key=lambda row: (place[row["variant"]], int(row["seed"])))
    epochs.sort(key=lambda row: (place[row["variant"]], int(row["seed"]), int(row["epoch"])))
    with explained(f"can't write to {results}"):
        write_rows(curves, epochs, CURVES)
        write_rows(path, rows, COLUMNS)


def run_of(row: dict[str, Any]) -> tuple[str, int]:
    """Variant and seed of a row of results."""
    return row["variant"], int(row["seed"])


def still_run(table: Table, row: dict[str, str]) -> str | None:
    """The command of a row's variant and seed as the table has it now."""
    return table.command(*run_of(row)) if row["variant"] in table.variants else None


def chosen_variants(table: Table, patterns: Sequence[str]) -> list[str]:
    """Variants that match, in the order of the table. Raises UserError if a pattern matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in table.variants):
            raise UserError(f"--only {pattern}: no such variant (there are: {', '.join(table.variants)})")
    return [name for name in table.variants if any(fnmatchcase(name, pattern) for pattern in patterns)]


def run_table(table: Table, args: argparse.Namespace) -> None:
    """All runs, seed by seed, so that a part of them can already be compared."""
    variants = chosen_variants(table, args.only)
    folder = args.output / table.name
    folder.mkdir(parents=True, exist_ok=True)
    runs = [Run(table, variant, seed, folder) for seed in range(table.seeds) for variant in variants]
    if not args.resume and any(run.folder.exists() or run.record.exists() for run in runs):
        raise UserError(f"--no-resume: there are runs in {folder}; choose another --output")
    records = {run: run.read() for run in runs}
    options = data_options(table, args)
    if table.network:
        options += ["--resume", "auto", "--workers", str(args.workers)]
        options += ["--device", args.device] if args.device else []
    for i, run in enumerate(runs):
        print(f"[{i + 1}/{len(runs)}] {table.name} {run.name}{': done before' if records[run] else ''}", flush=True)
        if not records[run]:
            run.train(options)
            records[run] = run.read()
        collect(table, args.results, [record for record in records.values() if record])
    print(compare(table, read_rows(args.results / f"{table.name}.csv")))


def smoke_of(table: Table, patterns: Sequence[str]) -> Table:
    """At most four of the variants that match, evenly spaced, so of every kind; one epoch and one seed each."""
    names = chosen_variants(table, patterns)
    variants = {name: table.variants[name] for name in names[:: math.ceil(len(names) / 4)]}
    options = {**table.options, **(SMOKE if table.network else {"epochs": 1})}
    return replace(table, seeds=1, options=options, variants=variants, subset=None)


def run(args: argparse.Namespace) -> None:
    """Run the table if one is named, then write pictures and the page."""
    if args.seeds is not None and args.seeds < 1:
        raise UserError("--seeds must be at least 1")
    if args.table:
        table = load_table(args.table)
        table = replace(table, seeds=args.seeds or table.seeds)
        args.output = args.output.absolute()
        if args.smoke:
            args.output, args.results = args.output / "smoke", args.output / "smoke" / "results"
            shutil.rmtree(args.output, ignore_errors=True)
            table, args.only = smoke_of(table, args.only), ["*"]
        with explained(f"can't write to {args.output} or {args.results}"):
            args.output.mkdir(parents=True, exist_ok=True)
            args.results.mkdir(parents=True, exist_ok=True)
        run_table(table, args)
        write_picture(table, args.results)
    else:
        ran = [name for name in list_tables() if (args.results / f"{name}.csv").exists()]
        for table in map(load_table, ran):
            write_picture(table, args.results)
        for name in DEPTHS:
            if rows := read_rows(args.results / name / "activations.csv"):
                draw_depth(rows, args.results / name / "activations.png")
    write_page(args.results)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 130 after Ctrl-C. A user's mistake exits with status 2 and one line on stderr."""
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
