#!/usr/bin/env python3
"""The loss around a model's weights along two random, filter-normalised directions, for one model or two on one scale.

    python scripts/landscape.py --data-dir DATA --checkpoint output/train/RUN
    python scripts/landscape.py --data-dir DATA --compare output/train/SUGAR output/train/RELU --images 512

Each point of the grid is the mean cross-entropy of --images images (Li et al. 2018, arXiv 1712.09913; batch
normalisation keeps its statistics). Numbers as CSV and a picture go to --output.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lab.cli import Parser, UserError, explained
from lab.experiments.landscape import landscape
from lab.files import save_figure, write_atomically
from lab.training.groups import SEED, n, x
from lab.training.loading import add_compare, add_options, each_model
from matplotlib.figure import Figure
from tqdm import tqdm


def build_parser() -> Parser:
    """All options; those that name model and data are the ones of scripts/evaluate.py."""
    parser = Parser("landscape.py", description=__doc__)
    add_options(parser)
    add_compare(parser, images=512)
    add = parser.add_argument
    add("--points", **n(3, 999, default=21), help="of the grid, to a side (default: %(default)s)")
    add("--span", **x(above=0, default=1.0), help="from -X to X, 1 being the weights' length (default: 1)")
    add("--seed", type=SEED, default=0, metavar="N", help="of the directions (default: %(default)s)")
    add("--output", type=Path, default=Path("output/landscape"), metavar="DIR", help="(default: %(default)s)")
    return parser


def write_csv(losses: dict[str, torch.Tensor], steps: list[float], path: Path) -> None:
    """One row per model and point."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "first", "second", "loss"])
    for name, grid in losses.items():
        for (i, a), (j, b) in itertools.product(enumerate(steps), repeat=2):
            writer.writerow([name, f"{a:.4g}", f"{b:.4g}", f"{grid[i, j]:.6g}"])
    write_atomically(path, text.getvalue())


def draw(losses: dict[str, torch.Tensor], steps: list[float], path: Path) -> None:
    """Contours side by side, with the same levels (logarithmic) and colours."""
    low = min(float(grid[grid.isfinite()].min()) for grid in losses.values())
    high = max(float(grid[grid.isfinite()].max()) for grid in losses.values())
    low = max(low, 1e-3)
    levels = np.geomspace(low, max(high, 2e-3, 1.01 * low), 20)
    figure = Figure(figsize=(5.2 * len(losses) + 0.8, 4.6), layout="constrained")
    panels = figure.subplots(1, len(losses), squeeze=False)[0]
    for axes, (name, grid) in zip(panels, losses.items(), strict=True):
        colours = axes.contourf(steps, steps, grid.clamp(levels[0], levels[-1]).numpy(), levels, norm="log")
        axes.set(title=name, aspect="equal", xlabel="second direction", ylabel="first direction")
    figure.colorbar(colours, ax=list(panels), label="cross-entropy", format="%.2g")
    save_figure(figure, path)


def run(args: argparse.Namespace) -> None:
    """Compute the landscape of one model or two, and write what came out."""
    if args.points % 2 == 0:
        raise UserError(f"--points must be odd, so that the weights are one of them, not {args.points}")
    steps = [float(x) for x in np.linspace(-args.span, args.span, args.points)]
    losses = {}
    for name, model, loader in each_model(args):
        batches = list(loader)
        with tqdm(total=args.points**2, unit="point", leave=False, disable=not sys.stderr.isatty()) as bar:
            losses[name] = landscape(model, batches, steps, seed=args.seed, progress=lambda n: bar.update(n - bar.n))
        grid = losses[name]
        if not grid.isfinite().any():
            raise UserError(f"the loss of {name} is finite nowhere: are its weights?")
        centre = args.points // 2
        print(f"loss {grid.min():.4f} to {grid.max():.4f}, at the weights {grid[centre, centre]:.4f}")
    with explained(f"can't write to {args.output}"):
        args.output.mkdir(parents=True, exist_ok=True)
        write_csv(losses, steps, args.output / "landscape.csv")
        draw(losses, steps, args.output / "landscape.png")
    print(f"\nnumbers  {args.output / 'landscape.csv'}\npicture  {args.output / 'landscape.png'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 130 after Ctrl-C. A user's mistake exits with status 2 and one line on stderr."""
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
