"""The mathematics of SUGAR: a table of surrogates, each a (primitive, derivative) pair of pure tensor functions.

The forward pass of a SUGAR unit is ReLU whatever the surrogate; the surrogate's derivative takes the place of ReLU's in
the backward pass ("The Resurrection of the ReLU", arXiv 2505.22074). This file knows formulas and nothing of autograd.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Formula = Callable[..., Tensor]

SELU_ALPHA = 1.6732632423543772848170429916717  # Klambauer et al. 2017, as in torch.nn.SELU
SELU_SCALE = 1.0507009873554804934193349852946


@dataclass(frozen=True)
class Surrogate:
    """A smooth stand-in for ReLU; both functions take `(x, *parameters)` and return a tensor of x's shape.

    `parameters` are the names and default values, in the order in which the functions take them. `formula` identifies
    the derivative, so that a compiler's cache never answers with the gradient of an older one.
    """

    name: str
    primitive: Formula
    derivative: Formula
    parameters: dict[str, float] = field(default_factory=dict)
    formula: str = ""


_surrogates: dict[str, Surrogate] = {}
_POINTS = [0.0, 65504.0, *torch.logspace(-6, 4.8, 2000, dtype=torch.float64, device="cpu").tolist()]
_PROBE = torch.tensor([-p for p in _POINTS] + _POINTS, dtype=torch.float64, device="cpu")


def list_surrogates() -> list[str]:
    """Names of all surrogates, built-in and registered, sorted."""
    return sorted(_surrogates)


def parameter_names() -> set[str]:
    """Names of the parameters of all surrogates."""
    return {key for surrogate in _surrogates.values() for key in surrogate.parameters}


def get_surrogate(name: str) -> Surrogate:
    """The surrogate of that name. Raises ValueError, which lists the names, if there is none."""
    if not isinstance(name, str) or name not in _surrogates:
        raise ValueError(f"unknown surrogate {name!r}; choose one of {', '.join(list_surrogates())}")
    return _surrogates[name]


def register_surrogate(name: str, primitive: Formula, derivative: Formula, **parameters: float) -> None:
    """Add a surrogate of one's own, so that `surrogate=name` works wherever a built-in name does.

    `primitive(x, *values)` and `derivative(x, *values)` are elementwise, made of differentiable torch operations, and
    take the values of `parameters` (name=default, each finite and positive) by position. Half-precision inputs reach
    them as float32. Raises TypeError if the name is no string; ValueError if it is taken, a parameter has a name that
    `sugar()` takes itself, a default is not finite and positive, or the derivative changes x in place or isn't one
    finite value per element for every |x| <= 65504.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"the name of a surrogate must be a string, not {name!r}")
    if name in _surrogates:
        raise ValueError(f"surrogate {name!r} exists already; choose another name")
    if taken := {"x", "inplace", "surrogate"} & parameters.keys():
        raise ValueError(f"parameter {taken.pop()!r} of surrogate {name!r} has a name that sugar() takes itself")
    surrogate = Surrogate(name, primitive, derivative, dict(parameters))
    values = [_checked(surrogate, key, value) for key, value in parameters.items()]
    for x in (_PROBE.clone(), _PROBE.float()):
        slope = derivative(x, *values)
        if slope.shape != x.shape or not slope.isfinite().all():
            raise ValueError(f"the derivative of surrogate {name!r} must return one finite value per element")
        if not torch.equal(x, _PROBE.to(x.dtype)):
            raise ValueError(f"the derivative of surrogate {name!r} must not change its input in place")
    _surrogates[name] = replace(surrogate, formula=_fingerprint(derivative, values))


def resolve_parameters(name: str, parameters: dict[str, Any]) -> list[float]:
    """Values of a surrogate's parameters, defaults filled in, in the order of its functions.

    Raises ValueError for an unknown surrogate or a value that is not finite and positive, TypeError for an unknown
    parameter or a value that is no number.
    """
    surrogate = get_surrogate(name)
    unknown = sorted(parameters.keys() - surrogate.parameters.keys())
    if unknown:
        known = ", ".join(surrogate.parameters) or "none"
        raise TypeError(f"surrogate {name!r} has no parameter {unknown[0]!r} (it takes: {known})")
    return [_checked(surrogate, key, parameters.get(key, default)) for key, default in surrogate.parameters.items()]


def surrogate_derivative(x: Tensor, name: str, values: list[float]) -> Tensor:
    """Derivative of the surrogate at x, any shape, elementwise; for float16 and bfloat16 in float32."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return get_surrogate(name).derivative(x.float() if half else x, *values)


def _checked(surrogate: Surrogate, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{key} of surrogate {surrogate.name!r} must be a number, not {value!r}")
    if not 0 < value <= sys.float_info.max:  # false for NaN
        raise ValueError(f"{key} of surrogate {surrogate.name!r} must be finite and positive, not {value!r:.40}")
    return float(value)


def _fingerprint(derivative: Formula, values: list[float]) -> str:
    """Hash of what a derivative returns, with default and other parameters: a new formula has a new fingerprint."""
    digest = hashlib.sha256()
    for scale in (1.0, 0.1, 1.5, 10.0):
        for x in (_PROBE.clone(), _PROBE.float()):
            digest.update(derivative(x, *(scale * value for value in values)).numpy().tobytes())
    return digest.hexdigest()[:12]


def _finite(x: Tensor) -> Tensor:
    """x without its infinities, as the factor of something that has long vanished at ±1000. NaN stays NaN.

    A loop spends four operations on either bound, so only a factor is bounded.
    """
    return x.clamp(-1e3, 1e3)


def _sigmoid_derivative(s: Tensor) -> Tensor:
    """s (1 - s) for s = σ(x), as s - s², which is one pass over memory."""
    return torch.addcmul(s, s, s, value=-1)


def _bsilu(x: Tensor, alpha: float) -> Tensor:
    """(x + α) σ(x) - α/2, eq. 7."""
    return (x + alpha) * torch.sigmoid(x) - alpha / 2


def _bsilu_derivative(x: Tensor, alpha: float) -> Tensor:
    """σ(x) + (x + α) σ(x) (1 - σ(x)), eq. 8."""
    s = torch.sigmoid(x)
    return torch.addcmul(s, _finite(x) + alpha, _sigmoid_derivative(s))


def _nelu(x: Tensor, alpha: float) -> Tensor:
    """x for x > 0, else -α / (1 + x²): the primitive of the derivative below, up to its jump of α at 0."""
    return torch.where(x > 0, x, -alpha / (1 + x * x))


def _nelu_derivative(x: Tensor, alpha: float) -> Tensor:
    """1 for x > 0, else 2 α x / (1 + x²)²."""
    negative = x.clamp(min=-(torch.finfo(x.dtype).max ** 0.5) / 2, max=0)  # so that x² is finite, also for -inf
    t = 1 / (1 + negative * negative)
    return torch.sign(x).clamp(min=0) + 2 * alpha * (negative * t) * t  # torch.where takes 20 times as long on a CPU


def _elu_derivative(x: Tensor, alpha: float) -> Tensor:
    """1 for x > 0, else α exp(x)."""
    return torch.where(x > 0, torch.ones_like(x), alpha * torch.exp(x.clamp(max=0)))


def _selu_derivative(x: Tensor) -> Tensor:
    """The scale times ELU's derivative, with the constants of Klambauer et al."""
    return SELU_SCALE * _elu_derivative(x, SELU_ALPHA)


def _gelu_derivative(x: Tensor) -> Tensor:
    """Φ(x) + x φ(x), with the normal distribution's Φ and density φ."""
    x = _finite(x)  # in the square, too, which is differentiated once more
    return (1 + torch.erf(x * math.sqrt(0.5))) / 2 + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _silu_derivative(x: Tensor) -> Tensor:
    """σ(x) + x σ(x) (1 - σ(x))."""
    s = torch.sigmoid(x)
    return torch.addcmul(s, _finite(x), _sigmoid_derivative(s))


def _mish_derivative(x: Tensor) -> Tensor:
    """t + x σ(x) (1 - t²) with t = tanh(softplus(x))."""
    t = torch.tanh(F.softplus(x))
    return t + _finite(x) * torch.sigmoid(x) * (1 - t * t)


def _leaky_relu_derivative(x: Tensor, negative_slope: float) -> Tensor:
    """1 for x > 0, else the slope; NaN stays NaN."""
    return torch.where(x > 0, torch.ones_like(x), torch.where(x.isnan(), x, torch.full_like(x, negative_slope)))


# Defaults: alpha of B-SiLU and NeLU from the paper, the others PyTorch's.
register_surrogate("bsilu", _bsilu, _bsilu_derivative, alpha=1.67)
register_surrogate("nelu", _nelu, _nelu_derivative, alpha=0.01)
register_surrogate("elu", F.elu, _elu_derivative, alpha=1.0)
register_surrogate("selu", F.selu, _selu_derivative)
register_surrogate("gelu", F.gelu, _gelu_derivative)
register_surrogate("silu", F.silu, _silu_derivative)
register_surrogate("mish", F.mish, _mish_derivative)
register_surrogate("leaky_relu", F.leaky_relu, _leaky_relu_derivative, negative_slope=0.01)
