"""`sugarize()` and `to_relu()`: exchange the hidden activations of a live model, all of them or none."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from timm_sugar import _torch
from timm_sugar._example import call, equal_outputs, inference, watch_example
from timm_sugar._exchange import New, Undoable, exchange, has_config, one_new_for_each_old, rename_in_configs, undo_all
from timm_sugar._places import (
    RELU,
    Place,
    find_leftovers,
    find_places,
    find_sugar_left,
    is_activation,
    is_in_place,
    name_of,
    overwrites_input,
    own_surrogate,
)
from timm_sugar._saved_config import write_configs
from timm_sugar._saved_tensors import keep_sharing, share_within, unshare_within
from timm_sugar.activation import SUGAR, FunctionalSUGAR, sugar_modules
from timm_sugar.surrogate import SAME, Surrogate, get_surrogate

Chosen = str | Surrogate
_CALL_WITH_X_ALONE = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_OPTIONS = ("filter_fn", "types", "example", "save_memory")  # of sugarize, what isn't a surrogate's parameter


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


def other_than_relu(model: nn.Module) -> set[str]:
    """The types of a model's hidden activations that aren't plain ReLU, SUGAR among them."""
    return set(list_activations(model).values()) - {*RELU}


def sugarize(
    model: nn.Module,
    surrogate: Chosen | Mapping[str, Chosen] = "bsilu",
    *,
    filter_fn: Callable[[Any, str], bool] | None = None,
    types: Collection[Any] = (),
    example: Any = None,
    save_memory: bool = False,
    **parameters: float,
) -> Any:
    """Replace a model's hidden activations by SUGAR, in place.

    Replaced are ReLU, ReLU6, RReLU, LeakyReLU, ELU, SELU, CELU, GELU, SiLU/Swish, Mish, Hardswish and the variants of
    them in timm, transformers, efficientnet_pytorch and mmcv, be they modules, functions that a module keeps as an
    attribute, or calls in a torch.fx graph. Shared instances stay shared, unless patterns tell their names apart; train
    mode, hooks and attributes carry over. What is left because it can't be replaced where it sits is named in one
    warning; for a `forward` that calls `F.relu` itself, sugarize `torch.fx.symbolic_trace(model)`. A second call with
    equal settings changes nothing. A config of transformers whose activations are all replaced names ReLU from then on
    (`hidden_act` and the like).

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
        example: an input, a tuple of arguments or a dict of named ones. The model runs on a copy of it, in eval mode
            and without gradients. What it computes of ReLU, GELU and the like without SUGAR is named in a warning. An
            in-place activation whose input the model reads again gets a SUGAR that overwrites its input, too, which
            takes a copy of it; without an example such a model computes something else.
        save_memory: whether each SUGAR and the layer behind it keep one tensor between them, not two, in eager mode.
            Within one call of the model only, and if none of its modules has a forward hook. A model that writes to its
            activations unseen by autograd (`.data`, NumPy, a collective) has wrong gradients then.
        parameters: the surrogate's, e.g. `alpha=0.05`.

    Returns:
        The model.

    Raises:
        ValueError: if there is nothing to replace, a pattern matches nothing, or for a bad surrogate or parameter.
        TypeError: if `model` is no module, or for a parameter that the surrogate hasn't.
        The model is then unchanged.

    Example:
        >>> model = timm_sugar.sugarize(timm.create_model("convnext_atto"), "nelu", alpha=0.01)
        >>> model = timm_sugar.sugarize(model, {"stages.3.*": "bsilu", "*": "nelu"})
    """
    _require_module(model, "sugarize")
    if is_activation(model, types):
        if filter_fn is not None and not filter_fn(model, "0"):
            raise ValueError("nothing to replace: the filter leaves the activation, whose name is '0' here")
        return _exchanged_itself(model, surrogate, types, save_memory, parameters)
    _sugarize(model, surrogate, filter_fn, types, example, save_memory, parameters)
    return model


def _sugarize(
    model: nn.Module,
    surrogate: Any,
    filter_fn: Any,
    types: Collection[Any],
    example: Any,
    save_memory: bool,
    parameters: dict[str, Any],
    anew: bool = False,
) -> list[Undoable]:
    """What `sugarize` does; returns the changes, in their order. `anew` exchanges what has these settings, too."""
    if example is not None:
        _torch.check_examples()
    places = [p for p in find_places(model, types) if filter_fn is None or filter_fn(p.activation, p.name)]
    _check_patterns(surrogate, [place.name for place in places])
    choose = {}
    for place in places:
        if (resolved := resolve_surrogate(surrogate, parameters, place.name)) is not None:
            choose[place] = resolved(place.with_arguments())
    left = find_leftovers(model, types)
    if not choose:
        what = "no hidden activation is in it" if filter_fn is None else "the filter leaves none, or none is there"
        seen = f" ({_listed(left)})" if left else ""
        raise ValueError(
            f"nothing to replace in {type(model).__name__}: {what}{seen}. If its forward calls F.relu or the like "
            "itself, sugarize torch.fx.symbolic_trace(model)"
        )
    plan = _plan(choose, save_memory, anew)
    in_place = {new: place.name for place, new in plan.items() if isinstance(new, nn.Module) and is_in_place(place)}
    expected = None if example is None else _output_of_relu(model, plan, example)
    of_other = [new for place, new in plan.items() if _was_other_than_relu(place)]
    changes: list[Undoable] = [*exchange(plan)]
    try:
        if left:
            warnings.warn(f"sugarize() left activations of {type(model).__name__}: {_listed(left)}", stacklevel=3)
        if example is not None:
            _check_on_example(model, in_place, example, expected)
        renamed = rename_in_configs(model, left, types)
        changes += renamed
        if of_other and not renamed and any(has_config(module) for module in model.modules()):
            warnings.warn(
                f"the config of {type(model).__name__} doesn't say that these activations are ReLU now: a model "
                "that is saved and loaded has the old ones; sugarize() it again",
                stacklevel=3,
            )
        changes += write_configs(model, of_other)
    except BaseException:  # warnings that are errors, what the model raises on the example, Ctrl-C
        undo_all(changes)
        raise
    if plan and save_memory:
        share_within(model, [module for module in sugar_modules(model) if module.save_memory])
    return changes


def _was_other_than_relu(place: Place) -> bool:
    return place.settings() is None and name_of(place.activation) not in RELU


def _output_of_relu(model: nn.Module, plan: Mapping[Place, New], example: Any) -> Any:
    """What a model returns with ReLU in the places of a plan, in place where the activation there is."""
    changes = exchange({place: _reference(place, new) for place, new in plan.items()})
    try:
        with inference(model):
            return call(model, example)
    finally:
        undo_all(changes)


def _reference(place: Place, new: New) -> New:
    """ReLU for a place, in place where the activation there is, and called like that one."""
    if not isinstance(new, FunctionalSUGAR):
        return nn.ReLU(is_in_place(place))
    return lambda x, *args, **kwargs: F.relu(x, inplace=overwrites_input(place, args, kwargs))


def _check_on_example(model: nn.Module, in_place: Mapping[nn.Module, str], example: Any, expected: Any) -> None:
    """Warn of what one batch shows, and let SUGAR overwrite its input where the model needs that."""
    seen = watch_example(model, example, in_place)
    for new, name in in_place.items():
        if isinstance(new, SUGAR):
            new.overwrites = name in seen.read_again
    if seen.outside:
        found = "; ".join(
            f"{', '.join(sorted(names))} in {module or 'forward'}" for module, names in seen.outside.items()
        )
        warnings.warn(
            f"{type(model).__name__} computes activations without SUGAR: {found}. Sugarize "
            "torch.fx.symbolic_trace(model), or write timm_sugar.sugar() there",
            stacklevel=4,
        )
    with inference(model):
        if not equal_outputs(call(model, example), expected):
            named = ", ".join(in_place.values()) or "none"
            warnings.warn(
                f"{type(model).__name__} computes something else than with ReLU in the same places (activations that "
                f"overwrote their input: {named})",
                stacklevel=4,
            )


def to_relu(model: nn.Module) -> Any:
    """Replace every SUGAR by nn.ReLU, in place and with bit-equal outputs; the model then needs this package no more.

    Where a module keeps a function, a small torch.fx graph of ReLU takes its place, which is called like the function.
    What can't be replaced is named in one warning: calls of `sugar` in a `forward`, SUGAR in a list or in a scripted
    module. Functions that a `forward` calls are not looked into.

    Args:
        model: any module with SUGAR in it; one that is itself SUGAR comes back as nn.ReLU.

    Returns:
        The model.

    Raises:
        ValueError: if there is no SUGAR in it that can be replaced.
        TypeError: if it is no module.

    Example:
        >>> model = timm_sugar.to_relu(timm.create_model("test_resnet_sugar"))
        >>> set(timm_sugar.list_activations(model).values())
        {'ReLU'}
    """
    _require_module(model, "to_relu")
    if isinstance(model, SUGAR) and is_activation(model):
        return to_relu(nn.Sequential(model))[0]
    places = [place for place in find_places(model) if place.settings() is not None]
    left = find_sugar_left(model)
    if not places:
        seen = f" but {_listed(left)}: write F.relu there" if left else ""
        raise ValueError(f"there is no SUGAR activation below {type(model).__name__} to turn into ReLU{seen}")
    if left:
        warnings.warn(
            f"to_relu() left SUGAR of {type(model).__name__}: {_listed(left)}; write F.relu there", stacklevel=2
        )
    exchange(one_new_for_each_old(places, _relu_for))
    unshare_within(model)
    return model


def replace_activations(model: nn.Module, make: Callable[[], nn.Module]) -> Any:
    """Put what `make` returns in the place of every SUGAR module, in place; shared instances stay shared.

    Use it to compare SUGAR with another activation in the same places; to deploy a model there is `to_relu`. What isn't
    SUGAR is not saved: a model that `timm.models.save_for_hf` wrote comes back with SUGAR there.

    Args:
        model: a module with SUGAR in it.
        make: returns a new activation.

    Returns:
        The model.

    Raises:
        ValueError: if there is no SUGAR module in it, or one overwrites its input and the new activation can't.
        TypeError: if `model` or what `make` returns is no module.

    Example:
        >>> model = timm_sugar.replace_activations(timm.create_model("test_resnet_sugar"), nn.GELU)
        >>> set(timm_sugar.list_activations(model).values())
        {'GELU'}
    """
    _require_module(model, "replace_activations")
    places = [place for place in find_places(model) if isinstance(place.activation, SUGAR)]
    if not places:
        raise ValueError(f"there is no SUGAR module below {type(model).__name__} to replace")

    def made(place: Place) -> nn.Module:
        new = make()
        if not isinstance(new, nn.Module):
            raise TypeError(f"make() has to return a new module, not {new!r}")
        if place.activation.overwrites:
            name = "overwrites" if isinstance(new, SUGAR) else "inplace"
            if name not in vars(new):
                raise ValueError(f"{place.name} overwrites its input, which {type(new).__name__} can't")
            setattr(new, name, True)
        return new

    exchange(one_new_for_each_old(places, made))
    write_configs(model)
    return model


@contextmanager
def sugarized(model: nn.Module, surrogate: Chosen | Mapping[str, Chosen] = "bsilu", **options: Any) -> Iterator[Any]:
    """Sugarize a model inside a `with` block; afterwards it has the very activations that it had before.

    Args and errors are those of `sugarize`; a model that is itself one activation is refused with ValueError.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.GELU())
        >>> with timm_sugar.sugarized(model, "nelu"):
        ...     print(model[1])
        SUGAR(surrogate='nelu', alpha=0.01)
        >>> model[1]
        GELU(approximate='none')
    """
    _require_module(model, "sugarized")
    types, save_memory = options.get("types", ()), options.get("save_memory", False)
    if is_activation(model, types):
        raise ValueError("the model is itself an activation: use sugarize(), which returns the new module")
    parameters = {key: value for key, value in options.items() if key not in _OPTIONS}
    filter_fn, example = options.get("filter_fn"), options.get("example")
    share_as_before = keep_sharing(model)
    changes = _sugarize(model, surrogate, filter_fn, types, example, save_memory, parameters, anew=True)
    try:
        yield model
    finally:
        undo_all(changes)
        if save_memory:
            share_as_before()


def _require_module(model: Any, function: str) -> None:
    if not isinstance(model, nn.Module):
        build = f": build it first, e.g. timm.create_model({model!r})" if isinstance(model, str) else ""
        raise TypeError(f"{function}() needs an nn.Module, not {type(model).__name__}{build}")


def _exchanged_itself(
    model: nn.Module, surrogate: Any, types: Collection[Any], save_memory: bool, parameters: dict[str, Any]
) -> Any:
    """SUGAR for a model that is itself one activation. Raises as `sugarize`."""
    holder = nn.Sequential(model)
    if (resolved := resolve_surrogate(surrogate, parameters, "0")) is None:
        raise ValueError("no pattern matches the activation, whose name is '0' here")
    exchange(_plan({place: resolved(model) for place in find_places(holder, types)}, save_memory))
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


def _relu_for(place: Place) -> New:
    """ReLU of PyTorch alone. For a function, one that takes further arguments without effect, as FunctionalSUGAR."""
    if isinstance(place.key, torch.fx.Node) or isinstance(place.owner, _CALL_WITH_X_ALONE):
        return F.relu
    if not isinstance(place.activation, FunctionalSUGAR):
        return nn.ReLU(inplace=getattr(place.activation, "overwrites", False))
    graph = torch.fx.Graph()
    for name, parameter in inspect.signature(place.activation.forward).parameters.items():
        graph.placeholder(name, type_expr=parameter.annotation, default_value=parameter.default)
    x = next(iter(graph.nodes))
    graph.output(graph.call_function(F.relu, (x, place.activation.overwrites)))
    return torch.fx.GraphModule(nn.Module(), graph)


def _plan(choose: dict[Place, Surrogate], save_memory: bool, anew: bool = False) -> dict[Place, New]:
    """A new SUGAR for each place that has not just these settings already, or with `anew` for all.

    One instance for each old instance, or several if the names under which it is shared have different settings.
    """
    todo = {
        place: chosen
        for place, chosen in choose.items()
        if anew
        or place.settings() != (chosen.name, chosen.values, chosen.formula)
        or getattr(place.activation, "save_memory", save_memory) != save_memory
    }

    def make(place: Place) -> SUGAR:
        function = isinstance(place.key, str) and (
            isinstance(place.activation, FunctionalSUGAR) or not isinstance(place.activation, nn.Module)
        )
        new = (FunctionalSUGAR if function else SUGAR)(False, surrogate=todo[place], save_memory=save_memory)
        new.overwrites = getattr(place.activation, "overwrites", False)
        return new

    def setting(place: Place) -> Any:
        return todo[place].name, tuple(todo[place].values), todo[place].formula

    return one_new_for_each_old(list(todo), make, setting)
