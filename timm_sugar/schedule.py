"""Surrogates whose parameters change while a model trains: `set_surrogate` once, `SurrogateSchedule` at each update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from timm_sugar._places import activation_of, find_hidden, find_places
from timm_sugar._saved_config import write_configs
from timm_sugar.activation import SUGAR, sugar_modules
from timm_sugar.surrogate import Surrogate, get_surrogate

# The share of the way from the first value to the last, at a share of the updates.
_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 - math.cos(math.pi * done)) / 2,
    "linear": lambda done: done,
}


def set_surrogate(model: nn.Module, surrogate: str | Surrogate | None = None, **parameters: float) -> Any:
    """Exchange the surrogate of a model's SUGAR modules, or values of its parameters, in place.

    Holds from the next forward pass on. Nothing is compiled in eager mode; under torch.compile the model is compiled
    once more at the first call, and then for another surrogate only. A checkpoint around compiled code, or a reentrant
    one, repeats the forward pass with what holds by then: change nothing between its forward and backward pass.

    Args:
        model: any module with SUGAR in it, also a compiled or wrapped one.
        surrogate: a new one for all; None leaves each module its own.
        parameters: new values. With no surrogate, for the modules whose surrogate has such a parameter.

    Returns:
        The model.

    Raises:
        TypeError: if no module has such a parameter, or a value is no number.
        ValueError: if there is no SUGAR module, a value is out of range, or the surrogate is unknown.

    Example:
        >>> model = timm.create_model("test_resnet_sugar")  # B-SiLU
        >>> model = timm_sugar.set_surrogate(model, alpha=0.5)
        >>> model = timm_sugar.set_surrogate(model, "nelu", alpha=0.05)
    """
    modules = _modules(model, "set_surrogate")
    if surrogate is not None:
        changes = [(module, get_surrogate(surrogate, **parameters)) for module in modules]
    elif parameters:
        changes = _changes(modules, parameters)
    else:
        raise TypeError("set_surrogate() needs a surrogate or a parameter, e.g. alpha=0.5")
    for module, chosen in changes:
        module.set_surrogate(chosen)
    write_configs(model)
    return model


class SurrogateSchedule:
    """Parameters of a model's surrogates that go from one value to another over the updates of a training.

    Sets the first values at once. Changes the SUGAR modules that the model has now: after another `sugarize()` or
    `to_relu()` make another schedule, for `step` raises RuntimeError then. A copy of the model, as of an average of the
    weights, keeps the values that it was made with. A CUDA graph that one captures oneself keeps those of its capture.

    Args:
        model: any module with SUGAR in it, also a compiled or wrapped one.
        updates: number of calls of `step` after which the last values are reached, and stay.
        shape: "cosine" or "linear".
        parameters: first and last value of each, e.g. alpha=(1.67, 0.1).

    Raises:
        TypeError: if no module has such a parameter, or a value is no number.
        ValueError: if there is no SUGAR module, or something is out of range.

    Example:
        >>> model = timm.create_model("test_resnet_sugar")
        >>> schedule = timm_sugar.SurrogateSchedule(model, alpha=(1.5, 0.5), shape="linear", updates=4)
        >>> for _ in range(2):
        ...     schedule.step()  # after each update of the weights
        >>> schedule.values()
        {'alpha': 1.0}
    """

    def __init__(
        self, model: nn.Module, *, updates: int, shape: str = "cosine", **parameters: tuple[float, float]
    ) -> None:
        if not isinstance(updates, int) or isinstance(updates, bool) or updates < 1:
            raise ValueError(f"updates must be a whole number, 1 or more, not {updates!r}")
        if shape not in _SHAPES:
            raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(_SHAPES)}")
        if not parameters:
            raise TypeError("SurrogateSchedule needs a parameter, e.g. alpha=(1.67, 0.1)")
        for name, ends in parameters.items():
            if not isinstance(ends, (tuple, list)) or len(ends) != 2:
                raise TypeError(f"{name} must be its first and last value, e.g. (1.67, 0.1), not {ends!r}")
        self.updates, self.shape, self.done = updates, shape, 0
        self.parameters = {name: (first, last) for name, (first, last) in parameters.items()}
        self._model, self._modules = model, _modules(model, "SurrogateSchedule")
        _changes(self._modules, {name: last for name, (_, last) in self.parameters.items()})  # complains
        self._configs = write_configs(model)
        self._apply()

    def values(self) -> dict[str, float]:
        """The values in force: {name: value}."""
        if self.done >= self.updates:
            return {name: float(last) for name, (_, last) in self.parameters.items()}
        way = _SHAPES[self.shape](self.done / self.updates)
        return {name: first + (last - first) * way for name, (first, last) in self.parameters.items()}

    def step(self) -> None:
        """Go on by one update, after the optimizer has."""
        self.done += 1
        self._apply()

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs: the number of updates that were done."""
        return {"done": self.done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where another schedule with the same arguments was."""
        self.done = int(state["done"])
        self._apply()

    def _apply(self) -> None:
        if {*sugar_modules(self._model)} != {*self._modules}:
            raise RuntimeError("the model has other SUGAR modules than when this schedule was made: make another one")
        for module, chosen in _changes(self._modules, self.values()):
            module.set_surrogate(chosen)
        for config in self._configs:
            config.write()


def _modules(model: Any, function: str) -> list[SUGAR]:
    """The SUGAR modules of a model, the model itself if it is one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}() needs an nn.Module, not {type(model).__name__}")
    for place in find_places(model):
        if place.settings() and not isinstance(place.activation, SUGAR):
            graph = isinstance(place.key, torch.fx.Node)
            raise ValueError(
                f"{place.name} of {type(model).__name__} is {'a call in a graph of torch.fx' if graph else 'sugar()'}, "
                f"with fixed values: {'change them, then trace' if graph else 'keep timm_sugar.SUGAR() there'}"
            )
    if hidden := find_hidden(model):
        raise ValueError(
            f"{hidden[0]} of {type(model).__name__} never runs: an attribute of that name hides it, as in copies of a "
            "TransformerDecoderLayer that was made with activation=SUGAR(); sugarize() the model"
        )
    modules = sugar_modules(model)
    if not modules:
        raise ValueError(f"there is no SUGAR module in {type(model).__name__}: sugarize() it before")
    return modules


def _changes(modules: list[SUGAR], parameters: Mapping[str, Any]) -> list[tuple[SUGAR, Surrogate]]:
    """New surrogates of modules, each with those of the parameters that it has. Raises as `get_surrogate`."""
    chosen = [(module, activation_of(module)) for module in modules]
    known = sorted({key for _, surrogate in chosen for key in surrogate.parameters})
    if unknown := sorted(parameters.keys() - set(known)):
        names = ", ".join(sorted({surrogate.name for _, surrogate in chosen}))
        takes = ", ".join(known) or "none"
        raise TypeError(f"no surrogate of the model ({names}) has a parameter {unknown[0]!r} (there are: {takes})")
    changes = []
    for module, surrogate in chosen:
        if new := {key: value for key, value in parameters.items() if key in surrogate.parameters}:
            changes.append((module, get_surrogate(surrogate, **new)))
    return changes
