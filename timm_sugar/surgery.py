"""`sugarize()` and `to_relu()`: exchange the hidden activations of a live model.

What counts as a hidden activation stands here and nowhere else. Gates and attention (sigmoids, tanh, softmax) are never
touched, nor PReLU, whose learned slopes are weights of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from timm_sugar.activation import SUGAR, FunctionalSUGAR

# Modules are matched by exact type, since a subclass may compute something else.
_TYPES = frozenset(
    {nn.ReLU, nn.ReLU6, nn.RReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish}
)
_FUNCTIONS = frozenset(
    {torch.relu, torch.selu, torch.celu, torch.rrelu, F.relu, F.relu6, F.rrelu, F.leaky_relu, F.elu, F.selu, F.celu}
    | {F.gelu, F.silu, F.mish, F.hardswish}
    | {torch.relu_, torch.selu_, torch.celu_, torch.rrelu_, F.relu_, F.rrelu_, F.leaky_relu_, F.elu_, F.selu_, F.celu_}
)
# timm has its own classes and functions for these; matched by name because this file serves models without timm too.
_TIMM_MODULES = ("timm.layers.activations", "timm.layers.activations_me")
_TIMM_TYPES = frozenset(
    {"Swish", "SwishMe", "Mish", "MishMe", "HardSwish", "HardSwishMe", "HardMish", "HardMishMe"}
    | {"GELU", "GELUTanh", "QuickGELU"}
)
_TIMM_FUNCTIONS = frozenset(
    {"swish", "swish_me", "mish", "mish_me", "hard_swish", "hard_swish_me", "hard_mish", "hard_mish_me"}
    | {"gelu", "gelu_tanh", "quick_gelu"}
)
_OPERATORS = (torch.ops.timm_sugar.relu, torch.ops.timm_sugar.relu.default)  # SUGAR as torch.fx records it


def is_activation(module: nn.Module) -> bool:
    """Whether a module is a hidden activation: of a type that `sugarize` replaces, or SUGAR itself."""
    kind = type(module)
    from_timm = kind.__module__ in _TIMM_MODULES and kind.__name__ in _TIMM_TYPES
    return from_timm or kind in _TYPES or isinstance(module, SUGAR)


def is_activation_function(function: Any) -> bool:
    """Whether a callable is a hidden activation as a function: torch's (`F.gelu`), timm's, or a partial of one."""
    if isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, nn.Module) or not callable(function):
        return False
    from_timm = getattr(function, "__module__", "") in _TIMM_MODULES and function.__name__ in _TIMM_FUNCTIONS
    return from_timm or any(function is known for known in _FUNCTIONS)


@dataclass(frozen=True)
class _Place:
    """Where an activation sits: under a name in a module, or at a node of a torch.fx graph."""

    name: str
    activation: Any
    owner: nn.Module
    key: str | torch.fx.Node

    def settings(self) -> tuple[str, list[float]] | None:
        """Surrogate and parameter values if SUGAR is here already."""
        if isinstance(self.activation, SUGAR):
            return self.activation.surrogate, self.activation.values
        if isinstance(self.key, torch.fx.Node) and self.activation in _OPERATORS:
            return self.key.args[1], list(self.key.args[2])  # type: ignore[return-value, arg-type]
        return None

    def put(self, new: nn.Module | Callable[..., Any]) -> None:
        """Exchange the activation; a module inherits train mode and hooks of the module before it."""
        if isinstance(self.key, torch.fx.Node):
            _rewrite(self.owner, self.key, new)
            return
        if isinstance(new, nn.Module) and isinstance(self.activation, nn.Module):
            new.train(self.activation.training)
            vars(new).update({k: v for k, v in vars(self.activation).items() if "hook" in k})
        if not isinstance(new, nn.Module) and self.key in self.owner._modules:
            delattr(self.owner, self.key)  # a function can't be assigned over a module
        setattr(self.owner, self.key, new)
        if isinstance(self.owner, nn.TransformerEncoderLayer):
            self.owner.activation_relu_or_gelu = 1  # its fused inference path is to compute ReLU too


def _places(model: nn.Module) -> Iterator[_Place]:
    """Every hidden activation below a model, SUGAR among them."""
    for prefix, owner in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for key, child in owner._modules.items():
            if child is not None and is_activation(child):
                yield _Place(dot + key, child, owner, key)
        for key, value in vars(owner).items():
            if is_activation_function(value):
                yield _Place(dot + key, value, owner, key)
        if isinstance(owner, torch.fx.GraphModule):
            for node in owner.graph.nodes:
                method = node.op == "call_method" and node.target in ("relu", "relu_")
                called = node.op == "call_function" and (
                    is_activation_function(node.target) or node.target in _OPERATORS
                )
                if method or called:
                    yield _Place(dot + node.name, node.target, owner, node)


def _rewrite(graph_module: nn.Module, node: torch.fx.Node, new: nn.Module | Callable[..., Any]) -> None:
    """Let a node of a graph call a new module or function on the input of the old one."""
    assert isinstance(graph_module, torch.fx.GraphModule)
    x = node.args[0] if node.args else node.kwargs["input"]
    node.args, node.kwargs = (x,), {}
    if isinstance(new, nn.Module):
        node.op, node.target = "call_module", f"{node.name}_sugar"
        graph_module.add_submodule(node.target, new.train(graph_module.training))
    else:
        node.op, node.target = "call_function", new
    graph_module.recompile()


def sugarize(
    model: nn.Module,
    surrogate: str = "bsilu",
    *,
    filter: Callable[[str, Any], bool] | None = None,
    **parameters: float,
) -> dict[str, str]:
    """Replace a model's hidden activations by SUGAR, in place; return what was replaced as {name: original type}.

    Replaced are ReLU, ReLU6, RReLU, LeakyReLU, ELU, SELU, CELU, GELU, SiLU/Swish, Mish, Hardswish and timm's variants
    of them, be they modules, functions that a module keeps as an attribute, or calls in a torch.fx graph. What a
    hand-written `forward` calls by itself can't be reached. `filter(name, activation)` leaves those for which it is
    false. Shared instances stay shared; train mode and hooks carry over. SUGAR modules with other settings get the new
    ones; with equal settings they are left, so a second call changes nothing. Raises ValueError where there is nothing
    to replace, and what `SUGAR` raises for a bad surrogate or parameter; the model is then unchanged.
    """
    wanted = SUGAR(False, surrogate=surrogate, **parameters)
    places = [place for place in _places(model) if filter is None or filter(place.name, place.activation)]
    if not places:
        what = "it is an activation itself: use SUGAR()" if is_activation(model) else "no hidden activation is in it"
        why = what if filter is None else "the filter leaves none, or none is there"
        raise ValueError(f"nothing to replace in {type(model).__name__}: {why}")
    places = [place for place in places if place.settings() != (wanted.surrogate, wanted.values)]
    replaced: dict[Any, SUGAR] = {}  # one new instance for each old one
    for place in places:
        old = place.activation if isinstance(place.activation, nn.Module) else place
        plain = isinstance(place.key, torch.fx.Node) or (old is not place and not isinstance(old, FunctionalSUGAR))
        if old not in replaced:
            replaced[old] = (SUGAR if plain else FunctionalSUGAR)(False, surrogate=surrogate, **parameters)
        place.put(replaced[old])
    return {place.name: _type_name(place.activation) for place in places}


def to_relu(model: nn.Module) -> list[str]:
    """Replace every SUGAR by nn.ReLU, in place and with bit-equal outputs; return the names of what was replaced.

    The model then needs nothing of this package: deploy it, or hand it on. Raises ValueError if it has no SUGAR.
    """
    places = [place for place in _places(model) if place.settings() is not None]
    if not places:
        raise ValueError(f"there is no SUGAR activation below {type(model).__name__} to turn into ReLU")
    replaced: dict[nn.Module, nn.Module] = {}
    for place in places:
        if isinstance(place.activation, SUGAR) and not isinstance(place.activation, FunctionalSUGAR):
            place.put(replaced.setdefault(place.activation, nn.ReLU()))
        else:
            place.put(F.relu)
    return [place.name for place in places]


def exchange_sugar(model: nn.Module, make: Callable[[], nn.Module]) -> None:
    """Put what `make` returns in the place of every SUGAR module below a model; shared instances stay shared.

    For comparisons with other activations in the same places; to deploy a model there is `to_relu`.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for place in [place for place in _places(model) if isinstance(place.activation, SUGAR)]:
        if place.activation not in replaced:
            replaced[place.activation] = make()
        place.put(replaced[place.activation])


def _type_name(activation: Any) -> str:
    if isinstance(activation, functools.partial):
        activation = activation.func
    if isinstance(activation, nn.Module):
        return type(activation).__name__
    return str(getattr(activation, "__name__", activation))  # a function, or the name of a tensor's method
