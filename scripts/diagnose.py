#!/usr/bin/env python3
"""What the hidden activations of a model do on labelled images: a table, a CSV and a picture, for one model or two.

    python scripts/diagnose.py --data-dir DATA --checkpoint output/train/RUN
    python scripts/diagnose.py --data-dir DATA --model resnet18_sugar.a1_in1k --images 1000
    python scripts/diagnose.py --data-dir DATA --compare output/train/SUGAR output/train/RELU

Per layer and in total: dead units (never above 0), dormant units (ReDo's score at most --tau), exact zeros, units that
get a gradient, mean and spread of pre-activations. A unit is a channel of a feature map or a feature of a token. The
CSV and the picture go to --output.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

import timm_sugar
from timm_sugar.cli import Parser, explained
from timm_sugar.diagnose import DORMANT, Activations
from timm_sugar.loading import add_compare, add_options, each_model
from timm_sugar.runs import save_figure, write_atomically

PANELS = {"dead": "dead units (%)", "zeros": "exact zeros (%)", "gradient": "units with a gradient (%)"}


def build_parser() -> Parser:
    """All options; those that name model and data are the ones of scripts/evaluate.py."""
    parser = Parser("diagnose.py", description=__doc__)
    add_options(parser)
    add_compare(parser, images=None)
    add = parser.add_argument
    add("--tau", type=float, default=DORMANT, metavar="X", help="0 or more (default: %(default)s)")
    add("--output", type=Path, default=Path("output/diagnose"), metavar="DIR", help="(default: %(default)s)")
    return parser


def write_csv(reports: dict[str, Activations], path: Path) -> None:
    """All rows of all models; shares as 0..1."""
    text = io.StringIO()
    rows = [{"model": name, **row} for name, report in reports.items() for row in report.rows()]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    write_atomically(path, text.getvalue())


def draw(reports: dict[str, Activations], path: Path) -> None:
    """Shares by depth, one panel each, all models in each panel."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for (name, report), marker in zip(reports.items(), "os", strict=False):
            axes.plot([100 * row[key] for row in report.rows()[:-1]], f"-{marker}", markersize=4, label=name)
        axes.set(title=title, xlabel="activation, by depth", ylim=(-3, 103))
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    save_figure(figure, path)


def run(args: argparse.Namespace) -> None:
    """Diagnose one model or two, and write what came out."""
    reports = {}
    for name, model, loader in each_model(args):
        batches = tqdm(loader, leave=False, disable=not sys.stderr.isatty())
        with explained(f"can't diagnose {name}"):
            reports[name] = timm_sugar.diagnose(model, batches, tau=args.tau)
        print(reports[name], flush=True)
    with explained(f"can't write to {args.output}"):
        args.output.mkdir(parents=True, exist_ok=True)
        write_csv(reports, args.output / "activations.csv")
        draw(reports, args.output / "activations.png")
    print(f"\nnumbers  {args.output / 'activations.csv'}\npicture  {args.output / 'activations.png'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 130 after Ctrl-C. A user's mistake exits with status 2 and one line on stderr."""
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
