"""`sugarize()` and `to_relu()`: exchange the hidden activations of a live model, all of them or none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from timm_sugar._places import Place, find_leftovers, find_places, is_activation, name_of, own_surrogate
from timm_sugar.activation import SUGAR, FunctionalSUGAR
from timm_sugar.surrogate import Surrogate, get_surrogate

SAME = "same"  # in place of a surrogate's name: each activation keeps its own derivative
Chosen = str | Surrogate
New = nn.Module | Callable[..., Any]


def list_activations(model: nn.Module, types: Collection[Any] = ()) -> dict[str, str]:
    """List the hidden activations of a model, replaced or not, in the order of its modules.

    Args:
        model: any module.
        types: further activations, as for `sugarize`.

    Returns:
        The type of each by its name: `{"layer1.0.act1": "ReLU", ...}`.

    Raises:
        TypeError: if `model` is no module.

    Example:
        >>> timm_sugar.list_activations(nn.Sequential(nn.Linear(2, 2), nn.GELU()))
        {'1': 'GELU'}
    """
    _require_module(model, "list_activations")
    return {place.name: name_of(place.activation) for place in find_places(model, types)}


def sugarize(
    model: nn.Module,
    surrogate: Chosen | Mapping[str, Chosen] = "bsilu",
    *,
    filter_fn: Callable[[Any, str], bool] | None = None,
    types: Collection[Any] = (),
    **parameters: float,
) -> Any:
    """Replace a model's hidden activations by SUGAR, in place.

    Replaced are ReLU, ReLU6, RReLU, LeakyReLU, ELU, SELU, CELU, GELU, SiLU/Swish, Mish, Hardswish and the variants of
    them in timm, transformers, efficientnet_pytorch and mmcv, be they modules, functions that a module keeps as an
    attribute, or calls in a torch.fx graph. Shared instances stay shared; train mode, hooks and attributes carry over.
    What is left because it can't be replaced where it sits is named in one warning; for a `forward` that calls
    `F.relu` itself, sugarize `torch.fx.symbolic_trace(model)`. A second call with equal settings changes nothing.

    Inside `with timm_sugar.relu_gradient():` the model has ReLU's own gradient, which attributions and adversarial
    attacks need.

    Args:
        model: any module; one that is itself an activation is returned as a new module.
        surrogate: a name of `list_surrogates()`, what `get_surrogate` returns, or "same" for the derivative of the
            activation that is replaced. Or `{pattern: any of these}` for settings by layer: patterns as in fnmatch, the
            first that matches a name wins, and what none matches is left alone. In place of a Surrogate a value may be
            `{"surrogate": "nelu", "alpha": 0.05}`, which JSON can hold.
        filter_fn: `filter_fn(module, name)` leaves those for which it is false; for a function that a module keeps
            as an attribute, `module` is that function.
        types: further activations of one's own, as types of modules or as functions.
        parameters: the surrogate's, e.g. `alpha=0.05`.

    Returns:
        The model.

    Raises:
        ValueError: if there is nothing to replace, a pattern matches nothing, or for a bad surrogate or parameter.
        TypeError: if `model` is no module, or for a parameter that the surrogate hasn't.
        The model is then unchanged.

    Example:
        >>> model = timm_sugar.sugarize(timm.create_model("convnext_tiny"), "nelu", alpha=0.01)
        >>> model = timm_sugar.sugarize(model, {"stages.3.*": "bsilu", "*": "nelu"})
    """
    _require_module(model, "sugarize")
    if is_activation(model, types):
        return _exchanged_itself(model, surrogate, types, parameters)
    choose = {}
    places = [p for p in find_places(model, types) if filter_fn is None or filter_fn(p.activation, p.name)]
    _check_patterns(surrogate, [place.name for place in places])
    for place in places:
        if (resolved := resolve_surrogate(surrogate, parameters, place.name)) is not None:
            choose[place] = resolved(place.activation)
    left = find_leftovers(model, types)
    if not choose:
        what = "no hidden activation is in it" if filter_fn is None else "the filter leaves none, or none is there"
        seen = f" ({_listed(left)})" if left else ""
        raise ValueError(
            f"nothing to replace in {type(model).__name__}: {what}{seen}. If its forward calls F.relu or the like "
            "itself, sugarize torch.fx.symbolic_trace(model)"
        )
    _exchange(_plan(choose))
    if left:
        warnings.warn(f"sugarize() left activations of {type(model).__name__}: {_listed(left)}", stacklevel=2)
    return model


def to_relu(model: nn.Module) -> Any:
    """Replace every SUGAR by nn.ReLU, in place and with bit-equal outputs; the model then needs this package no more.

    Args:
        model: any module with SUGAR in it; one that is itself SUGAR comes back as nn.ReLU.

    Returns:
        The model.

    Raises:
        ValueError: if there is no SUGAR in it.
        TypeError: if it is no module.

    Example:
        >>> model = timm_sugar.to_relu(timm.create_model("resnet18_sugar"))
    """
    _require_module(model, "to_relu")
    if isinstance(model, SUGAR):
        return nn.ReLU()
    places = [place for place in find_places(model) if place.settings() is not None]
    if not places:
        raise ValueError(f"there is no SUGAR activation below {type(model).__name__} to turn into ReLU")
    _exchange(_one_new_for_each_old(places, lambda place: nn.ReLU() if _is_sugar_module(place) else F.relu))
    return model


def replace_activations(model: nn.Module, make: Callable[[], nn.Module]) -> Any:
    """Put what `make` returns in the place of every SUGAR module, in place; shared instances stay shared.

    Use it to compare SUGAR with another activation in the same places; to deploy a model there is `to_relu`.

    Args:
        model: a module with SUGAR in it.
        make: returns a new activation.

    Returns:
        The model.

    Raises:
        ValueError: if there is no SUGAR module in it.

    Example:
        >>> model = timm_sugar.replace_activations(timm.create_model("resnet18_sugar"), nn.GELU)
    """
    places = [place for place in find_places(model) if isinstance(place.activation, SUGAR)]
    if not places:
        raise ValueError(f"there is no SUGAR module below {type(model).__name__} to replace")
    _exchange(_one_new_for_each_old(places, lambda _: make()))
    return model


@contextmanager
def sugarized(model: nn.Module, surrogate: Chosen | Mapping[str, Chosen] = "bsilu", **options: Any) -> Iterator[Any]:
    """Sugarize a model inside a `with` block; afterwards it has the very activations that it had before.

    Args and errors are those of `sugarize`; a model that is itself one activation is refused with ValueError.

    Example:
        >>> with timm_sugar.sugarized(model, "nelu"):
        ...     train(model)
    """
    _require_module(model, "sugarized")
    types = options.get("types", ())
    if is_activation(model, types):
        raise ValueError("the model is itself an activation: use sugarize(), which returns the new module")
    before = [_Change(place) for place in find_places(model, types)]
    sugarize(model, surrogate, **options)
    try:
        yield model
    finally:
        for change in reversed(before):
            change.undo()


def _require_module(model: Any, function: str) -> None:
    if not isinstance(model, nn.Module):
        build = f": build it first, e.g. timm.create_model({model!r})" if isinstance(model, str) else ""
        raise TypeError(f"{function}() needs an nn.Module, not {type(model).__name__}{build}")


def _exchanged_itself(model: nn.Module, surrogate: Any, types: Collection[Any], parameters: dict[str, Any]) -> Any:
    """SUGAR for a model that is itself one activation. Raises as `sugarize`."""
    holder = nn.Sequential(model)
    if (resolved := resolve_surrogate(surrogate, parameters, "0")) is None:
        raise ValueError("no pattern matches the activation, whose name is '0' here")
    _exchange(_plan({place: resolved(model) for place in find_places(holder, types)}))
    return holder[0]


def _listed(left: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({why})" for name, why in left.items())


def _check_patterns(surrogate: Any, names: list[str]) -> None:
    for pattern in surrogate if isinstance(surrogate, Mapping) else ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"pattern {pattern!r} matches no activation (list_activations(model) names them)")


def resolve_surrogate(surrogate: Any, parameters: dict[str, Any], name: str) -> Callable[[Any], Surrogate] | None:
    """What gives an activation of that name its surrogate; None if no pattern matches. Raises as `get_surrogate`."""
    if isinstance(surrogate, Mapping):
        if parameters:
            raise TypeError("parameters stand in the values of the patterns: get_surrogate('nelu', alpha=0.05)")
        if "surrogate" in surrogate:  # a pattern's value, as JSON has it
            settings = dict(surrogate)
            return resolve_surrogate(settings.pop("surrogate"), settings, name)
        resolved = {pattern: resolve_surrogate(value, {}, name) for pattern, value in surrogate.items()}
        return next((found for pattern, found in resolved.items() if fnmatchcase(name, pattern)), None)
    if surrogate == SAME:
        if parameters:
            raise TypeError(f"surrogate {SAME!r} takes its parameters from the activations, not {sorted(parameters)}")
        return own_surrogate
    chosen = get_surrogate(surrogate, **parameters)
    return lambda _: chosen


def _is_sugar_module(place: Place) -> bool:
    return isinstance(place.activation, SUGAR) and not isinstance(place.activation, FunctionalSUGAR)


def _plan(choose: dict[Place, Surrogate]) -> dict[Place, New]:
    """A new SUGAR for each place that has not just these settings already; one instance for each old instance."""
    todo = {place: chosen for place, chosen in choose.items() if place.settings() != (chosen.name, chosen.values)}

    def make(place: Place) -> SUGAR:
        function = isinstance(place.key, str) and (
            isinstance(place.activation, FunctionalSUGAR) or not isinstance(place.activation, nn.Module)
        )
        return (FunctionalSUGAR if function else SUGAR)(False, surrogate=todo[place])

    return _one_new_for_each_old(list(todo), make)


def _one_new_for_each_old(places: list[Place], make: Callable[[Place], New]) -> dict[Place, New]:
    made: dict[Any, New] = {}
    plan = {}
    for place in places:
        old = place.activation if isinstance(place.activation, nn.Module) else place
        if old not in made:
            made[old] = make(place)
        plan[place] = made[old]
    return plan


def _exchange(plan: Mapping[Place, New]) -> None:
    """Put all new activations, or, if one place refuses, none. Raises ValueError with the place's name."""
    for place in plan:
        if isinstance(place.activation, nn.Module) and "forward" in vars(place.activation):
            raise ValueError(
                f"{place.name}: its forward was replaced on the instance, as hooks of accelerate do; sugarize the "
                "model before that, or remove the hook first"
            )
    done: list[_Change] = []
    try:
        for place, new in plan.items():
            done.append(_Change(place))
            done[-1].put(new)
    except Exception as error:
        for change in reversed(done):
            change.undo()
        raise ValueError(f"{done[-1].place.name} can't be replaced ({error}); the model is unchanged") from error


class _Change:
    """One exchange at a place, and what is needed to undo it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.fused = getattr(place.owner, "activation_relu_or_gelu", None)
        node = place.key
        self.node = (node.op, node.target, node.args, node.kwargs) if isinstance(node, torch.fx.Node) else None

    def put(self, new: New) -> None:
        """Exchange the activation; a module inherits train mode, hooks and attributes of the module before it."""
        owner, key, old = self.place.owner, self.place.key, self.place.activation
        if isinstance(key, torch.fx.Node):
            _rewrite(owner, key, new)
            return
        if isinstance(new, nn.Module) and isinstance(old, nn.Module):
            new.train(old.training)
            settings = {"inplace", *getattr(old, "__constants__", ())}
            carried = {k: v for k, v in vars(old).items() if "hook" in k or not (k in vars(new) or k in settings)}
            vars(new).update(carried)
        _set(owner, key, new)
        if isinstance(owner, nn.TransformerEncoderLayer) and key == "activation":
            is_relu = isinstance(new, (SUGAR, nn.ReLU)) or new is F.relu
            owner.activation_relu_or_gelu = int(is_relu)  # which function the fused inference path computes

    def undo(self) -> None:
        """Put the old activation back."""
        owner, key = self.place.owner, self.place.key
        if isinstance(key, torch.fx.Node):
            assert isinstance(owner, torch.fx.GraphModule)
            if self.node and self.node != (key.op, key.target, key.args, key.kwargs):
                if key.op == "call_module":
                    owner.delete_submodule(str(key.target))
                key.op, key.target, key.args, key.kwargs = self.node
                owner.recompile()
        elif getattr(owner, key, None) is not self.place.activation:
            _set(owner, key, self.place.activation)
        if self.fused is not None:
            owner.activation_relu_or_gelu = self.fused


def _set(owner: nn.Module, key: str, new: Any) -> None:
    if not isinstance(new, nn.Module) and key in owner._modules:
        delattr(owner, key)  # a function can't be assigned over a module
    setattr(owner, key, new)


def _rewrite(graph_module: nn.Module, node: torch.fx.Node, new: New) -> None:
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
