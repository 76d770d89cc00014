"""The gain of gradients: how much larger a surrogate makes the gradient of each layer than ReLU does."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import random_seed
from torch import Tensor, nn

import timm_sugar
from lab.files import save_figure


def layers_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights of layers by the layer's name, in the order of the model: of two dimensions or more."""
    return {name.removesuffix(".weight"): p for name, p in model.named_parameters() if p.ndim > 1 and p.requires_grad}


def gradient_gains(model: nn.Module, images: Tensor, labels: Tensor, seed: int = 0) -> dict[str, float]:
    """The norm of each layer's gradient over what it is with ReLU's own derivative, on one batch in training mode.

    The value of the loss is the same in both, and so is what is dropped at random. The model stays as it is.

    Args:
        model: a classifier with SUGAR in it.
        images: a batch on its device.
        labels: their classes.
        seed: of what is dropped.

    Returns:
        A gain (0 or more) for each layer that has a gradient with ReLU.
    """
    model = copy.deepcopy(model).train()
    layers = layers_of(model)
    norms = []
    for derivative in (nullcontext(), timm_sugar.relu_gradient()):
        random_seed(seed)
        with derivative:
            loss = F.cross_entropy(model(images), labels)
            gradients = torch.autograd.grad(loss, list(layers.values()), allow_unused=True)
        norms.append([0.0 if gradient is None else gradient.norm().item() for gradient in gradients])
    return {name: sugar / relu for name, sugar, relu in zip(layers, *norms, strict=True) if relu}


def describe(gains: Mapping[str, float]) -> str:
    """One line: the largest and the last gain."""
    largest = max(gains, key=lambda name: gains[name])
    last = list(gains)[-1]
    return (
        f"gradients over ReLU's by layer: {gains[largest]:.2f} times at most ({largest}), "
        f"{gains[last]:.2f} in the last ({last})"
    )


def draw_gains(rows: list[dict[str, Any]], path: Path) -> None:
    """Gains by depth, one line a model; `rows` have model, layer and gain."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for model, marker in zip(dict.fromkeys(row["model"] for row in rows), "os", strict=False):
        gains = [row["gain"] for row in rows if row["model"] == model]
        axes.plot(gains, f"-{marker}", markersize=4, label=model)
    axes.axhline(1, color="gray", linewidth=0.8, linestyle=":")
    axes.set(title="gradient norm over ReLU's", xlabel="layer, by depth", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
