#!/usr/bin/env python3
"""Draw the README's picture from the package's own functions.

    python scripts/figures.py

Writes surrogates-light.svg and surrogates-dark.svg: the forward pass of a SUGAR unit, and beside it the derivatives
that stand in for ReLU's in the backward pass, as autograd returns them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from timm_sugar import sugar
from timm_sugar.cli import Parser
from timm_sugar.surrogate import get_surrogate

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
    axes.set_title(label(surrogate), color=theme.text, fontsize=9, pad=3)
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
        draw_backward(figure.add_axes(box), theme, surrogate)
    figure.text(0.66, 0.035, "dashed: ReLU's own derivative, which is 0 for every negative input", color=theme.faint,
                fontsize=9, ha="center")  # fmt: skip
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0. A user's mistake exits with status 2 and one line on stderr."""
    parser = Parser("figures.py", description=__doc__)
    parser.add_argument("--output", default="figures", metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--format", default="svg", choices=("svg", "png"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        Path(args.output).mkdir(parents=True, exist_ok=True)
        for name, theme in THEMES.items():
            path = Path(args.output, f"surrogates-{name}.{args.format}")
            with matplotlib.rc_context({"svg.hashsalt": "timm_sugar", "font.family": "DejaVu Sans"}):
                metadata = {"Date": None} if args.format == "svg" else None
                draw(theme).savefig(path, transparent=True, metadata=metadata, dpi=150)
            print(path)
    except OSError as error:
        parser.error(f"can't write to {args.output}: {error.strerror or error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
