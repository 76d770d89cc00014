"""What the hidden activations of a model do on data: dead units and sparsity, counted while the model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from timm_sugar.surgery import is_activation

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Layer:
    """Counts of one activation over all data so far; `active` marks the units (shape: units) that were ever > 0."""

    active: Tensor
    zeros: Tensor
    elements: int = 0

    @property
    def dead(self) -> float:
        """Share of units that were never active, 0..1."""
        return 1 - self.active.float().mean().item()

    @property
    def sparsity(self) -> float:
        """Share of outputs that are exactly zero, 0..1."""
        return self.zeros.item() / self.elements


class Activations:
    """Running counts by layer; memory is one flag per unit, however much data passes.

    `layers` maps an activation's module name to its counts. A module that is called several times in one forward pass
    has one entry per call: `name`, `name#2`, ...
    """

    def __init__(self) -> None:
        self.layers: dict[str, Layer] = {}
        self._calls: dict[str, int] = {}
        self._source: tuple[int, int] = (1, -1)  # channel dimension and size of the last convolution or linear layer

    @property
    def dead(self) -> float:
        """Share of all hidden units that were never active (> 0) on the data, 0..1; NaN before any data."""
        units = sum(layer.active.numel() for layer in self.layers.values())
        alive = sum(int(layer.active.sum()) for layer in self.layers.values())
        return 1 - alive / units if units else float("nan")

    @property
    def sparsity(self) -> float:
        """Share of all hidden activations that are exactly zero, 0..1; NaN before any data."""
        elements = sum(layer.elements for layer in self.layers.values())
        return sum(int(layer.zeros) for layer in self.layers.values()) / elements if elements else float("nan")

    def reduce(self) -> None:
        """Merge the counts of all processes of a torch.distributed group, so that each holds the whole data's."""
        for layer in self.layers.values():
            active, zeros = layer.active.to(torch.int32), layer.zeros.clone()
            elements = torch.tensor(layer.elements, device=active.device)
            for count in (active, zeros, elements):
                dist.all_reduce(count)
            layer.active, layer.zeros, layer.elements = active > 0, zeros, int(elements)

    def _new_pass(self, *_: Any) -> None:
        self._calls.clear()

    def _remember_source(self, module: nn.Module, _: Any, output: Tensor) -> None:
        dim = 1 if isinstance(module, _CONVOLUTIONS) else -1
        self._source = (dim, output.shape[dim])

    def _unit_dim(self, output: Tensor) -> int:
        """Dimension of the units: where the last weight layer has its channels, unless the size says it was moved."""
        dim, size = self._source
        moved = 1 if dim == -1 else -1
        if output.ndim > 2 and output.shape[dim] != size and output.shape[moved] == size:
            dim = moved
        return dim % output.ndim

    @torch.no_grad()
    def _count(self, name: str, output: Tensor) -> None:
        self._calls[name] = call = self._calls.get(name, 0) + 1
        key = name if call == 1 else f"{name}#{call}"
        units = self._unit_dim(output)
        others = [d for d in range(output.ndim) if d != units]
        active = output.amax(others) > 0 if others else output > 0
        zeros = output.numel() - output.count_nonzero()
        layer = self.layers.get(key)
        if layer is None or layer.active.shape != active.shape:
            layer = self.layers[key] = Layer(active, zeros)
        else:
            layer.active, layer.zeros = layer.active | active, layer.zeros + zeros
        layer.elements += output.numel()


@contextmanager
def watch(model: nn.Module) -> Iterator[Activations]:
    """Count dead units and zeros of a model's hidden activations in every forward pass inside the `with` block.

    A unit is a channel of a feature map or a feature of a token; dead means never > 0. The counts stay readable after
    the block, the hooks do not outlive it. Activations that a `forward` calls as plain functions are not seen.
    """
    activations = Activations()
    hooks = [model.register_forward_pre_hook(activations._new_pass)]
    for name, module in model.named_modules():
        if is_activation(module):
            hook = lambda _m, _x, output, name=name: activations._count(name, output)  # noqa: E731
            hooks.append(module.register_forward_hook(hook))
        elif isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
            hooks.append(module.register_forward_hook(activations._remember_source))
    try:
        yield activations
    finally:
        for handle in hooks:
            handle.remove()
