"""The mathematics of SUGAR: a table of surrogates, each a derivative and, where there is one, its primitive.

The forward pass of a SUGAR unit is ReLU whatever the surrogate; the surrogate's derivative takes the place of ReLU's in
the backward pass ("The Resurrection of the ReLU", arXiv 2505.22074). This file knows formulas and nothing of autograd.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Formula = Callable[..., Tensor]
SAME = "same"  # in place of a surrogate's name: each activation keeps its own derivative

SELU_ALPHA = 1.6732632423543772848170429916717  # Klambauer et al. 2017, as in torch.nn.SELU
SELU_SCALE = 1.0507009873554804934193349852946

# Names that sugar(), sugarize(), SurrogateSchedule, timm.create_model and timm's networks take themselves.
_RESERVED = frozenset(
    {"x", "input", "inplace", "surrogate", "save_memory", "model", "model_name", "filter_fn", "types", "example"}
    | {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path", "cache_dir"}
    | {"scriptable", "exportable", "no_jit", "num_classes", "in_chans", "global_pool", "img_size", "patch_size"}
    | {"features_only", "out_indices", "output_stride", "drop_rate", "drop_path_rate", "drop_block_rate", "act_layer"}
    | {"shape", "updates"}
    | {"norm_layer", "width", "scale", "depth", "embed_dim", "device", "dtype"}
    | {"values", "formula", "scope", "overwrites", "run_time", "made_with", "training", "set_surrogate"}
    | {*dir(torch.nn.Module)}
)


@dataclass(frozen=True)
class Surrogate:
    """A smooth stand-in for ReLU, with the values of its parameters.

    `get_surrogate` returns one; nobody else needs to make one.

    Attributes:
        name: by which `sugar`, `SUGAR`, `sugarize` and `create_model` know it.
        derivative: takes `(x, *values)`, x of any shape, and returns a tensor of that shape.
        primitive: the function that `derivative` is the derivative of, taking the same arguments; None if it was
            registered without.
        parameters: names and values, in the order in which the functions take them.
        formula: identifies the derivative, so that a compiler's cache never answers with that of an older one.
        may_be_zero: names of the parameters for which the derivative is finite at 0.

    Example:
        >>> timm_sugar.get_surrogate("bsilu").derivative(torch.zeros(1), 1.67)
        tensor([0.9175])
    """

    name: str
    derivative: Formula
    primitive: Formula | None = None
    parameters: dict[str, float] = field(default_factory=dict)
    formula: str = ""
    may_be_zero: frozenset[str] = frozenset()

    @property
    def values(self) -> list[float]:
        """Values of the parameters, in the order in which the functions take them."""
        return list(self.parameters.values())

    def evaluate(self, x: Tensor) -> Tensor:
        """Compute the primitive at x, any shape. Raises ValueError if the surrogate was registered without one."""
        if self.primitive is None:
            raise ValueError(f"surrogate {self.name!r} has no primitive: give one to register_surrogate")
        return self.primitive(x, *self.values)


_surrogates: dict[str, Surrogate] = {}
# Also those that were overwritten, by name and formula: what was made with one keeps it.
_known: dict[tuple[str, str], Surrogate] = {}
_POINTS = [0.0, 65504.0, *torch.logspace(-6, 4.8, 2000, dtype=torch.float64, device="cpu").tolist()]
_PROBE = torch.tensor([-p for p in _POINTS] + _POINTS, dtype=torch.float64, device="cpu")


def list_surrogates() -> list[str]:
    """List the names of all surrogates, built-in and registered, sorted.

    Example:
        >>> timm_sugar.list_surrogates()
        ['bsilu', 'elu', 'gelu', 'leaky_relu', 'mish', 'nelu', 'relu', 'selu', 'silu']
    """
    return sorted(_surrogates)


def built_in_parameters() -> set[str]:
    """Names of the parameters of all built-in surrogates."""
    return {key for name in _BUILT_IN for key in _surrogates[name].parameters}


def get_surrogate(surrogate: str | Surrogate, /, **parameters: Any) -> Surrogate:
    """Look a surrogate up, with its default parameters or with others.

    Args:
        surrogate: a name of `list_surrogates()`, or what this function returned before.
        parameters: values, e.g. `alpha=0.05`; finite, above 0, or 0 where the formula allows it.

    Returns:
        The surrogate, whose `parameters` hold the values.

    Raises:
        ValueError: for an unknown name, a surrogate that was not registered, or a value out of range.
        TypeError: for an unknown parameter or a value that is no number.

    Example:
        >>> timm_sugar.get_surrogate("nelu", alpha=0.05).parameters
        {'alpha': 0.05}
    """
    found = find_surrogate(surrogate)
    if not parameters:
        return found if found is surrogate else replace(found, parameters=dict(found.parameters))  # the caller's own
    # torch.compile knows no keys() - keys() in torch 2.6 to 2.8.
    unknown = sorted([key for key in parameters if key not in found.parameters])
    if unknown:
        known = ", ".join(found.parameters) or "none"
        raise TypeError(f"surrogate {found.name!r} has no parameter {unknown[0]!r} (it takes: {known})")
    values = {key: _checked(found, key, parameters.get(key, value)) for key, value in found.parameters.items()}
    return replace(found, parameters=values)


def find_surrogate(surrogate: str | Surrogate) -> Surrogate:
    """`get_surrogate` without parameters, as it stands in the table: not to be changed. Raises the same."""
    if isinstance(surrogate, Surrogate):
        if (surrogate.name, surrogate.formula) not in _known:
            raise ValueError(f"surrogate {surrogate.name!r} is not registered: register_surrogate() does it")
        return surrogate
    if not isinstance(surrogate, str) or surrogate not in _surrogates:
        raise ValueError(f"unknown surrogate {surrogate!r}; choose one of {', '.join(list_surrogates())}")
    return _surrogates[surrogate]


def known_surrogate(name: str, formula: str) -> Surrogate:
    """The surrogate that was registered with this formula; today's of the name, if none was in this process."""
    return _known.get((name, formula)) or find_surrogate(name)


def register_surrogate(
    name: str, *, derivative: Formula, primitive: Formula | None = None, overwrite: bool = False, **defaults: float
) -> None:
    """Add a surrogate of one's own, so that `surrogate=name` works wherever a built-in name does.

    Both functions are elementwise, made of differentiable torch operations, and take `(x, *values)`. They depend on
    these alone: whatever else they read, compiled code keeps as it was at first. Half-precision inputs reach them as
    float32. Registering the same surrogate once more, as a notebook does, changes nothing; formulas that agree at some
    4,000 points up to |x| = 65,504 count as the same. Saved models and exported programs keep the name alone:
    register the same formula wherever they are loaded.

    Args:
        name: a new name.
        derivative: what the backward pass multiplies with; one finite value per element for every |x| <= 65504.
        primitive: a function with that derivative. Without one, the surrogate can't be evaluated as an activation.
        overwrite: replace a registered surrogate of that name by another formula. What was made before keeps the old
            one: modules, graphs, and forward passes whose backward pass is still to come.
        defaults: names and default values of the parameters, each finite and above 0, or 0 where the formula allows it.

    Raises:
        TypeError: if the name is no string or a default no number.
        ValueError: if the name is taken, a parameter's name is taken by PyTorch, timm or this package, the functions
            take the parameters in another order, a default is out of range, or the derivative changes x in place, isn't
            finite, or isn't that of the primitive.

    Example:
        >>> timm_sugar.register_surrogate(
        ...     "softplus", derivative=lambda x, beta: torch.sigmoid(beta * x), beta=2.0)
        >>> y = timm_sugar.sugar(torch.randn(3, requires_grad=True), "softplus", beta=3.0)
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"the name of a surrogate must be a string, not {name!r}")
    if name == SAME:
        raise ValueError(f"the name {SAME!r} stands for each activation's own derivative: choose another name")
    if taken := sorted(key for key in defaults if key in _RESERVED or key.startswith("_")):
        raise ValueError(
            f"parameter {taken[0]!r} of surrogate {name!r} has a name that timm_sugar, timm or PyTorch takes itself"
        )
    _check_order(name, derivative, list(defaults))
    _check_order(name, primitive, list(defaults))
    given = Surrogate(name, derivative, primitive, dict(defaults))
    given = replace(given, may_be_zero=frozenset(key for key in defaults if _is_finite_at_zero(given, key)))
    given = replace(given, parameters={key: _checked(given, key, value) for key, value in defaults.items()})
    _check_derivative(given)
    _check_primitive(given)
    given = replace(given, formula=_fingerprint(derivative, given.parameters))
    old = _surrogates.get(name)
    if name in _BUILT_IN or (
        old and not overwrite and (old.formula, old.parameters) != (given.formula, given.parameters)
    ):
        how = "choose another name" + ("" if name in _BUILT_IN else " or say overwrite=True")
        raise ValueError(f"surrogate {name!r} exists already: {how}")
    _surrogates[name] = _known[name, given.formula] = given


def surrogate_derivative(x: Tensor, surrogate: str | Surrogate, values: list[float]) -> Tensor:
    """Compute the derivative of a surrogate at x, any shape, elementwise; for float16 and bfloat16 in float32."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return find_surrogate(surrogate).derivative(x.float() if half else x, *values)


def is_built_in(name: str) -> bool:
    """Whether a surrogate comes with this package."""
    return name in _BUILT_IN


def _checked(surrogate: Surrogate, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # NumPy's numbers are Real
        raise TypeError(f"{key} of surrogate {surrogate.name!r} must be a number, not {value!r}")
    try:
        number = float(value)
    except OverflowError:  # of an integer
        number = math.inf
    may_be_zero = key in surrogate.may_be_zero
    if not (0 < number < math.inf or (number == 0 and may_be_zero)):  # NaN is not
        least = "0 or more" if may_be_zero else "positive"
        raise ValueError(f"{key} of surrogate {surrogate.name!r} must be finite and {least}, not {value!r:.40}")
    return number + 0.0  # no -0.0


def _is_finite_at_zero(surrogate: Surrogate, key: str) -> bool:
    """Whether the derivative is finite everywhere with this parameter at 0."""
    try:
        values = [0.0 if name == key else float(value) for name, value in surrogate.parameters.items()]
        return bool(surrogate.derivative(_PROBE.clone(), *values).isfinite().all())
    except (ArithmeticError, TypeError, ValueError):
        return False


def _check_order(name: str, function: Formula | None, parameters: list[str]) -> None:
    try:
        taken = list(inspect.signature(function).parameters) if function else []
    except ValueError:  # some of PyTorch's have none
        return
    for place, key in enumerate(taken):
        if key in parameters and parameters.index(key) + 1 != place:  # x comes first
            raise ValueError(
                f"surrogate {name!r} is given {', '.join(parameters)} as parameters, but its function takes "
                f"{', '.join(taken)}: x comes first, then they in the same order"
            )


def _check_derivative(surrogate: Surrogate) -> None:
    for x in (_PROBE.clone(), _PROBE.float()):
        slope = surrogate.derivative(x, *surrogate.values)
        if slope.shape != x.shape or not slope.isfinite().all():
            raise ValueError(f"the derivative of surrogate {surrogate.name!r} must return one finite value per element")
        for values in _tried(surrogate.values):  # x.mul_(alpha) changes nothing at a default of 1
            x = _PROBE.to(x.dtype, copy=True)
            surrogate.derivative(x, *values)
            if not torch.equal(x, _PROBE.to(x.dtype)):
                raise ValueError(f"the derivative of surrogate {surrogate.name!r} must not change its input in place")


def _check_primitive(surrogate: Surrogate) -> None:
    """Compare the derivative with central differences of the primitive; a kink of the latter falls between points."""
    if surrogate.primitive is None:
        return
    x, step = torch.linspace(-12, 12, 4802, dtype=torch.float64, device="cpu"), 1e-6
    value = {shift: surrogate.primitive(x + shift * step, *surrogate.values) for shift in (-1, 1)}
    difference = (value[1] - value[-1]) / (2 * step)
    slope = surrogate.derivative(x, *surrogate.values)
    wrong = ~torch.isclose(slope, difference, rtol=1e-4, atol=1e-6)
    if wrong.sum() > 4:  # a few points may lie at kinks
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"surrogate {surrogate.name!r}: the derivative at {x[at]:.3g} is {slope[at]:.6g}, but the primitive rises "
            f"by {difference[at]:.6g} there; check that derivative= and primitive= are not exchanged"
        )


def _tried(values: list[float]) -> list[list[float]]:
    """Default values of the parameters, and others."""
    others = [[scale * (value or 1.0) for value in values] for scale in (0.1, 1.5, 10.0)]
    if len(values) > 1:  # each by itself, which tells apart two whose defaults are equal
        others += [[1.5 * (v or 1.0) if i == one else v for i, v in enumerate(values)] for one in range(len(values))]
    return [values, *others]


def _fingerprint(derivative: Formula, parameters: dict[str, float]) -> str:
    """Hash of what a derivative returns, with default and other parameters: a new formula has a new fingerprint."""
    digest = hashlib.sha256(" ".join(parameters).encode())
    for tried in _tried(list(parameters.values())):
        for x in (_PROBE.clone(), _PROBE.float()):
            digest.update(derivative(x, *tried).numpy().tobytes())
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
    step = torch.sign(x).clamp(min=0)  # torch.where takes 20 times as long on a CPU
    return torch.addcmul(step, alpha * (negative * t), t, value=2)  # 2 * alpha would be float64 in a compiled kernel


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
    slope = negative_slope * torch.ones_like(x)  # full_like would bake a parameter that changes at run time
    return torch.where(x > 0, torch.ones_like(x), torch.where(x.isnan(), x, slope))


def _relu(x: Tensor, gain: float) -> Tensor:
    """gain * x for x > 0, else 0."""
    return gain * F.relu(x)


def _relu_derivative(x: Tensor, gain: float) -> Tensor:
    """The gain for x > 0, else 0; NaN stays NaN."""
    return gain * _leaky_relu_derivative(x, 0.0)


def _built_in(name: str, primitive: Formula, derivative: Formula, **defaults: float) -> None:
    """Add a surrogate without the checks of `register_surrogate`, which would slow every import; tests do them."""
    # At import, since the first use may be inside a transform or a compiler.
    formula = _fingerprint(derivative, defaults)
    built = Surrogate(name, derivative, primitive, defaults, formula, frozenset(defaults))
    _surrogates[name] = _known[name, formula] = built


# Defaults: alpha of B-SiLU and NeLU from the paper, the others PyTorch's.
_built_in("bsilu", _bsilu, _bsilu_derivative, alpha=1.67)
_built_in("nelu", _nelu, _nelu_derivative, alpha=0.01)
_built_in("elu", F.elu, _elu_derivative, alpha=1.0)
_built_in("selu", F.selu, _selu_derivative)
_built_in("gelu", F.gelu, _gelu_derivative)
_built_in("silu", F.silu, _silu_derivative)
_built_in("mish", F.mish, _mish_derivative)
_built_in("leaky_relu", F.leaky_relu, _leaky_relu_derivative, negative_slope=0.01)
_built_in("relu", _relu, _relu_derivative, gain=1.0)
_BUILT_IN = frozenset(_surrogates)
