#!/usr/bin/env python3
"""What the hidden activations of a model do on labelled images: a table, a CSV and a picture, for one model or two.

    python scripts/diagnose.py --data-dir DATA --checkpoint output/train/RUN
    python scripts/diagnose.py --data-dir DATA --model resnet18_sugar.a1_in1k --images 1000
    python scripts/diagnose.py --data-dir DATA --compare output/train/SUGAR output/train/RELU

Per layer and in total: dead units (never above 0), dormant units (ReDo's score at most --tau), exact zeros, units that
get a gradient, mean and spread of pre-activations. A unit is a channel of a feature map or a feature of a token. With
SUGAR also how large the gradient of each layer's weights is over what it is with ReLU's derivative, on the first batch.
Tables and pictures go to --output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.cli import Parser, explained
from lab.experiments.gains import describe, draw_gains, gradient_gains
from lab.experiments.pictures import draw_depth
from lab.files import write_rows
from lab.training.groups import x
from lab.training.loading import add_compare, add_options, each_model
from tqdm import tqdm

import timm_sugar
from timm_sugar.diagnostics import DORMANT, Activations


def build_parser() -> Parser:
    """All options; those that name model and data are the ones of scripts/evaluate.py."""
    parser = Parser("diagnose.py", description=__doc__)
    add_options(parser)
    add_compare(parser, images=None)
    add = parser.add_argument
    add("--tau", **x(0, default=DORMANT), help="0 or more (default: %(default)s)")
    add("--output", type=Path, default=Path("output/diagnose"), metavar="DIR", help="(default: %(default)s)")
    return parser


def rows_of(reports: dict[str, Activations]) -> list[dict[str, str]]:
    """All rows of all models as they stand in the CSV; shares as 0..1."""
    rows = [{"model": name, **row} for name, report in reports.items() for row in report.rows()]
    return [{key: f"{v:.6g}" if isinstance(v, float) else str(v) for key, v in row.items()} for row in rows]


def run(args: argparse.Namespace) -> None:
    """Diagnose one model or two, and write what came out."""
    reports, gains = {}, []
    for name, model, loader in each_model(args):
        batches = tqdm(loader, leave=False, disable=not sys.stderr.isatty())
        with explained(f"can't diagnose {name}"):
            reports[name] = timm_sugar.diagnose(model, batches, tau=args.tau)
        print(reports[name], flush=True)
        if any(isinstance(module, timm_sugar.SUGAR) for module in model.modules()):
            try:
                found = gradient_gains(model, *next(iter(loader)))
            except (ValueError, RuntimeError) as error:  # as of BatchNorm for a batch of one image
                print(f"no gains of gradients: {error}; try a larger --batch-size", flush=True)
                continue
            if not found:
                print("no gains of gradients: with ReLU no layer has one", flush=True)
                continue
            print(describe(found), flush=True)
            gains += [{"model": name, "layer": layer, "gain": gain} for layer, gain in found.items()]
    with explained(f"can't write to {args.output}"):
        rows = rows_of(reports)
        write_rows(args.output / "activations.csv", rows, list(rows[0]))
        draw_depth(rows, args.output / "activations.png")
        if gains:
            write_rows(
                args.output / "gains.csv", [{**row, "gain": f"{row['gain']:.6g}"} for row in gains], list(gains[0])
            )
            draw_gains(gains, args.output / "gains.png")
    for name in ("activations", *(["gains"] if gains else [])):
        print(f"\nnumbers  {args.output / name}.csv\npicture  {args.output / name}.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 130 after Ctrl-C. A user's mistake exits with status 2 and one line on stderr."""
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
