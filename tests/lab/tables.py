"""What the tests of tables share: the module of their networks, whose surrogates the library itself must not know."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lab.experiments.rows import COLUMNS
from lab.experiments.table import TABLES, Key, Table, rate
from scripting import load_script

from timm_sugar import surrogate

sys.path.insert(0, str(TABLES))  # as scripts/reproduce.py does for the processes that it starts
BUILT_IN = [name for name in surrogate.list_surrogates() if name != "relu"]
import networks  # noqa: E402

OWN = {name: surrogate._surrogates.pop(name) for name in networks.GRADIENTS}
reproduce = load_script("reproduce")
TINY = """\
title: Tiny
network: test_resnet
baseline: relu
seeds: 2
options: {num_classes: 3, img_size: 32, epochs: 3, batch_size: 8, lr: 0.05, warmup_epochs: 0, log_interval: 1}
variants:
  relu: {}
  sugar-bsilu: {sugar: bsilu}
  sugar-nelu: {sugar: nelu, alpha: 0.1}
"""


def rows_of(numbers: Mapping[str, Mapping[int, float]]) -> list[dict[str, str]]:
    """Rows of results with these top-1 by variant and seed."""
    blank = {**dict.fromkeys(COLUMNS, ""), "phase": "final", "status": "done"}
    return [
        {**blank, "variant": name, "seed": str(seed), "top1": str(top1)}
        for name, by_seed in numbers.items()
        for seed, top1 in by_seed.items()
    ]


def final(table: Table, variant: str, seed: int) -> Key:
    """The key of a final run of a table that isn't tuned."""
    return Key("final", variant, rate(table.settings(Key("final", variant, "", seed)).get("lr")), seed)


def places(folder: Path, data: Path, output: str = "o") -> list[str]:
    """The options of scripts/reproduce.py that say where everything is, for a test in `folder`."""
    return ["--output", str(folder / output), "--results", str(folder / "r"), "--data-dir", str(data)]


def record_of(run: Any, top1: float | None = 60.0) -> None:
    """In the place of a process: the record of a run, without the run; None for one that diverged."""
    run.folder.mkdir(parents=True, exist_ok=True)
    epochs = [] if top1 is None else [f"{i},1.0,{top1}" for i in range(run.settings["epochs"])]
    (run.folder / "args.yaml").write_text(yaml.safe_dump({**run.settings, "device": "cpu"}))
    run.begun.write_text(run.as_begun())
    if epochs:
        (run.folder / "summary.csv").write_text("\n".join(["epoch,train_loss,eval_top1", *epochs]))
    record = run.as_row(run.settings["epochs"], failed=top1 is None)
    run.record.write_text(json.dumps(record))
