"""The mathematics of SUGAR: a table of surrogates, each a (primitive, derivative) pair of pure tensor functions.

The forward pass of a SUGAR unit is ReLU whatever the surrogate; the surrogate's derivative takes the place of ReLU's in
the backward pass ("The Resurrection of the ReLU", arXiv 2505.22074). This file knows formulas and nothing of autograd.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
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
    the derivative's code, so that a compiler's cache never answers with the gradient of an older formula.
    """

    name: str
    primitive: Formula
    derivative: Formula
    parameters: dict[str, float] = field(default_factory=dict)
    formula: str = ""


_surrogates: dict[str, Surrogate] = {}


def list_surrogates() -> list[str]:
    """Names of all surrogates, built-in and registered, sorted."""
    return sorted(_surrogates)


def get_surrogate(name: str) -> Surrogate:
    """The surrogate of that name. Raises ValueError, which lists the names, if there is none."""
    if not isinstance(name, str) or name not in _surrogates:
        raise ValueError(f"unknown surrogate {name!r}; choose one of {', '.join(list_surrogates())}")
    return _surrogates[name]


def register_surrogate(name: str, primitive: Formula, derivative: Formula, **parameters: float) -> None:
    """Add a surrogate of one's own, so that `surrogate=name` works wherever a built-in name does.

    `primitive(x, *values)` and `derivative(x, *values)` are elementwise, made of differentiable torch operations, and
    take the values of `parameters` (name=default, each finite and positive) by position. Half-precision inputs reach
    them as float32. Raises ValueError if the name is taken, a default is no positive number, or the derivative doesn't
    return one finite value per element.
    """
    if name in _surrogates:
        raise ValueError(f"surrogate {name!r} exists already; choose another name")
    surrogate = Surrogate(name, primitive, derivative, dict(parameters), _fingerprint(derivative))
    values = [_checked(surrogate, key, value) for key, value in parameters.items()]
    probe = torch.linspace(-3, 3, 7, dtype=torch.float64, device="cpu")
    slope = derivative(probe, *values)
    if slope.shape != probe.shape or not slope.isfinite().all():
        raise ValueError(f"the derivative of surrogate {name!r} must return one finite value per element")
    _surrogates[name] = surrogate


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
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{key} of surrogate {surrogate.name!r} must be finite and positive, not {value!r}")
    return float(value)


def _fingerprint(function: Formula) -> str:
    """Hash of a formula's code, of the functions it calls, and of the numbers it reads from its module or closure."""
    digest = hashlib.sha256()
    pending, seen = [function], set()
    while pending:
        function = pending.pop()
        if not isinstance(function, FunctionType) or function in seen or function.__module__.startswith("torch"):
            continue
        seen.add(function)
        digest.update(function.__code__.co_code + repr(function.__code__.co_consts).encode())
        read = inspect.getclosurevars(function)
        for name, value in sorted({**read.globals, **read.nonlocals}.items()):
            pending.append(value)
            digest.update(f"{name}={value!r}".encode() if isinstance(value, (int, float, str)) else name.encode())
    return digest.hexdigest()[:12]


def _finite(x: Tensor) -> Tensor:
    """x without its infinities: every derivative below has reached its limit at ±1000, and NaN stays NaN."""
    return x.clamp(-1e3, 1e3)


def _bsilu(x: Tensor, alpha: float) -> Tensor:
    """(x + α) σ(x) - α/2, eq. 7."""
    return (x + alpha) * torch.sigmoid(x) - alpha / 2


def _bsilu_derivative(x: Tensor, alpha: float) -> Tensor:
    """σ(x) + (x + α) σ(x) (1 - σ(x)), eq. 8."""
    x = _finite(x)
    s = torch.sigmoid(x)
    return s + (x + alpha) * s * (1 - s)


def _nelu(x: Tensor, alpha: float) -> Tensor:
    """x for x > 0, else -α / (1 + x²): the primitive of the derivative below, up to its jump of α at 0."""
    return torch.where(x > 0, x, -alpha / (1 + x * x))


def _nelu_derivative(x: Tensor, alpha: float) -> Tensor:
    """1 for x > 0, else 2 α x / (1 + x²)²."""
    negative = x.clamp(min=-(torch.finfo(x.dtype).max ** 0.5) / 2, max=0)  # so that x² is finite, also for -inf
    t = 1 / (1 + negative * negative)
    return torch.where(x > 0, torch.ones_like(x), 2 * alpha * (negative * t) * t)


def _elu_derivative(x: Tensor, alpha: float) -> Tensor:
    """1 for x > 0, else α exp(x)."""
    return torch.where(x > 0, torch.ones_like(x), alpha * torch.exp(x.clamp(max=0)))


def _selu_derivative(x: Tensor) -> Tensor:
    """The scale times ELU's derivative, with the constants of Klambauer et al."""
    return SELU_SCALE * _elu_derivative(x, SELU_ALPHA)


def _gelu_derivative(x: Tensor) -> Tensor:
    """Φ(x) + x φ(x), with the normal distribution's Φ and density φ."""
    x = _finite(x)
    return (1 + torch.erf(x * math.sqrt(0.5))) / 2 + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _silu_derivative(x: Tensor) -> Tensor:
    """σ(x) (1 + x (1 - σ(x)))."""
    x = _finite(x)
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _mish_derivative(x: Tensor) -> Tensor:
    """t + x σ(x) (1 - t²) with t = tanh(softplus(x))."""
    x = _finite(x)
    t = torch.tanh(F.softplus(x))
    return t + x * torch.sigmoid(x) * (1 - t * t)


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
