"""What the hidden activations of a model do on data: dead, dormant and reached units, zeros, pre-activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from timm_sugar import _torch
from timm_sugar._places import find_places, is_activation

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
        self.broken = torch.zeros((), dtype=torch.bool, device=device)  # whether an output was NaN
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
        """Share of units that were never active; NaN if an output was NaN."""
        if self.broken:
            return math.nan
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
        largest = output.amax(others)  # NaN if one is
        self.active = self.active | (largest > 0)
        self.broken = self.broken | largest.isnan().any()
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
            active, zeros, broken = layer.active.to(torch.int32), layer.zeros.clone(), layer.broken.to(torch.int32)
            elements = torch.tensor(layer.elements, device=active.device)
            for count in (active, zeros, elements, broken):
                dist.all_reduce(count)
            layer.active, layer.zeros, layer.elements, layer.broken = active > 0, zeros, int(elements), broken > 0

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
        x = x[None] if x.ndim == 0 else x
        if _torch.in_backward_pass():  # a backward pass computes a checkpointed layer again
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
        if _torch.in_backward_pass():
            return
        layer, others = self._open.pop()
        output = output.reshape(1, -1) if output.ndim < 2 else output
        layer._add_output(output.detach(), others, self._detailed)


def _first(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """What an activation was called with, by position or by name."""
    return inputs[0] if inputs else next(iter(named.values()))


def _tracked_function(function: Callable[..., Tensor], name: str, activations: Activations) -> Callable[..., Tensor]:
    """A function that a model keeps as an attribute, with counts of what it is given and returns."""

    def call(*inputs: Any, **named: Any) -> Tensor:
        activations._enter(name, _first(inputs, named))
        output = function(*inputs, **named)
        activations._leave(output)
        return output

    return call


@contextmanager
def track_activations(model: nn.Module, detailed: bool = False, tau: float = DORMANT) -> Iterator[Activations]:
    """Count dead units and zeros of a model's hidden activations in every forward pass inside the `with` block.

    A unit is a channel of a feature map or a feature of a token; dead means never > 0. Seen are the activations that
    `list_activations` names, but for nodes of a torch.fx graph; one that a `forward` calls by itself is not. The counts
    stay readable after the block, the hooks do not outlive it.

    Args:
        model: any module.
        detailed: record what `diagnose` reports, too.
        tau: threshold of dormant units, 0 or more.

    Yields:
        The counts by layer.

    Raises:
        ValueError: for a tau that is no number or negative.

    Example:
        >>> model = timm.create_model("test_resnet_sugar").eval()
        >>> with timm_sugar.track_activations(model) as activations, torch.no_grad():
        ...     output = model(torch.randn(8, 3, 64, 64))
        >>> 0 < activations.sparsity < 1
        True
    """
    if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not tau >= 0:
        raise ValueError(f"tau must be a number, 0 or more, not {tau!r}")
    activations = Activations(detailed, tau)
    hooks: list[Any] = [model.register_forward_pre_hook(activations._new_pass)]
    for name, module in model.named_modules():
        if is_activation(module):
            enter = lambda _m, x, named, name=name: activations._enter(name, _first(x, named))  # noqa: E731
            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(lambda _m, _x, output: activations._leave(output)))
        elif isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
            hooks.append(module.register_forward_hook(activations._remember_source))
    functions = [place for place in find_places(model) if isinstance(place.key, str)]
    functions = [place for place in functions if not isinstance(place.activation, nn.Module)]
    for place in functions:
        setattr(place.owner, str(place.key), _tracked_function(place.activation, place.name, activations))
    try:
        yield activations
    finally:
        for handle in hooks:
            handle.remove()
        for place in functions:
            setattr(place.owner, str(place.key), place.activation)


def diagnose(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    tau: float = DORMANT,
    criterion: Callable[[Any, Any], Tensor] | None = F.cross_entropy,
) -> Activations:
    """Report what each hidden activation of a model does on data, in one pass over `loader` in eval mode.

    For each layer and in total: dead units (never > 0), tau-dormant units (mean |output| at most `tau` times the
    layer's; ReDo, Sokar et al. 2023), zeros, mean and spread of pre-activations, and gradient flow (the share of units
    at whose pre-activation the gradient of `criterion(output, target)` is not 0 for all the data: under ReLU a dead
    unit gets none, under SUGAR it does). The model is left as it was: modes, gradients, hooks.

    Args:
        model: any module.
        loader: yields batches: a pair of inputs and targets (what follows is ignored), or a dict of what the model's
            `forward` takes, with the targets under "labels", "label" or "target". Tensors or NumPy arrays. If
            `criterion` is None, inputs alone will do.
        tau: threshold of dormant units, 0 or more.
        criterion: the loss, of the model's output (its `logits`, if it has such) and the targets; None for no gradient
            flow.

    Returns:
        The counts by layer; `print` shows a table.

    Raises:
        ValueError: for an empty loader, a bad tau, batches without targets, NaN in an activation, and a model in which
            no hidden activation is found.

    Example:
        >>> model = timm.create_model("test_resnet_sugar", num_classes=10)
        >>> loader = [(torch.randn(8, 3, 64, 64), torch.arange(8))]
        >>> report = timm_sugar.diagnose(model, loader)  # print(report) shows a table
        >>> 0 <= report.dead <= 1
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    empty = True
    try:
        with (
            track_activations(model.eval(), True, tau) as activations,
            torch.inference_mode(False),
            torch.set_grad_enabled(criterion is not None),
        ):
            for batch in loader:
                empty = False
                _pass(model, batch, criterion)
    finally:
        for module, mode in modes:
            module.training = mode
    if not activations.layers:
        why = "the loader is empty" if empty else "no hidden activation of the model is a module or an attribute"
        raise ValueError(f"nothing to diagnose: {why}")
    if broken := [name for name, layer in activations.layers.items() if layer.broken]:
        raise ValueError(f"activation {broken[0]} is NaN on this data: look at the batches and the weights first")
    return activations


def _pass(model: nn.Module, batch: Any, criterion: Callable[[Any, Any], Tensor] | None) -> None:
    """Forward, and backward if there is a criterion, without a change to any .grad."""
    weights = list(model.parameters())
    device = weights[0].device if weights else None
    inputs, target = _split(batch)
    inputs = {key: _tensor(value, device) for key, value in inputs.items()}
    if criterion is None:
        _call(model, inputs)
        return
    if target is None:
        raise ValueError("no targets for the loss: give pairs of a batch and its targets, or criterion=None")
    real = [value for value in inputs.values() if isinstance(value, Tensor) and value.is_floating_point()]
    frozen = [] if real else [p for p in weights if p.is_floating_point() and not p.requires_grad]
    try:  # gradients flow through frozen layers, too: from the inputs, or else from the weights of these layers
        start = [x.requires_grad_() for x in [*real, *frozen]] + [p for p in weights if p.requires_grad]
        # A copy, since the first layer may overwrite it.
        outputs = _call(model, {key: x.clone() if isinstance(x, Tensor) else x for key, x in inputs.items()})
        torch.autograd.grad(criterion(outputs, _tensor(target, device)), start, allow_unused=True)
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _split(batch: Any) -> tuple[dict[str, Any], Any]:
    """Inputs by the name of the argument, "" for the first by position; and the targets, None if there are none."""
    if isinstance(batch, Mapping):
        inputs = dict(batch)
        found = [inputs.pop(key) for key in ("labels", "label", "target") if key in inputs]
        return inputs, found[0] if found else None
    if isinstance(batch, (tuple, list)):
        return {"": batch[0]}, batch[1] if len(batch) > 1 else None
    return {"": batch}, None


def _tensor(value: Any, device: torch.device | None) -> Any:
    """An array or tensor as a tensor on the device, detached; anything else as it is."""
    if not isinstance(value, Tensor):
        if not hasattr(value, "__array__"):
            return value
        value = torch.as_tensor(value)
    value = value.clone() if value.is_inference() else value  # autograd can't keep such a tensor
    return value.to(device).detach()


def _call(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """The model's output; its logits if it names them."""
    named = {key: value for key, value in inputs.items() if key}
    output = model(*([inputs[""]] if "" in inputs else []), **named)
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return getattr(output, "logits", output)
