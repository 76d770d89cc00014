"""What the tables beside this file need and timm lacks: activations as they are, and a deep network that ReLU kills.

    PYTHONPATH=scripts/reproduce python scripts/train.py --device-modules networks --model resnet18_plain ...

`<name>_plain` is timm's network with a surrogate itself in the place of each hidden activation: its value in the
forward pass, its own gradient in the backward pass. The places are those where `<name>_sugar` has SUGAR.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

from timm.layers import to_2tuple
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    model_entrypoint,
    register_model,
)
from torch import Tensor, nn

from timm_sugar import sugarize
from timm_sugar.surgery import replace_activations
from timm_sugar.surrogate import built_in_parameters, get_surrogate

SWIN_TINY = "swin_tiny_patch4_window7_224"
NETWORKS = ("resnet18", "vgg16", "vgg16_bn", "conv2next_tiny", "convnext_atto", SWIN_TINY, "deep_mlp",
            "tf_efficientnet_lite0")  # fmt: skip


class Plain(nn.Module):
    """A surrogate as an ordinary activation: f(x), with the gradient f'(x); any shape, elementwise."""

    def __init__(self, surrogate: str, **parameters: float) -> None:
        super().__init__()
        self.surrogate = get_surrogate(surrogate, **parameters)

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """f(x); `inplace` has no effect."""
        return self.surrogate.evaluate(x)


def activate(model: nn.Module, activation: str, **parameters: float) -> None:
    """Put `activation` ("relu" or a surrogate's name) where `sugarize` would put SUGAR. Raises as `sugarize` does."""
    make = nn.ReLU if activation == "relu" else partial(Plain, activation, **parameters)
    sugarize(model)
    replace_activations(model, make)


class DeepMLP(nn.Module):
    """Equally wide linear layers with ReLU between them and nothing else; weights as in He et al. 2015."""

    def __init__(
        self,
        depth: int = 50,
        width: int = 128,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: Any = 32,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        widths = [in_chans * math.prod(to_2tuple(img_size)), *[width] * (depth - 1)]
        self.layers = nn.Sequential(nn.Flatten())
        for before, after in pairwise(widths):
            self.layers.extend([nn.Linear(before, after), nn.ReLU()])
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        return self.head(self.drop(self.layers(x)))


_CFG = {"url": "", "num_classes": 10, "input_size": (3, 32, 32), "fixed_input_size": True, "first_conv": "layers.1"}
default_cfgs = generate_default_cfgs({"deep_mlp.untrained": {**_CFG, "classifier": "head"}})


@register_model
def deep_mlp(pretrained: bool = False, **kwargs: Any) -> DeepMLP:
    """50 linear layers, 128 units wide."""
    return build_model_with_cfg(DeepMLP, "deep_mlp", pretrained, **kwargs)


def _register(name: str, base: str, exchange: Callable[..., Any], argument: str) -> None:
    """Register `name`: the base, in which `exchange(model, kwargs[argument], **parameters)` replaces activations."""

    def create(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
        chosen = {key: kwargs.pop(key) for key in (argument, *built_in_parameters()) if key in kwargs}
        model = model_entrypoint(base)(pretrained=pretrained, pretrained_cfg=pretrained_cfg, **kwargs)
        exchange(model, **chosen)
        return model

    create.__name__ = create.__qualname__ = name
    cfg = get_pretrained_cfg(base)
    assert cfg is not None
    default_cfgs.update(generate_default_cfgs({f"{name}.untrained": replace(cfg, url="", hf_hub_id=None, tag=None)}))
    globals()[name] = register_model(create)


for _base in NETWORKS:
    _register(f"{_base}_plain", _base, activate, "activation")
_register("deep_mlp_sugar", "deep_mlp", sugarize, "surrogate")
