"""Pictures of results/: each run and the epochs of a table, and activations by depth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.experiments.paired import by_seed, level
from lab.experiments.rows import done_epochs, done_rows, load_rows
from lab.experiments.table import Table
from lab.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {"dead": "dead units (%)", "zeros": "exact zeros (%)", "gradient": "units with a gradient (%)"}


def write_picture(table: Table, results: Path) -> None:
    """Draw results/TABLE.png: top-1 of every run, and over the epochs top-1 and dead units.

    Over the epochs these are means over the seeds, in bands of their standard deviation. Nothing is drawn while no run
    is done.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # here, since it takes long to import

    rows, epochs = done_rows(load_rows(table, results)), done_epochs(table, results)
    variants = [name for name in table.variants if by_seed(rows, name, "top1")]
    if not variants:
        return
    figure = Figure(figsize=(13, max(3.4, 0.28 * len(variants) + 1.2)), layout="constrained")
    figure.suptitle(table.title)
    dots, accuracy, dead = figure.subplots(1, 3)
    colors = colormaps["tab10" if len(variants) <= 10 else "tab20"](range(len(variants)))
    for i, (name, color) in enumerate(zip(variants, colors, strict=True)):
        values = list(by_seed(rows, name, "top1").values())
        dots.plot(values, [i] * len(values), "o", alpha=0.5, color=color)
        dots.plot([level(rows, name).mean], [i], "|", markersize=16, color="black")
        draw_epochs(accuracy, epochs, name, "top1", 1, color)
        draw_epochs(dead, epochs, name, "dead_units", 100, color)
    if table.baseline in variants:
        dots.axvline(level(rows, table.baseline).mean, color="gray", linewidth=0.8, linestyle=":")
    dots.set(yticks=range(len(variants)), yticklabels=variants, xlabel="top-1 (%), each run and the mean")
    dots.set_ylim(len(variants) - 0.5, -0.5)
    for tick, color in zip(dots.get_yticklabels(), colors, strict=True):
        tick.set_color(color)
    accuracy.set(xlabel="epoch", ylabel="top-1 (%)")
    most = max(1.0, dead.get_ylim()[1])  # where none is dead, there is no range to show
    dead.set(xlabel="epoch", ylabel="dead units (%)", ylim=(-0.03 * most, most))
    for axes in (accuracy, dead):
        axes.locator_params("x", integer=True)
    save_figure(figure, results / f"{table.name}.png")


def draw_epochs(axes: Axes, epochs: list[dict[str, Any]], variant: str, column: str, factor: float, color: Any) -> None:
    """The mean of a column over the seeds, by epoch, in a band of its standard deviation; nothing without numbers."""
    numbers = sorted({int(row["epoch"]) for row in epochs if row["variant"] == variant})
    levels = [level([row for row in epochs if row["epoch"] == str(epoch)], variant, column) for epoch in numbers]
    found = [(epoch + 1, one) for epoch, one in zip(numbers, levels, strict=True) if math.isfinite(one.mean)]
    if not found:
        return
    x, means = [epoch for epoch, _ in found], [factor * one.mean for _, one in found]
    axes.plot(x, means, ".-", color=color, label=variant)
    width = [factor * one.spread if math.isfinite(one.spread) else 0.0 for _, one in found]
    low, high = ([mean + sign * w for mean, w in zip(means, width, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def draw_depth(rows: list[dict[str, str]], path: Path) -> None:
    """Shares by depth, one panel each, all models in each panel; `rows` as scripts/diagnose.py writes them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    models = list(dict.fromkeys(row["model"] for row in rows))
    for axes, (key, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for model, marker in zip(models, "os", strict=False):
            shares = [100 * float(row[key]) for row in rows if row["model"] == model and row["layer"] != "total"]
            axes.plot(shares, f"-{marker}", markersize=4, label=model)
        axes.set(title=title, xlabel="activation, by depth", ylim=(-3, 103))
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    save_figure(figure, path)
