"""What timm's `save_for_hf` writes of a model, so that it comes back as what it was.

timm builds a saved model again from the name of its architecture and the arguments of `create_model`; both are
attributes of the model, which timm's own methods change as well (`reset_classifier`, `set_input_size`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from timm_sugar._places import RELU, activation_of, find_places, name_of
from timm_sugar.activation import SUGAR
from timm_sugar.surrogate import built_in_parameters, get_surrogate, list_surrogates

SUFFIX = "_sugar"  # of the names under which timm builds a model with SUGAR
_CONFIG, _ARGUMENTS = "pretrained_cfg", "_model_args"


class SavedConfig:
    """The architecture and the arguments of a model of timm's."""

    def __init__(self, model: nn.Module) -> None:
        places = list(find_places(model))
        self.model = model
        self.sugar = {place.name: place.activation for place in places if isinstance(place.activation, SUGAR)}
        self.relu = [place.name for place in places if name_of(place.activation) in RELU]
        self.is_whole = len(self.sugar) == len(places)
        self.before = {key: vars(model)[key] for key in (_CONFIG, _ARGUMENTS)}

    @property
    def is_of_sugar(self) -> bool:
        """Whether the architecture is one with SUGAR already."""
        return str(self.before[_CONFIG]["architecture"]).endswith(SUFFIX)

    def write(self) -> None:
        """Name the architecture with SUGAR, and the surrogates that the model has now."""
        config, arguments = (vars(self.model)[key] for key in (_CONFIG, _ARGUMENTS))
        architecture = str(config["architecture"]).removesuffix(SUFFIX) + SUFFIX
        settings = {name: _as_json(module) for name, module in self.sugar.items()}
        first = next(iter(settings.values()))
        alike = self.is_whole and all(setting == first for setting in settings.values())
        # ReLU may stand where the architecture has another activation; as a surrogate it computes the same.
        settings |= {name: {"surrogate": "relu"} for name in self.relu}
        old = {"surrogate", *parameters_of(arguments.get("surrogate"))}
        other = {key: value for key, value in arguments.items() if key not in old}
        vars(self.model)[_CONFIG] = {**config, "architecture": architecture}
        vars(self.model)[_ARGUMENTS] = other | (first if alike else {"surrogate": settings})

    def undo(self) -> None:
        """Name what was named before."""
        vars(self.model).update(self.before)


def write_configs(model: nn.Module, new: Collection[Any] = ()) -> list[SavedConfig]:
    """Write the configs of a model, and of models inside, that a change of surrogates concerns; returns them.

    `new` are the modules in whose place was something else than ReLU, which the architecture without SUGAR computes.
    """
    configs = [config for config in map(SavedConfig, filter(_is_of_timm, model.modules())) if config.sugar]
    concerned = [
        config
        for config in configs
        if config.is_of_sugar or any(one is other for one in config.sugar.values() for other in new)
    ]
    for config in concerned:
        config.write()
    return concerned


def _is_of_timm(module: nn.Module) -> bool:
    """Whether `create_model` made a module, of an architecture with a name."""
    config = vars(module).get(_CONFIG)
    return isinstance(config, dict) and "architecture" in config and isinstance(vars(module).get(_ARGUMENTS), dict)


def _as_json(module: SUGAR) -> dict[str, Any]:
    surrogate = activation_of(module)
    return {"surrogate": surrogate.name, **surrogate.parameters}


def parameters_of(surrogate: Any) -> set[str]:
    """Names that `create_model` takes as parameters of the surrogate, not as arguments of the base."""
    own = get_surrogate(surrogate).parameters if isinstance(surrogate, str) and surrogate in list_surrogates() else {}
    return built_in_parameters() | own.keys()
