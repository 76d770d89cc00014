#!/usr/bin/env python3
"""Draw the pictures of README and docs from the package's own functions and from results/.

    python scripts/figures.py

Writes surrogates-light.svg and surrogates-dark.svg: the forward pass of a SUGAR unit, and beside it the derivatives
that stand in for ReLU's in the backward pass, as autograd returns them. cost-light.svg and cost-dark.svg: the time of
one activation against its size, from results/benchmark_activation.csv. inside-light.svg and inside-dark.svg: the way of
a tensor through a SUGAR unit. surrogate-NAME-light.svg and surrogate-NAME-dark.svg: the derivative of one surrogate.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import torch
from lab.bench.cost import MACHINE, Row, of_default
from lab.bench.cost import TITLES as VARIANTS
from lab.cli import Parser, explained
from lab.files import read_rows, write_atomically
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from timm_sugar import sugar
from timm_sugar.surrogate import get_surrogate, list_surrogates

# In the order of drawing, left to right and top to bottom.
TITLES = {
    "bsilu": "B-SiLU",
    "gelu": "GELU",
    "silu": "SiLU",
    "mish": "Mish",
    "selu": "SELU",
    "elu": "ELU",
    "leaky_relu": "LeakyReLU",
    "nelu": "NeLU",
}
SYMBOLS = {"alpha": "α", "negative_slope": "slope"}
INPUTS = torch.cat([torch.linspace(-4, 0, 65), torch.tensor([1e-6]), torch.linspace(0, 3, 49)[1:]]).double()


RESULTS = Path(__file__).resolve().parents[1] / "results" / "benchmark_activation.csv"
DASHES = {"gelu": (0, ()), "function": (0, (6, 1.5)), "fgi": (0, (3, 1.5)), "detach": (0, (1, 1))}


@dataclass(frozen=True)
class Theme:
    """Colours that suit one of GitHub's backgrounds."""

    text: str
    faint: str
    forward: str
    backward: str


THEMES = {
    "light": Theme(text="#1f2328", faint="#8c959f", forward="#0969da", backward="#bc4c00"),
    "dark": Theme(text="#e6edf3", faint="#7d8590", forward="#58a6ff", backward="#ffa657"),
}


def gradient(surrogate: str) -> Tensor:
    """What autograd returns for sugar(x) at INPUTS."""
    x = INPUTS.clone().requires_grad_()
    return torch.autograd.grad(sugar(x, surrogate).sum(), x)[0]


def label(surrogate: str) -> str:
    """The surrogate's name with its default parameters."""
    parameters = get_surrogate(surrogate).parameters.items()
    return ", ".join([TITLES[surrogate], *(f"{SYMBOLS[key]} = {value:g}" for key, value in parameters)])


def style(axes: Axes, theme: Theme) -> None:
    """Two thin lines through the origin, and no box."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(position="zero", color=theme.faint, linewidth=0.6)
    axes.tick_params(length=0, labelsize=8, labelcolor=theme.faint, pad=2)
    axes.patch.set_visible(False)


def draw_forward(axes: Axes, theme: Theme) -> None:
    """The value of a SUGAR unit."""
    style(axes, theme)
    axes.set(xlim=(-4, 3), ylim=(-0.55, 3.1), xticks=[-3, 3], yticks=[3])

    (line,) = axes.plot(INPUTS, sugar(INPUTS), color=theme.forward, linewidth=2.6, solid_capstyle="round")
    line.set_gid("relu")
    axes.text(1.5, 1.9, "relu(x)", color=theme.forward, fontsize=11, ha="right")


def draw_backward(axes: Axes, theme: Theme, surrogate: str) -> None:
    """One surrogate's derivative over ReLU's; shaded where they differ."""
    style(axes, theme)
    axes.set(xlim=(-4, 3), ylim=(-0.3, 1.85), xticks=[], yticks=[])
    slope, step = gradient(surrogate), (INPUTS > 0).double()
    axes.fill_between(INPUTS, slope, step, color=theme.backward, alpha=0.16, linewidth=0)
    axes.plot(INPUTS, step, color=theme.faint, linewidth=1.1, linestyle=(0, (2.5, 2)))
    (line,) = axes.plot(INPUTS, slope, color=theme.backward, linewidth=2, solid_joinstyle="round")
    line.set_gid(surrogate)
    axes.text(3.05, 1, "1", color=theme.faint, fontsize=8, va="center")


def draw(theme: Theme) -> Figure:
    """The whole picture; positions are fixed, so that it comes out the same everywhere."""
    figure = Figure(figsize=(9.6, 3.5))
    figure.text(0.155, 0.93, "forward: ReLU", color=theme.text, fontsize=12, ha="center", weight="bold")
    figure.text(0.66, 0.93, "backward: a surrogate's derivative", color=theme.text, fontsize=12, ha="center",
                weight="bold")  # fmt: skip
    draw_forward(figure.add_axes((0.015, 0.12, 0.28, 0.74)), theme)
    for i, surrogate in enumerate(TITLES):
        row, column = divmod(i, 4)
        box = (0.335 + 0.165 * column, 0.535 - 0.425 * row, 0.145, 0.32)
        axes = figure.add_axes(box)
        draw_backward(axes, theme, surrogate)
        axes.set_title(label(surrogate), color=theme.text, fontsize=9, pad=3)
    figure.text(0.66, 0.035, "dashed: ReLU's own derivative, which is 0 for every negative input", color=theme.faint,
                fontsize=9, ha="center")  # fmt: skip
    return figure


def draw_surrogate(theme: Theme, surrogate: str) -> Figure:
    """The small picture of one surrogate."""
    figure = Figure(figsize=(2.2, 1.3))
    axes = figure.add_axes((0.02, 0.06, 0.9, 0.9))
    draw_backward(axes, theme, surrogate)
    axes.set(xticks=[-3, 3])
    axes.tick_params(axis="x", pad=5)  # below every curve
    return figure


def draw_times(axes: Axes, theme: Theme, rows: list[Row]) -> None:
    """Time over ReLU's against the number of elements, a line a variant; quartiles of SUGAR and GELU are shaded."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.axhline(1, color=theme.faint, linewidth=1.1, linestyle=(0, (2.5, 2)))
    for mode, variant in dict.fromkeys((row["mode"], row["variant"]) for row in rows):
        if variant == "relu" or (mode != "eager" and variant != "sugar"):
            continue
        line = [row for row in rows if (row["mode"], row["variant"]) == (mode, variant)]
        line.sort(key=lambda row: int(row["size"]))
        sizes = [int(row["size"]) for row in line]
        low, middle, high = ([float(row[key]) for row in line] for key in ("to_relu_q1", "to_relu", "to_relu_q3"))
        color = {"sugar": theme.backward, "gelu": theme.forward}.get(variant, theme.faint)
        if variant in ("sugar", "gelu"):
            axes.fill_between(sizes, low, high, color=color, alpha=0.16, linewidth=0)
        dash = DASHES.get(variant, (0, ())) if mode == "eager" else (0, (2, 1))
        (curve,) = axes.plot(sizes, middle, color=color, linewidth=2.4 if variant == "sugar" else 1.3, linestyle=dash)
        curve.set_gid(f"{variant}_{mode}_{line[0]['dtype']}".replace(", ", "_").replace(" ", "_"))
        curve.set_label(VARIANTS[variant] + mode.removeprefix("eager"))


def draw_cost(theme: Theme) -> Figure:
    """The cost of one activation, forward and backward, on the first machine of the results."""
    passes = (row for row in of_default(read_rows(RESULTS)) if row["metric"] == "pass")
    rows = [row for row in passes if row["mode"].startswith("eager")]
    rows = [row for row in rows if all(row[key] == rows[0][key] for key in MACHINE)]
    figure = Figure(figsize=(9.6, 3.6))
    for i, dtype in enumerate(dict.fromkeys(row["dtype"] for row in rows)):
        axes = figure.add_axes((0.06 + 0.37 * i, 0.14, 0.32, 0.72), sharey=figure.axes[0] if figure.axes else None)
        axes.patch.set_visible(False)
        axes.tick_params(length=0, labelsize=8, labelcolor=theme.faint, which="both")
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_title(f"{dtype}: time, ReLU = 1", color=theme.text, fontsize=10)
        axes.set_xlabel("elements", color=theme.faint, fontsize=9)
        draw_times(axes, theme, [row for row in rows if row["dtype"] == dtype])
    handles = figure.axes[-1].get_legend_handles_labels() if rows else ([], [])
    figure.legend(*handles, loc="center left", bbox_to_anchor=(0.8, 0.5), frameon=False,
                  fontsize=9, labelcolor=theme.text)  # fmt: skip
    return figure


def draw_box(axes: Axes, theme: Theme, x: float, y: float, text: str, color: str) -> None:
    """A labelled box around a point."""
    box = {"boxstyle": "round,pad=0.55", "edgecolor": color, "facecolor": "none", "linewidth": 1.4}
    axes.text(x, y, text, color=theme.text, fontsize=11, ha="center", va="center", bbox=box)


def draw_arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, dashed: bool = False
) -> None:
    """An arrow from one point to another."""
    line = {"arrowstyle": "-|>", "color": color, "linewidth": 1.6, "linestyle": (0, (3, 2)) if dashed else "-"}
    axes.annotate("", xy=end, xytext=start, arrowprops=line)


def draw_inside(theme: Theme) -> Figure:
    """The way of a tensor through a SUGAR unit: forward above, backward below, what is kept between them."""
    figure = Figure(figsize=(9.6, 3.4))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 9.6), ylim=(0, 3.4))
    axes.axis("off")
    for y, color, title in ((2.45, theme.forward, "forward"), (0.8, theme.backward, "backward")):
        axes.text(0.25, y + 0.62, title, color=color, fontsize=12, weight="bold", va="center")
        draw_box(axes, theme, 1.1, y, "layer before", theme.faint)
        draw_box(axes, theme, 8.5, y, "layer behind", theme.faint)
    draw_box(axes, theme, 4.8, 2.45, "relu(x)", theme.forward)
    draw_box(axes, theme, 4.8, 0.8, "gradient × f '(x)", theme.backward)
    for start, end, label in ((1.85, 4.2, "x"), (5.4, 7.75, "y = relu(x)")):
        draw_arrow(axes, (start, 2.45), (end, 2.45), theme.forward)
        axes.text((start + end) / 2, 2.6, label, color=theme.forward, fontsize=10, ha="center", va="bottom")
    for start, end, label in ((7.75, 5.8, "gradient of y"), (3.8, 1.85, "gradient of x")):
        draw_arrow(axes, (start, 0.8), (end, 0.8), theme.backward)
        axes.text((start + end) / 2, 0.65, label, color=theme.backward, fontsize=10, ha="center", va="top")
    draw_arrow(axes, (3.0, 2.4), (4.55, 1.1), theme.faint, dashed=True)
    axes.text(3.15, 1.65, "x is kept", color=theme.faint, fontsize=10, ha="right")
    draw_arrow(axes, (3.0, 2.4), (8.2, 1.1), theme.faint, dashed=True)
    axes.text(6.6, 1.78, "shared memory: relu(x) once more", color=theme.faint, fontsize=10, ha="left")
    return figure


PICTURES: dict[str, Callable[[Theme], Figure]] = {"surrogates": draw, "cost": draw_cost, "inside": draw_inside}
PICTURES |= {f"surrogate-{name}": partial(draw_surrogate, surrogate=name) for name in list_surrogates()}


def run(args: argparse.Namespace) -> None:
    """Draw them all."""
    metadata = {"Date": None} if args.format == "svg" else None
    with explained(f"can't write to {args.output}"):
        args.output.mkdir(parents=True, exist_ok=True)
        for (picture, draw_picture), (name, theme) in itertools.product(PICTURES.items(), THEMES.items()):
            path, content = args.output / f"{picture}-{name}.{args.format}", io.BytesIO()
            with matplotlib.rc_context({"svg.hashsalt": "timm_sugar", "font.family": "DejaVu Sans"}):
                draw_picture(theme).savefig(content, format=args.format, transparent=True, metadata=metadata, dpi=150)
            write_atomically(path, content.getvalue())
            print(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 130 after Ctrl-C. A user's mistake exits with status 2 and one line on stderr."""
    parser = Parser("figures.py", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--format", default="svg", choices=("svg", "png"), help="(default: %(default)s)")
    return parser.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
