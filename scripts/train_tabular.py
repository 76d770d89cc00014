#!/usr/bin/env python3
"""Train a small MLP on a data set that scikit-learn ships: SUGAR outside vision, without timm.

    python scripts/train_tabular.py --activation sugar --model-kwargs surrogate=nelu alpha=0.05 --seed 1

The seed draws the weights, the order of the rows and the held-out part of the data (30 %, stratified), so that runs of
one seed differ in the activation alone. A run is a folder with args.yaml and summary.csv, as of scripts/train.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sklearn.datasets
import torch
import torch.nn.functional as F
import yaml
from lab.cli import KeyValues, Parser, UserError, explained
from lab.files import write_atomically
from lab.training.divergence import STATUS, Diverged, all_finite, diverged
from lab.training.groups import SEED, n, x
from lab.training.runs import write_summary
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from timm_sugar import SUGAR
from timm_sugar.diagnostics import track_activations

DATA_SETS = ("breast_cancer", "wine", "iris")
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "sugar": SUGAR}


def build_parser() -> Parser:
    """All options; those that scripts/train.py has too mean the same."""
    parser = Parser("train_tabular.py", description=__doc__)
    add = parser.add_argument
    add("--dataset", default="breast_cancer", choices=DATA_SETS, help="(default: %(default)s)")
    add("--activation", default="sugar", choices=ACTIVATIONS, help="(default: %(default)s)")
    add("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="of SUGAR: surrogate=nelu ...")
    add("--depth", **n(1, default=6), help="hidden layers (default: %(default)s)")
    add("--width", **n(1, default=64), help="units of each (default: %(default)s)")
    add("--epochs", **n(1, default=50), help="(default: %(default)s)")
    add("-b", "--batch-size", **n(1, default=32), help="(default: %(default)s)")
    add("--lr", **x(0, default=1e-3), help="of AdamW (default: %(default)s)")
    add("--seed", type=SEED, default=42, metavar="N", help="(default: %(default)s)")
    add("--output", default="./output/tabular", metavar="DIR", help="folder of runs (default: %(default)s)")
    add("--experiment", default="run", metavar="NAME", help="name of the run, overwritten (default: %(default)s)")
    return parser


def load_rows(name: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training rows, held-out rows (N, features), standardised by the former, and their labels (N)."""
    x, y = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    parts = train_test_split(x, y, test_size=0.3, stratify=y, random_state=seed)
    train, held_out = (torch.as_tensor(part, dtype=torch.float32) for part in parts[:2])
    mean, spread = train.mean(0), train.std(0)
    labels = [torch.as_tensor(part) for part in parts[2:]]
    return (train - mean) / spread, (held_out - mean) / spread, labels[0], labels[1]


def build_model(args: argparse.Namespace, features: int, classes: int) -> nn.Sequential:
    """`depth` linear layers with the activation, and one without. Raises UserError for what SUGAR doesn't take."""
    layers: list[nn.Module] = []
    for i in range(args.depth):
        with explained("--model-kwargs"):
            activation = ACTIVATIONS[args.activation](**args.model_kwargs)
        layers += [nn.Linear(args.width if i else features, args.width), activation]
    return nn.Sequential(*layers, nn.Linear(args.width if args.depth else features, classes))


def train_one_epoch(model: nn.Module, optimizer: Any, rows: Tensor, labels: Tensor, batch_size: int) -> float:
    """One pass in random order; returns the mean loss."""
    total = 0.0
    for chosen in torch.randperm(len(rows)).split(batch_size):
        loss = F.cross_entropy(model(rows[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(chosen) / len(rows)
    return total


@torch.no_grad()
def evaluate(model: nn.Module, rows: Tensor, labels: Tensor) -> dict[str, float]:
    """Loss, top-1 (percent), shares of dead units and zeros (0..1) on the held-out rows."""
    with track_activations(model) as activations:
        output = model(rows)
    top1 = 100 * (output.argmax(1) == labels).double().mean().item()
    shares = {"eval_dead_units": activations.dead, "eval_sparsity": activations.sparsity}
    return {"eval_loss": F.cross_entropy(output, labels).item(), "eval_top1": top1, **shares}


def run(args: argparse.Namespace) -> None:
    """Train all epochs and write the folder: summary.csv last, so that a run that has one is whole."""
    if args.experiment in ("", "..") or Path(args.experiment).name != args.experiment:
        raise UserError(f"--experiment {args.experiment!r} is no name of a folder in --output")
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the same numbers on any count of cores
    train, held_out, labels, truth = load_rows(args.dataset, args.seed)
    rows: list[dict[str, Any]] = []
    with explained("can't train with these options"):
        model = build_model(args, train.shape[1], int(labels.max()) + 1)
        optimizer = torch.optim.AdamW(model.parameters(), args.lr)
        for epoch in range(args.epochs):
            loss = train_one_epoch(model, optimizer, train, labels, args.batch_size)
            if not all_finite([loss], model.parameters()):
                raise diverged(loss, f"in epoch {epoch}")
            rows.append({"epoch": epoch, "train_loss": loss, **evaluate(model, held_out, truth)})
    folder = Path(args.output, args.experiment)
    with explained(f"can't write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.csv").unlink(missing_ok=True)  # of the run that is overwritten
        write_atomically(folder / "args.yaml", yaml.safe_dump(vars(args)))
        write_summary(folder, rows)
    print(f"done: {folder}; top1 {rows[-1]['eval_top1']:.2f}, loss {rows[-1]['train_loss']:.4f} in training")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 3 if the loss stops being finite, or 130 after Ctrl-C.

    A user's mistake exits with status 2 and one line on stderr.
    """
    try:
        return build_parser().run(run, argv)
    except Diverged as error:
        print(f"train_tabular.py: error: {error}", file=sys.stderr)
        return STATUS


if __name__ == "__main__":
    sys.exit(main())
