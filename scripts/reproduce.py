#!/usr/bin/env python3
"""Run a table of experiments: one process of scripts/train.py for each variant and seed.

    python scripts/reproduce.py cifar10_resnet18 --data-dir DATA
    python scripts/reproduce.py cifar100_resnet18 --data-dir DIR --dataset torch/cifar100 --dataset-download
    python scripts/reproduce.py resnet18_small --data-dir DATA --seeds 2 --only 'sugar-*' relu
    python scripts/reproduce.py resnet18_small --smoke     # random images, two minutes, nothing in results/
    python scripts/reproduce.py                            # the page and the pictures again, from the numbers

A table is a YAML file in scripts/reproduce/, or one of your own (scripts/lab/experiments/table.py says what is in it).
After each run, results/TABLE.csv gets its row and results/TABLE_epochs.csv its epochs; at the end come the picture,
results/README.md and, here, the differences.

The same command again skips the rows that results/ has and continues what was cut off. Given twice at once, it shares
the runs between two processes. A run that starts from another table's checkpoint makes that first, if it is missing. A
run that diverges gets a row `failed`, and the others go on.

A table with a `subset` trains on a part of the training split (scripts/lab/experiments/subset.py), written to OUTPUT.
A table with `tune` first runs every variant at every learning rate on held-out training images.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from lab.cli import Parser, UserError, as_options, explained
from lab.experiments.evidence import DEPTHS, compare, write_pages
from lab.experiments.pictures import draw_depth, write_picture
from lab.experiments.rows import Busy, collect, locked, read_results
from lab.experiments.run import TableRun, start_of
from lab.experiments.subset import make_noise, make_subset
from lab.experiments.table import TABLES, Key, Table, list_tables, load_table
from lab.experiments.tuning import pending_runs, tuning_of
from lab.files import read_rows
from lab.training.data import open_dataset
from lab.training.groups import n

ROOT = Path(__file__).resolve().parents[1]
SMOKE = {"epochs": 1, "batch_size": 8, "warmup_epochs": 0}
OF_SMOKE = ".smoke"  # a file in the folders that --smoke made and may remove
PAUSE = 5.0  # seconds between two looks at what another process works on


def build_parser() -> Parser:
    """All options."""
    parser = Parser("reproduce.py", description=__doc__, epilog=f"Tables: {', '.join(list_tables())}.")
    add = parser.add_argument
    add("table", nargs="?", metavar="TABLE", help="name of a table, or a YAML file")
    add("--seeds", **n(1, 1000), help="run the seeds 0 to N - 1 (default: as many as the table says)")
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="variants to run, e.g. relu 'sugar-*'")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on after what is there (default)")
    add("--rerun", action="store_true", help="also what results/ has a row of, unless OUTPUT has that run")
    add("--smoke", action="store_true", help="one epoch of up to four variants on random images, in OUTPUT/smoke")
    add("--data-dir", metavar="DIR", help="as for scripts/train.py")
    add("--dataset", metavar="NAME", help="as for scripts/train.py, e.g. torch/cifar100")
    add("--dataset-download", action="store_true", help="as for scripts/train.py")
    add("--device", metavar="NAME", help="as for scripts/train.py")
    add("-j", "--workers", **n(0, 256, default=4), help="as for scripts/train.py (default: %(default)s)")
    add("--output", type=Path, default=Path("output/reproduce"), metavar="DIR", help="of runs (default: %(default)s)")
    add("--results", type=Path, default=ROOT / "results", metavar="DIR", help="of the numbers (default: results/)")
    return parser


def data_options(table: Table, key: Key, args: argparse.Namespace) -> list[str]:
    """Where scripts/train.py finds the images; makes a subset if the run asks for one that isn't there yet."""
    if not table.takes_images:
        return []
    chosen = {} if args.smoke else table.images(key)
    if args.smoke or chosen:
        name = "noise" if args.smoke else "-".join(["subset", *(f"{k}-{v}" for k, v in chosen.items())])
        root, source = args.output / name, args.output / f"{name}.source"
        asked = f"{args.dataset or ''} {Path(args.data_dir or '').resolve()}\n"
        with locked(args.output / f"{name}.lock"):
            if not args.smoke and root.exists() and source.exists() and source.read_text() != asked:
                raise UserError(f"{root} is of {source.read_text().strip()}: choose another --output, or remove it")
            if args.smoke and not root.exists():
                make_noise(root, table.options.get("img_size", 32))
            elif not root.exists():
                print(f"choosing the images of {root}", flush=True)
                open_split = partial(open_dataset, args.dataset or "", args.data_dir, download=args.dataset_download)
                with explained(f"can't write {root}"):
                    source.write_text(asked)
                    make_subset(open_split, root, **chosen)
        return ["--data-dir", str(root)]
    named = {"data_dir": args.data_dir, "dataset": args.dataset, "dataset_download": args.dataset_download}
    return [word for key, value in named.items() if value for word in as_options(key, value)]


def chosen_variants(table: Table, patterns: Sequence[str]) -> list[str]:
    """Variants that match, in the order of the table. Raises UserError if a pattern matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in table.variants):
            raise UserError(f"--only {pattern}: no such variant (there are: {', '.join(table.variants)})")
    return [name for name in table.variants if any(fnmatchcase(name, pattern) for pattern in patterns)]


class Work:
    """The runs of a table that are still to do, and what is known of those that are done."""

    def __init__(self, table: Table, args: argparse.Namespace) -> None:
        self.table, self.args, self.folder = table, args, args.output / table.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.variants = chosen_variants(table, args.only)
        self.fresh: set[Key] = set()  # rows of this process, and of OUTPUT
        self.epochs, self.seconds, self.said = 0, 0.0, ""

    def pending(self) -> list[Key]:
        """What to run next, in this order; final runs of a tuned table only once all rates are chosen."""
        rows = read_results(self.table, self.args.results)
        if self.args.rerun:
            rows = {key: row for key, row in rows.items() if key in self.fresh}
        wanted = pending_runs(self.table, rows)
        own = [key for key in wanted if key.variant in self.variants]
        if not own and any(key.phase == "tune" for key in wanted):
            self.say("the final runs wait for the tuning of all variants: leave out --only")
        return own

    def say(self, text: str) -> None:
        """Print a line, once."""
        if text != self.said:
            print(text, flush=True)
        self.said = text

    def run(self) -> None:
        """All runs; those that OUTPUT has are only read, and those that another process works on are left to it."""
        while keys := self.pending():
            if not self.run_first(keys):
                self.say(f"waiting for another process that works in {self.folder}")
                time.sleep(PAUSE)

    def run_first(self, keys: list[Key]) -> bool:
        """The first run that no other process works on; False if there is none."""
        for i, key in enumerate(keys):
            run = TableRun(self.table, key, self.folder)
            record = run.read()
            if not record and run.is_busy():
                continue
            if not record:
                self.say(f"[{len(keys) - i} to do{self.time_left(keys[i:])}] {self.table.name} {run.name}")
                with suppress(Busy):  # taken since we looked, or its start is
                    self.train(run)
                record = run.read()
            if record:
                collect(self.table, self.args.results, [record], self.folder / "results.lock")
                self.fresh.add(key)
                return True
        return False

    def train(self, run: TableRun) -> None:
        """Train a run, and before it the one that it starts from, if its checkpoint is missing."""
        before = start_of(run, self.args.output)
        if before:
            self.say(f"{run.name} starts from {before.table.name} {before.name}, which is not in {self.args.output}")
            Work(before.table, argparse.Namespace(**{**vars(self.args), "only": ["*"]})).train(before)
        options = data_options(self.table, run.key, self.args)
        if self.table.takes_images:
            options += ["--resume", "auto", "--workers", str(self.args.workers)]
            options += ["--device", self.args.device] if self.args.device else []
        start = time.monotonic()
        run.train(options)
        self.epochs += run.settings["epochs"]
        self.seconds += time.monotonic() - start

    def time_left(self, keys: list[Key]) -> str:
        """How long all the runs to come will take this process alone, once it has finished one."""
        if not self.epochs:
            return ""
        tuning = tuning_of(self.table, read_results(self.table, self.args.results))
        if tuning and not tuning.done:  # whichever rates it chooses
            keys = [*keys, *(key for key in self.table.final_keys() if key.variant in self.variants)]
        epochs = sum(self.table.settings(key)["epochs"] for key in keys)
        minutes = round(epochs * self.seconds / self.epochs / 60)
        return f", about {minutes // 60} h {minutes % 60:02} min" if minutes else ", less than a minute"


def run_table(table: Table, args: argparse.Namespace) -> None:
    """All runs that results/ has no row of, seed by seed, so that a part of them can already be compared."""
    work = Work(table, args)
    if not args.resume and any([*work.folder.glob("*.json"), *work.folder.glob("*/args.yaml")]):
        raise UserError(f"--no-resume: there are runs in {work.folder}; choose another --output")
    done = len(read_results(table, args.results))
    if done and not args.rerun:
        print(f"{done} runs done before", flush=True)
    work.run()
    collect(table, args.results, [], work.folder / "results.lock")
    print(compare(table, list(read_results(table, args.results).values())))


def smoke_of(table: Table, patterns: Sequence[str]) -> Table:
    """At most four of the variants that match, evenly spaced, so of every kind; one epoch and one seed each."""
    names = chosen_variants(table, patterns)
    variants = {name: table.variants[name] for name in names[:: math.ceil(len(names) / 4)]}
    options = {**table.options, **(SMOKE if table.takes_images else {"epochs": 1})}
    baseline = table.baseline if table.baseline in variants else next(iter(variants))
    untuned = {"subset": None, "tune": None, "primary": None, "contrasts": []}
    return replace(table, seeds=1, options=options, variants=variants, baseline=baseline, **untuned)


def clear(folder: Path) -> None:
    """Remove what an earlier --smoke left. Raises UserError for a folder with files that no --smoke made."""
    if folder.exists() and not (folder / OF_SMOKE).exists() and any(folder.iterdir()):
        raise UserError(f"{folder} has files that --smoke didn't make: move them, or choose another --output")
    shutil.rmtree(folder, ignore_errors=True)


def run_named(args: argparse.Namespace) -> None:
    """Run the table that is named; write its picture and the pages."""
    table = load_table(args.table)
    if table.name in list_tables() and table.folder.resolve() != TABLES and not args.smoke:
        raise UserError(f"{args.table} has the name of a table of the project, whose rows it would replace: rename it")
    with explained(f"--seeds {args.seeds}"):
        table = replace(table, seeds=args.seeds or table.seeds)
    if args.smoke:
        clear(args.output)
        table, args.only = smoke_of(table, args.only), ["*"]
    with explained(f"can't write to {args.output} or {args.results}"):
        args.output.mkdir(parents=True, exist_ok=True)
        args.results.mkdir(parents=True, exist_ok=True)
        if args.smoke:
            (args.output / OF_SMOKE).touch()
    run_table(table, args)
    write_picture(table, args.results)
    write_pages(args.results)


def draw_all(results: Path) -> None:
    """Write all pictures and pages again, from the numbers."""
    if not results.is_dir():
        raise UserError(f"--results {results}: no such folder")
    for name in list_tables():
        if (results / f"{name}.csv").exists():
            write_picture(load_table(name), results)
    for name in DEPTHS:
        if rows := read_rows(results / name / "activations.csv"):
            draw_depth(rows, results / name / "activations.png")
    write_pages(results)


def run(args: argparse.Namespace) -> None:
    """Run the table if one is named, else draw what there is."""
    args.output = args.output.absolute()
    if not args.table:
        draw_all(args.results)
    elif args.smoke:
        with explained(f"can't write to {args.output}"):
            args.output.mkdir(parents=True, exist_ok=True)
        lock, args.output = args.output / "smoke.lock", args.output / "smoke"
        args.results = args.output / "results"
        with locked(lock, args.output):  # which begins anew each time
            run_named(args)
    else:
        run_named(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 130 after Ctrl-C. A user's mistake exits with status 2 and one line on stderr."""
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
