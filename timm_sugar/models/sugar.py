"""A `<name>_sugar` entrypoint in timm's registry for every timm architecture, with its tags and a few short names.

An entrypoint builds the base model with timm's own entrypoint, weights included, and replaces its activations. So every
argument, feature extractor and method of the base works, and the names of the weights stay the same.
"""

from __future__ import annotations

import fnmatch
import sys
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from typing import Any

from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    get_arch_pretrained_cfgs,
    list_models,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from timm_sugar._saved_config import SUFFIX, parameters_of
from timm_sugar.models import conv2next  # noqa: F401  registers what timm lacks
from timm_sugar.models._weights import SugarTag, load_tags
from timm_sugar.surgery import other_than_relu, resolve_surrogate, sugarize
from timm_sugar.surrogate import Surrogate, built_in_parameters

# Short names, without the suffix: what users call the architecture.
ALIASES = {"swin_tiny": "swin_tiny_patch4_window7_224"}

EVONORM = "its activation is a part of EvoNorm and can't be exchanged by itself"
TAPS = "its forward_intermediates() applies F.relu to the features it returns"
# Tried: a subclass, set as the module's class, whose method calls timm's under a TorchFunctionMode that turns F.relu
# into sugar(). Compiled, exported, traced and pickled it has the right gradient, but TorchScript can't compile it, and
# nothing that lists, exchanges or deploys activations would know of it.
LINEAR = "its linear attention calls F.relu inside a hand-written forward"

# Architectures without a SUGAR variant (patterns of base names), and why: a name works whole or isn't registered.
LEFT_OUT = {
    "ese_vovnet39b_evos": EVONORM,
    "regnetz_*_evos": EVONORM,
    "resnetv2_50d_evos": EVONORM,
    "test_efficientnet_evos": EVONORM,
    "resnetv2_50d_frn": "its activation is the learned threshold (TLU) of filter response normalisation",
    "mobilevitv2_*": LINEAR,
    "legacy_xception": TAPS,
    "nasnetalarge": TAPS,
    "pnasnet5large": TAPS,
}

SUGAR_TAGS: dict[str, SugarTag] = load_tags()  # weights that were trained with SUGAR, by full name

default_cfgs: dict[str, DefaultCfg] = {}  # where timm's register_model looks for the tags of this module's names


def is_left_out(base: str) -> bool:
    """Whether a timm architecture has no SUGAR variant; LEFT_OUT has the reason."""
    return any(fnmatch.fnmatchcase(base, pattern) for pattern in LEFT_OUT)


def list_sugar_models(filter: str | list[str] = "", pretrained: bool = False) -> list[str]:
    """List the names of SUGAR models, as timm.list_models does for all: `timm_sugar.list_models`.

    Args:
        filter: wildcards of names, e.g. "resnet*"; a name has to match one of them.
        pretrained: whether to list only names with weights, with their tags.

    Returns:
        Names that `timm.create_model` takes, in timm's order.

    Example:
        >>> timm_sugar.list_models("resnet18*")
        ['resnet18_sugar', 'resnet18d_sugar']
    """
    names = list_models(filter, pretrained=pretrained)
    return [name for name in names if name.partition(".")[0].endswith(SUFFIX)]


def _create_entrypoint(name: str, base: str) -> Callable[..., nn.Module]:
    """The function that timm calls to build `name`: the base model, its hidden activations replaced by SUGAR."""

    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        surrogate: str | Mapping[str, Any] | None = None,
        save_memory: bool = True,
        **kwargs: Any,
    ) -> nn.Module:
        cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
        tag = None if cfg.source else SUGAR_TAGS.get(f"{name}.{cfg.tag}")
        if tag:  # build what the weights were trained as, except for what the caller asks for
            other = {"surrogate", *built_in_parameters()} if surrogate else set()  # it has parameters of its own
            arguments = {key: value for key, value in tag.model_args.items() if key not in other}
            kwargs = arguments | kwargs
        surrogate = kwargs.pop("surrogate", surrogate or "bsilu")
        parameters = {key: kwargs.pop(key) for key in parameters_of(surrogate) & kwargs.keys()}
        if isinstance(surrogate, Surrogate):
            raise TypeError("create_model takes JSON values: a surrogate's name, and its parameters as arguments")
        resolve_surrogate(surrogate, parameters, "")  # complain before anything is built or downloaded
        if pretrained and tag and (cfg.file, cfg.hf_hub_id) == (tag.cfg.file, tag.cfg.hf_hub_id):
            cfg = replace(cfg, file=tag.fetch(kwargs.get("cache_dir")))
        model = model_entrypoint(base)(pretrained=pretrained, pretrained_cfg=cfg, **kwargs)
        if tag:  # of which timm knows nothing: it adds what the caller gave, which comes first
            model._model_args = arguments
        trained_with = sorted(other_than_relu(model))
        save_memory = save_memory and not kwargs.get("features_only", False)  # features belong to the caller
        sugarize(model, surrogate, save_memory=save_memory, **parameters)
        if pretrained and trained_with and not _is_trained_with_sugar(name, cfg):
            warnings.warn(
                f"{name}: the weights ({cfg.tag or 'untagged'}) were trained with {', '.join(trained_with)} where this "
                "model has ReLU, so they are a starting point that needs fine-tuning. (Weights that were already "
                "fine-tuned with SUGAR load without this warning through checkpoint_path=.)",
                stacklevel=3,
            )
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = (
        f"timm's {base} with SUGAR activations; takes `surrogate`, its parameters, `save_memory`, and what "
        f"{base} takes."
    )
    return create


def _is_trained_with_sugar(name: str, cfg: PretrainedCfg) -> bool:
    """Whether weights come from a saved SUGAR model (Hub, folder: its config names this architecture) or SUGAR_TAGS."""
    return cfg.source in ("hf-hub", "local-dir") or f"{name}.{cfg.tag}" in SUGAR_TAGS


def _tags(name: str, base: str) -> DefaultCfg:
    """Every tag of the base, the default one first, then those of weights trained with SUGAR."""
    cfgs = _tags_of_base(base)
    cfgs |= {full.partition(".")[2]: tag.cfg for full, tag in SUGAR_TAGS.items() if full.partition(".")[0] == name}
    return DefaultCfg(deque(cfgs), cfgs, is_pretrained=any(cfg.has_weights for cfg in cfgs.values()))


def _tags_of_base(base: str) -> dict[str, PretrainedCfg]:
    """The settings of each tag of a timm architecture; `get_arch_pretrained_cfgs` copies them deeply, which is slow."""
    default = getattr(sys.modules[model_entrypoint(base).__module__], "default_cfgs", {}).get(base)
    if not isinstance(default, DefaultCfg):
        return {full.partition(".")[2]: cfg for full, cfg in get_arch_pretrained_cfgs(base).items()}
    return {tag: _on_hub(default.cfgs[tag], f"timm/{base}.{tag}") for tag in default.tags}


def _on_hub(cfg: PretrainedCfg, name: str) -> PretrainedCfg:
    """The settings of a tag with its repository's name, where timm leaves that to the name of the architecture."""
    if cfg.hf_hub_id != "timm/":
        return cfg
    named = copy(cfg)  # dataclasses.replace takes five times as long, for some 2,000 tags
    named.hf_hub_id = name
    return named


def _register(name: str, base: str) -> None:
    default_cfgs[name] = _tags(name, base)
    globals()[name] = register_model(_create_entrypoint(name, base))


_bases = [base for base in list_models() if not base.endswith(SUFFIX) and not is_left_out(base)]
for _name, _base in [*zip(_bases, _bases, strict=True), *ALIASES.items()]:
    _register(_name + SUFFIX, _base)
