"""What the tables beside this file need and timm lacks: activations as they are, small networks, and more gradients.

    PYTHONPATH=scripts/reproduce python scripts/train.py --device-modules networks --model resnet18_plain ...

`<name>_plain` is timm's network with a surrogate itself in the place of each hidden activation: its value in the
forward pass, its own gradient in the backward pass. The places are those where `<name>_sugar` has SUGAR.

Importing this file registers further surrogates, which take B-SiLU's derivative apart: its leak (`leaky_relu` with
slope 0.5), the size of its steps (derivatives at unit gain), its shape (`bsilu_negative`); and ReLU6's. The gain of a
derivative s' is sqrt(2 E[s'(z)^2]) for z ~ N(0, 1): how much larger than with ReLU it makes gradients, layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    model_entrypoint,
    register_model,
)
from torch import Tensor, nn

from timm_sugar import register_surrogate, sugarize
from timm_sugar.surgery import replace_activations
from timm_sugar.surrogate import built_in_parameters, get_surrogate

SWIN_TINY = "swin_tiny_patch4_window7_224"
NETWORKS = ("resnet18", "vgg16", "vgg16_bn", "conv2next_tiny", "convnext_atto", SWIN_TINY, "deep_mlp",
            "tf_efficientnet_lite0", "resnet9", "vgg11_narrow")  # fmt: skip
OWN = ("deep_mlp", "resnet9", "vgg11_narrow")  # those of them that timm lacks, so they have no SUGAR variant yet
BSILU_GAIN, LEAKY_GAIN = 1.3035, 1.25**0.5  # of alpha 1.67 and of slope 0.5


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


def _scaled(name: str, factor: float, **parameters: float) -> dict[str, Callable[[Tensor], Tensor]]:
    """Primitive and derivative of a built-in surrogate, times a factor."""
    surrogate = get_surrogate(name, **parameters)
    return {
        "primitive": lambda x: factor * surrogate.evaluate(x),
        "derivative": lambda x: factor * surrogate.derivative(x, *surrogate.values),
    }


def _negative_half(name: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Primitive and derivative that are those of a built-in surrogate below 0, and ReLU's above."""
    surrogate = get_surrogate(name)
    return {
        "primitive": lambda x: torch.where(x > 0, x, surrogate.evaluate(x)),
        "derivative": lambda x: torch.where(x > 0, torch.ones_like(x), surrogate.derivative(x, *surrogate.values)),
    }


GRADIENTS: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "bsilu_unit": _scaled("bsilu", 1 / BSILU_GAIN),
    "leaky_relu_unit": _scaled("leaky_relu", 1 / LEAKY_GAIN, negative_slope=0.5),
    "bsilu_negative": _negative_half("bsilu"),
    "relu6": {"primitive": F.relu6, "derivative": lambda x: torch.sign(x).clamp(min=0) * (x < 6)},
}
for _name, _functions in GRADIENTS.items():
    register_surrogate(_name, primitive=_functions["primitive"], derivative=_functions["derivative"])


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


def _convolution(inputs: int, outputs: int, norm: bool = True) -> list[nn.Module]:
    """A 3 x 3 convolution and ReLU, with BatchNorm between them or a bias."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    return [convolution, *([nn.BatchNorm2d(outputs)] if norm else []), nn.ReLU()]


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape that f keeps."""
        return x + self.layers(x)


class SmallNet(nn.Module):
    """Convolutions, the maximum over what is left of the picture, and a classifier."""

    def __init__(self, layers: list[nn.Module], width: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layers = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.drop, self.head = nn.Dropout(drop_rate), nn.Linear(width, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)  # maxima are large, so that PyTorch's weights start at a loss of 10
        nn.init.zeros_(self.head.bias)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        return self.head(self.drop(self.layers(x)))


class ResNet9(SmallNet):
    """Eight convolutions with BatchNorm, two residual blocks among them: the ResNet-9 of DAWNBench, narrower."""

    def __init__(self, width: int = 8, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0) -> None:
        a, b, c, d = (width * factor for factor in (1, 2, 4, 8))
        layers = [
            *_convolution(in_chans, a), *_convolution(a, b), nn.MaxPool2d(2),
            Residual(*_convolution(b, b), *_convolution(b, b)),
            *_convolution(b, c), nn.MaxPool2d(2), *_convolution(c, d), nn.MaxPool2d(2),
            Residual(*_convolution(d, d), *_convolution(d, d)),
        ]  # fmt: skip
        super().__init__(layers, d, num_classes, drop_rate)


class NarrowVGG11(SmallNet):
    """The eight convolutions of VGG-11, a quarter as wide, without normalisation, and a linear classifier."""

    def __init__(self, width: int = 16, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0) -> None:
        layers, before = [], in_chans
        for i, factor in enumerate((1, 2, 4, 4, 8, 8, 8, 8)):
            layers += _convolution(before, before := factor * width, norm=False)
            layers += [nn.MaxPool2d(2)] if i in (0, 1, 3, 5) else []
        super().__init__(layers, before, num_classes, drop_rate)


_CFG = {"url": "", "num_classes": 10, "input_size": (3, 32, 32), "fixed_input_size": True, "first_conv": "layers.1"}
_CFGS = {"deep_mlp": _CFG, **{name: {**_CFG, "fixed_input_size": False, "first_conv": "layers.0"} for name in OWN[1:]}}
default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": {**cfg, "classifier": "head"} for name, cfg in _CFGS.items()}
)


@register_model
def deep_mlp(pretrained: bool = False, **kwargs: Any) -> DeepMLP:
    """50 linear layers, 128 units wide."""
    return build_model_with_cfg(DeepMLP, "deep_mlp", pretrained, **kwargs)


@register_model
def resnet9(pretrained: bool = False, **kwargs: Any) -> ResNet9:
    """ResNet-9, 8 channels wide at its start."""
    return build_model_with_cfg(ResNet9, "resnet9", pretrained, **kwargs)


@register_model
def vgg11_narrow(pretrained: bool = False, **kwargs: Any) -> NarrowVGG11:
    """VGG-11 without normalisation, 16 channels wide at its start."""
    return build_model_with_cfg(NarrowVGG11, "vgg11_narrow", pretrained, **kwargs)


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
for _base in OWN:
    _register(f"{_base}_sugar", _base, sugarize, "surrogate")
