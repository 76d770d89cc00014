"""What the hidden activations of a model do on data: dead, dormant and reached units, zeros, pre-activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from timm_sugar.surgery import is_activation

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
DORMANT = 0.025  # the smaller of the thresholds tau in ReDo (Sokar et al. 2023, arXiv 2302.12902)


class Layer:
    """Counts of one activation over all data so far. Shares lie in 0..1; what was not recorded is NaN.

    `active` marks the units that were ever > 0 (shape: units). What `diagnose` adds: `magnitude`, the sum of |output|
    of each unit; `reached`, whether a gradient other than 0 ever came to its pre-activation; `mean` of all
    pre-activations.
    """

    def __init__(self, units: int, device: torch.device) -> None:
        self.active = torch.zeros(units, dtype=torch.bool, device=device)
        self.zeros = torch.zeros((), dtype=torch.long, device=device)
        self.elements = 0
        self.magnitude: Tensor | None = None
        self.reached: Tensor | None = None
        self.mean, self._squares, self._inputs = math.nan, math.nan, 0  # squares: sum of squared deviations

    @property
    def units(self) -> int:
        """How many there are: channels of a feature map, features of a token."""
        return self.active.numel()

    @property
    def dead(self) -> float:
        """Share of units that were never active."""
        return 1 - self.active.float().mean().item()

    @property
    def sparsity(self) -> float:
        """Share of outputs that are exactly zero."""
        return self.zeros.item() / self.elements

    @property
    def flow(self) -> float:
        """Share of units that got a gradient."""
        return math.nan if self.reached is None else self.reached.float().mean().item()

    @property
    def spread(self) -> float:
        """Standard deviation of all pre-activations."""
        return math.sqrt(self._squares / self._inputs) if self._inputs else math.nan

    def dormant(self, tau: float = DORMANT) -> float:
        """Share of units whose mean |output| is at most `tau` (0 or more) times the mean over the layer's units."""
        if self.magnitude is None:
            return math.nan
        return (self.magnitude <= tau * self.magnitude.mean()).float().mean().item()

    def _add_output(self, output: Tensor, others: list[int], detailed: bool) -> None:
        self.active = self.active | (output.amax(others) > 0)
        self.zeros = self.zeros + (output.numel() - output.count_nonzero())
        self.elements += output.numel()
        if detailed:
            magnitude = output.float().abs().sum(others).cpu().double()  # not every device has float64
            self.magnitude = magnitude if self.magnitude is None else self.magnitude + magnitude

    def _add_input(self, x: Tensor) -> None:
        """Merge means and squared deviations, as in Chan, Golub and LeVeque 1983."""
        variance, mean = (moment.item() for moment in torch.var_mean(x.float(), correction=0))
        count, before = x.numel(), self._inputs
        self._inputs += count
        gap = mean - self.mean if before else 0.0
        self.mean = self.mean + gap * count / self._inputs if before else mean
        self._squares = variance * count + (self._squares + gap**2 * before * count / self._inputs if before else 0.0)

    def _add_gradient(self, others: list[int], grad: Tensor) -> None:
        reached = (grad.reshape(1, -1) if grad.ndim == 1 else grad).count_nonzero(others) > 0
        self.reached = reached if self.reached is None else self.reached | reached


class Activations:
    """Running counts by layer; memory is a few numbers per unit, however much data passes.

    `layers` maps an activation's module name to its counts. A module that is called several times in one forward pass
    has one entry per call: `name`, `name#2`, ... `str()` is a table of all of them.
    """

    def __init__(self, detailed: bool = False, tau: float = DORMANT) -> None:
        self.layers: dict[str, Layer] = {}
        self.tau = tau
        self._detailed = detailed
        self._calls: dict[str, int] = {}
        self._source: tuple[int, int] = (1, -1)  # channel dimension and size of the last convolution or linear layer
        self._open: list[tuple[Layer, list[int]]] = []  # activations that were entered and not left yet

    def _share(self, of_layer: Callable[[Layer], float]) -> float:
        units = sum(layer.units for layer in self.layers.values())
        return sum(of_layer(layer) * layer.units for layer in self.layers.values()) / units if units else math.nan

    @property
    def dead(self) -> float:
        """Share of all hidden units that were never active (> 0) on the data, 0..1; NaN before any data."""
        return self._share(lambda layer: layer.dead)

    @property
    def sparsity(self) -> float:
        """Share of all hidden activations that are exactly zero, 0..1; NaN before any data."""
        elements = sum(layer.elements for layer in self.layers.values())
        return sum(int(layer.zeros) for layer in self.layers.values()) / elements if elements else math.nan

    @property
    def dormant(self) -> float:
        """Share of all hidden units that are tau-dormant in their layer, 0..1; NaN if that was not recorded."""
        return self._share(lambda layer: layer.dormant(self.tau))

    @property
    def flow(self) -> float:
        """Share of all hidden units that got a gradient, 0..1; NaN if none was computed."""
        return self._share(lambda layer: layer.flow)

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer in the order of the forward pass, and the `total`: numbers as in `Layer`."""
        rows: list[dict[str, Any]] = [
            {
                **{"layer": name, "units": layer.units, "dead": layer.dead, "dormant": layer.dormant(self.tau)},
                **{"zeros": layer.sparsity, "gradient": layer.flow, "mean": layer.mean, "spread": layer.spread},
            }
            for name, layer in self.layers.items()
        ]
        total = {"layer": "total", "units": sum(row["units"] for row in rows), "dead": self.dead}
        shares = {"dormant": self.dormant, "zeros": self.sparsity, "gradient": self.flow}
        return [*rows, {**total, **shares, "mean": math.nan, "spread": math.nan}]

    def __str__(self) -> str:
        """Shares in percent, pre-activations as they are."""
        width = max(len(name) for name in [*self.layers, "total"])
        title = f"{'layer':{width}}{'units':>8}{'dead %':>9}{'dormant %':>11}{'zeros %':>9}{'gradient %':>12}"
        lines = [title + f"{'mean':>9}{'spread':>9}"]
        for row in self.rows():
            dead, dormant, zeros, gradient = (100 * row[key] for key in ("dead", "dormant", "zeros", "gradient"))
            line = f"{row['layer']:{width}}{row['units']:>8}{dead:9.2f}{dormant:11.2f}{zeros:9.2f}{gradient:12.2f}"
            lines.append((line + f"{row['mean']:9.3f}{row['spread']:9.3f}").replace("nan", "  -"))
        return "\n".join(lines)

    def reduce(self) -> None:
        """Merge `active` and `zeros` of all processes of a torch.distributed group: each then has the whole data's."""
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

    def _unit_dim(self, x: Tensor) -> int:
        """Dimension of the units: where the last weight layer has its channels, unless the size says it was moved."""
        dim, size = self._source
        moved = 1 if dim == -1 else -1
        if x.ndim > 2 and x.shape[dim] != size and x.shape[moved] == size:
            dim = moved
        return dim % x.ndim

    def _enter(self, name: str, x: Tensor) -> None:
        """Before the activation, which may overwrite its input."""
        if torch._C._current_graph_task_id() != -1:  # a backward pass computes a checkpointed layer again
            return
        self._calls[name] = call = self._calls.get(name, 0) + 1
        key = name if call == 1 else f"{name}#{call}"
        units = self._unit_dim(x)
        others = [d for d in range(x.ndim) if d != units] or [0]  # a single vector becomes a batch of one
        layer = self.layers.get(key)
        if layer is None or layer.units != x.shape[units]:
            layer = self.layers[key] = Layer(x.shape[units], x.device)
        if self._detailed:
            layer._add_input(x.detach())
            if x.requires_grad:
                x.register_hook(partial(layer._add_gradient, others))
        self._open.append((layer, others))

    def _leave(self, output: Tensor) -> None:
        if torch._C._current_graph_task_id() != -1:
            return
        layer, others = self._open.pop()
        layer._add_output((output[None] if output.ndim == 1 else output).detach(), others, self._detailed)


@contextmanager
def watch(model: nn.Module, detailed: bool = False, tau: float = DORMANT) -> Iterator[Activations]:
    """Count dead units and zeros of a model's hidden activations in every forward pass inside the `with` block.

    A unit is a channel of a feature map or a feature of a token; dead means never > 0. With `detailed`, what `diagnose`
    reports is recorded too. The counts stay readable after the block, the hooks do not outlive it. Activations that a
    `forward` calls as plain functions are not seen.
    """
    activations = Activations(detailed, tau)
    hooks = [model.register_forward_pre_hook(activations._new_pass)]
    for name, module in model.named_modules():
        if is_activation(module):
            enter = lambda _m, x, name=name: activations._enter(name, x[0])  # noqa: E731
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(lambda _m, _x, output: activations._leave(output)))
        elif isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
            hooks.append(module.register_forward_hook(activations._remember_source))
    try:
        yield activations
    finally:
        for handle in hooks:
            handle.remove()


def diagnose(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    tau: float = DORMANT,
    criterion: Callable[[Any, Any], Tensor] | None = F.cross_entropy,
) -> Activations:
    """What each hidden activation of a model does on data, in one pass over `loader` in eval mode.

    For each layer and in total: dead units (never > 0), tau-dormant units (mean |output| at most `tau` times the
    layer's; ReDo, Sokar et al. 2023), zeros, mean and spread of pre-activations, and gradient flow (the share of units
    at whose pre-activation the gradient of `criterion(output, target)` is not 0 for all the data: under ReLU a dead
    unit gets none, under SUGAR it does). `loader` yields pairs of a batch and its targets, or, if `criterion` is None,
    batches alone; then there is no gradient flow. The model is left as it was: modes, gradients, hooks.

    Raises ValueError for an empty loader, a negative tau, batches without targets, and a model in which no hidden
    activation is a module.
    """
    if not tau >= 0:
        raise ValueError(f"tau must be 0 or more, not {tau}")
    modes = [(module, module.training) for module in model.modules()]
    empty = True
    try:
        with watch(model.eval(), True, tau) as activations, torch.set_grad_enabled(criterion is not None):
            for batch in loader:
                empty = False
                _pass(model, batch, criterion)
    finally:
        for module, mode in modes:
            module.training = mode
    if not activations.layers:
        why = "the loader is empty" if empty else "no hidden activation of the model is a module"
        raise ValueError(f"nothing to diagnose: {why}")
    return activations


def _pass(model: nn.Module, batch: Any, criterion: Callable[[Any, Any], Tensor] | None) -> None:
    """Forward, and backward if there is a criterion, without a change to any .grad."""
    x, target = batch if isinstance(batch, (tuple, list)) else (batch, None)
    weights = list(model.parameters())
    device = weights[0].device if weights else x.device
    x = x.to(device).detach()
    if criterion is None:
        model(x)
        return
    if target is None:
        raise ValueError("no targets for the loss: give pairs of a batch and its targets, or criterion=None")
    start = [p for p in weights if p.requires_grad]
    if x.is_floating_point():
        start.append(x.requires_grad_())  # so that the gradient passes through frozen layers too
    torch.autograd.grad(criterion(model(x), target.to(device)), start, allow_unused=True)
