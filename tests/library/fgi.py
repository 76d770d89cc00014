"""The oracle of the gradient tests: forward gradient injection with PyTorch's own derivatives.

It shares no code with the package: the primitives are written here once more or are PyTorch's, and autograd, not a
formula, gives their derivatives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRIMITIVES: dict[str, Callable[..., Tensor]] = {
    "bsilu": lambda x, alpha=1.67: (x + alpha) * torch.sigmoid(x) - alpha / 2,
    "nelu": lambda x, alpha=0.01: torch.where(x > 0, x, -alpha / (1 + x.clamp(max=0) ** 2)),
    "elu": F.elu,
    "selu": F.selu,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "leaky_relu": F.leaky_relu,
    "relu": lambda x, gain=1.0: gain * F.relu(x),
}

# Each surrogate with a parameter that is not its default, so that a dropped parameter shows.
SETTINGS: dict[str, dict[str, float]] = {
    "bsilu": {"alpha": 1.1},
    "nelu": {"alpha": 0.3},
    "elu": {"alpha": 0.7},
    "selu": {},
    "gelu": {},
    "silu": {},
    "mish": {},
    "leaky_relu": {"negative_slope": 0.2},
    "relu": {"gain": 1.3},
}


def slope(x: Tensor, surrogate: str = "bsilu", **parameters: float) -> Tensor:
    """Derivative of a surrogate at x in float64, by autograd of the primitive."""
    with torch.enable_grad():
        leaf = x.detach().double().requires_grad_()
        return torch.autograd.grad(PRIMITIVES[surrogate](leaf, **parameters).sum(), leaf)[0]


class FGI(nn.Module):
    """ReLU with an injected gradient (arXiv 2406.00177, the direct form); no second derivative, not for compilers."""

    def __init__(self, surrogate: str = "bsilu", **parameters: float) -> None:
        super().__init__()
        self.surrogate, self.parameters_ = surrogate, parameters

    def forward(self, x: Tensor) -> Tensor:
        m = x * slope(x, self.surrogate, **self.parameters_).to(x.dtype)
        return m - m.detach() + F.relu(x).detach()


def injected(x: Tensor, surrogate: str = "bsilu", **parameters: float) -> Tensor:
    """FGI in the form that has all derivatives, under any transform: its value is relu(x) up to rounding."""
    primitive = PRIMITIVES[surrogate](x, **parameters)
    return primitive - primitive.detach() + F.relu(x).detach()


def inject(model: nn.Module, types: tuple[type, ...], surrogate: str = "bsilu", **parameters: float) -> nn.Module:
    """Put FGI in the place of every activation of the given types, in place."""
    for owner in list(model.modules()):
        for key, child in owner._modules.items():
            if isinstance(child, types):
                owner._modules[key] = FGI(surrogate, **parameters)
    return model
