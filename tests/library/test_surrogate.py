"""The mathematics against the paper's numbers, central differences, and PyTorch's own derivatives."""

from __future__ import annotations

import functools
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fgi import PRIMITIVES, SETTINGS, slope
from torch import Tensor

from timm_sugar import SUGAR, list_surrogates, register_surrogate, sugar
from timm_sugar import surrogate as module
from timm_sugar.surrogate import get_surrogate, surrogate_derivative

NAMES = sorted(SETTINGS)
DEFAULTS = {  # bsilu and nelu: the paper's; the others: PyTorch's
    "bsilu": {"alpha": 1.67},
    "nelu": {"alpha": 0.01},
    "elu": {"alpha": 1.0},
    "selu": {},
    "gelu": {},
    "silu": {},
    "mish": {},
    "leaky_relu": {"negative_slope": 0.01},
    "relu": {"gain": 1.0},
}
PARAMETERS = [(name, key) for name, values in DEFAULTS.items() for key in values]
OFF_ZERO = torch.cat([torch.linspace(-12, -0.01, 200), torch.linspace(0.01, 12, 200)]).double()
WIDE = torch.cat([OFF_ZERO, torch.tensor([0.0, -0.0, 1e-300, -1e-300, 30, -30, 200, -200]).double()])


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test registers is gone after it."""
    monkeypatch.setattr(module, "_surrogates", dict(module._surrogates))


def derivative(x: Tensor, name: str, **parameters: float) -> Tensor:
    return surrogate_derivative(x, name, get_surrogate(name, **parameters).values)


def at(name: str, *points: float, **parameters: float) -> list[float]:
    return derivative(torch.tensor(points, dtype=torch.float64), name, **parameters).tolist()


# --- the table


def test_the_eight_surrogates_of_the_paper_and_relu_itself_are_there() -> None:
    assert list_surrogates() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_default_parameters(name: str) -> None:
    assert get_surrogate(name).parameters == DEFAULTS[name]
    assert get_surrogate(name).values == list(DEFAULTS[name].values())


def test_nelu_does_not_run_with_the_alpha_of_bsilu() -> None:
    assert at("nelu", -1.0) == [pytest.approx(2 * 0.01 * -1 / 4, rel=1e-12)]


# --- formulas


def test_a_callers_parameters_are_their_own() -> None:
    get_surrogate("nelu").parameters["alpha"] = 7.0
    assert get_surrogate("nelu").parameters == {"alpha": 0.01}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("default", [True, False])
def test_derivative_is_the_central_difference_of_the_primitive(name: str, default: bool) -> None:
    values = get_surrogate(name, **({} if default else SETTINGS[name])).values
    primitive, h = get_surrogate(name).primitive, 1e-5
    difference = (primitive(OFF_ZERO + h, *values) - primitive(OFF_ZERO - h, *values)) / (2 * h)
    torch.testing.assert_close(surrogate_derivative(OFF_ZERO, name, values), difference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("default", [True, False])
def test_derivative_is_what_autograd_makes_of_an_independent_primitive(name: str, default: bool) -> None:
    settings = {} if default else SETTINGS[name]
    torch.testing.assert_close(
        derivative(WIDE, name, **settings), slope(WIDE, name, **settings), rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("name", NAMES)
def test_primitive_equals_an_independent_one(name: str) -> None:
    ours = get_surrogate(name, **SETTINGS[name]).evaluate(WIDE)
    torch.testing.assert_close(ours, PRIMITIVES[name](WIDE, **SETTINGS[name]))


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        *[(-10, -0.000333), (-5, -0.015445), (-3, -0.012659), (-2, 0.084555), (-1, 0.400671), (-0.5, 0.652495)],
        *[(0, 0.9175), (0.5, 1.132417), (1, 1.256012), (2, 1.266124), (3, 1.163549), (5, 1.037650)],
    ],
)
def test_bsilu_derivative_has_the_tabulated_values(x: float, expected: float) -> None:
    assert at("bsilu", x) == [pytest.approx(expected, abs=6e-7)]


def test_bsilu_derivative_has_its_extremes_and_its_zero_where_they_belong() -> None:
    x = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    y = derivative(x, "bsilu")
    assert y.min().item() == pytest.approx(-0.023720, abs=1e-6)
    assert y.max().item() == pytest.approx(1.290377, abs=1e-6)
    assert x[y.argmin()].item() == pytest.approx(-3.7649, abs=2e-4)
    assert x[y.argmax()].item() == pytest.approx(1.49151, abs=2e-4)
    crossings = x[1:][y[1:].sign() != y[:-1].sign()]
    assert crossings.tolist() == [pytest.approx(-2.73491, abs=2e-4)]
    assert x[y > 1].min().item() == pytest.approx(0.172, abs=1e-3)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1, 2.0])
def test_nelu_derivative_has_its_minimum_at_minus_one_over_root_three(alpha: float) -> None:
    x = torch.linspace(-5, 0, 500_001, dtype=torch.float64)
    y = derivative(x, "nelu", alpha=alpha)
    assert y.min().item() == pytest.approx(-0.649519 * alpha, rel=1e-5)
    assert x[y.argmin()].item() == pytest.approx(-1 / math.sqrt(3), abs=1e-4)
    assert (y <= 0).all()


def test_nelu_keeps_its_negative_branch_off_the_positive_side() -> None:
    assert at("nelu", 1e-300, 1e-3, 0.5, 3.0, 1e300) == [1.0] * 5


def test_nelu_derivative_is_zero_at_zero() -> None:
    assert at("nelu", 0.0, -0.0) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gelu", 0.5), ("silu", 0.5), ("mish", 0.6), ("elu", 1.0), ("selu", 1.7580993), ("leaky_relu", 0.01)],
)
def test_slope_at_zero_is_that_of_pytorch(name: str, expected: float) -> None:
    assert at(name, 0.0) == [pytest.approx(expected, rel=1e-7)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_derivative_reaches_its_limits_at_the_largest_numbers_and_at_infinity(name: str, dtype: torch.dtype) -> None:
    high, low = (1.0507009873554805, 0.0) if name == "selu" else (1.0, 0.01 if name == "leaky_relu" else 0.0)
    largest = torch.finfo(dtype).max
    x = torch.tensor([largest, math.inf, -largest, -math.inf], dtype=dtype)
    got = derivative(x, name).double()
    torch.testing.assert_close(got, torch.tensor([high, high, low, low]).double(), rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivative_vanishes_far_out_and_at_infinity(name: str) -> None:
    x = torch.tensor([math.inf, -math.inf, 1e25, -1e25]).requires_grad_()
    (grad,) = torch.autograd.grad(derivative(x, name).sum(), x)
    assert torch.equal(grad, torch.zeros(4))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_derivative_of_nan_is_nan(name: str, dtype: torch.dtype) -> None:
    assert derivative(torch.tensor([math.nan, 1.0], dtype=dtype), name).isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", NAMES)
def test_derivative_is_finite_over_the_whole_range_of_float32(name: str) -> None:
    bits = torch.arange(-(2**31), 2**31, 65_521, dtype=torch.int64).to(torch.int32)  # a prime stride
    x = bits.view(torch.float32)
    x = x[x.isfinite()]
    assert len(x) > 60_000
    torch.testing.assert_close(derivative(x, name).double(), slope(x, name), rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize("name", NAMES)
def test_derivative_of_half_precision_is_computed_in_float32(name: str) -> None:
    x = torch.randn(50, dtype=torch.float16, generator=torch.Generator().manual_seed(0))
    assert derivative(x, name).dtype == torch.float32
    assert derivative(x.bfloat16(), name).dtype == torch.float32
    torch.testing.assert_close(derivative(x, name), derivative(x.float(), name), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_derivative_leaves_its_input_alone(name: str) -> None:
    x = WIDE.clone()
    derivative(x, name)
    torch.testing.assert_close(x, WIDE, rtol=0, atol=0)


# --- names and parameters


@pytest.mark.parametrize("bad", ["tanh", "", "BSILU", None, 3, ["bsilu"]])
def test_unknown_surrogate_is_answered_with_the_names(bad: object) -> None:
    with pytest.raises(ValueError, match="unknown surrogate") as caught:
        sugar(torch.zeros(1), bad)  # type: ignore[arg-type]
    assert repr(bad) in str(caught.value)
    assert all(name in str(caught.value) for name in NAMES)
    with pytest.raises(ValueError, match="unknown surrogate"):
        SUGAR(surrogate=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_unknown_parameter_is_named_with_those_that_exist(name: str) -> None:
    with pytest.raises(TypeError, match="beta") as caught:
        sugar(torch.zeros(1), name, beta=1.0)
    assert all(key in str(caught.value) for key in DEFAULTS[name] or ["none"])
    with pytest.raises(TypeError, match="beta"):
        SUGAR(surrogate=name, beta=1.0)


@pytest.mark.parametrize(("name", "key"), PARAMETERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0, -1e-9, -3])
def test_parameter_that_is_not_finite_or_below_zero_is_named(name: str, key: str, bad: float) -> None:
    for call in (lambda: sugar(torch.zeros(1), name, **{key: bad}), lambda: SUGAR(surrogate=name, **{key: bad})):
        with pytest.raises(ValueError, match=f"{key} of surrogate '{name}' must be finite and 0 or more") as caught:
            call()
        assert repr(bad) in str(caught.value)


@pytest.mark.parametrize(("name", "key"), PARAMETERS)
@pytest.mark.parametrize("bad", ["1.67", "nan", True, False, None, [1.0], torch.tensor(1.0), 1j])
def test_parameter_that_is_no_number_is_named(name: str, key: str, bad: object) -> None:
    with pytest.raises(TypeError, match=f"{key} of surrogate '{name}' must be a number"):
        sugar(torch.zeros(1), name, **{key: bad})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=f"{key} of surrogate '{name}' must be a number"):
        SUGAR(surrogate=name, **{key: bad})  # type: ignore[arg-type]


def test_an_integer_beyond_floating_point_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha of surrogate 'bsilu' must be finite"):
        SUGAR(alpha=10**400)


@pytest.mark.parametrize(
    "two", [2, np.float64(2), np.float32(2), np.int64(2), Fraction(2)], ids=lambda two: type(two).__name__
)
def test_every_real_number_is_one(two: Any) -> None:
    assert get_surrogate("bsilu", alpha=two).values == SUGAR(alpha=two).values == [2.0]
    assert type(get_surrogate("bsilu", alpha=two).values[0]) is float


@pytest.mark.parametrize(
    ("name", "limit"), [("bsilu", "silu"), ("nelu", "relu"), ("elu", "relu"), ("leaky_relu", "relu")]
)
def test_a_parameter_of_zero_gives_the_limit(name: str, limit: str) -> None:
    (key,) = DEFAULTS[name]
    for zero in (0, 0.0, -0.0):
        torch.testing.assert_close(derivative(OFF_ZERO, name, **{key: zero}), derivative(OFF_ZERO, limit))


def test_a_parameter_that_the_formula_divides_by_is_not_zero() -> None:
    register_surrogate("hill", derivative=lambda x, a: 1 / (1 + (x / a) ** 2), a=1.0)
    with pytest.raises(ValueError, match="a of surrogate 'hill' must be finite and positive, not 0"):
        get_surrogate("hill", a=0)


def test_a_surrogate_stands_wherever_a_name_does() -> None:
    chosen = get_surrogate("nelu", alpha=0.3)
    x = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
    expected = slope(x, "nelu", alpha=0.3)
    for call in (lambda: sugar(x, chosen), lambda: SUGAR(surrogate=chosen)(x), lambda: sugar(x, "nelu", alpha=0.3)):
        torch.testing.assert_close(torch.autograd.grad(call().sum(), x)[0], expected)
    assert get_surrogate(chosen) is chosen
    assert get_surrogate(chosen, alpha=0.1).values == [0.1]
    assert get_surrogate("nelu").values == [0.01]


def test_an_integer_is_a_number() -> None:
    assert get_surrogate("bsilu", **{"alpha": 2}).values == [2.0]


# --- one's own


def softplus(x: Tensor, beta: float = 1.0) -> Tensor:
    return torch.nn.functional.softplus(x, beta)


def softplus_slope(x: Tensor, beta: float) -> Tensor:
    return torch.sigmoid(beta * x)


def test_registered_surrogate_works_by_name_with_its_parameters() -> None:
    register_surrogate("softplus", derivative=softplus_slope, primitive=softplus, beta=2.0)
    assert "softplus" in list_surrogates()
    x = torch.linspace(-4, 4, 33, dtype=torch.float64, requires_grad=True)
    for settings, beta in (({}, 2.0), ({"beta": 0.5}, 0.5)):
        (grad,) = torch.autograd.grad(sugar(x, "softplus", **settings).sum(), x)
        torch.testing.assert_close(grad, torch.sigmoid(beta * x.detach()))
    assert repr(SUGAR(surrogate="softplus")) == "SUGAR(surrogate='softplus', beta=2)"


def test_registered_surrogate_with_two_parameters_takes_them_in_their_order() -> None:
    register_surrogate("line", derivative=lambda x, a, b: torch.full_like(x, a - b), a=3.0, b=1.0)
    assert get_surrogate("line", **{"b": 0.5}).values == [3.0, 0.5]
    assert at("line", 0.0, b=0.5) == [2.5]


def test_registered_surrogate_whose_functions_have_another_order_is_refused() -> None:
    """Values go by their place, so that of alpha would be beta's."""
    for functions in ({"derivative": two_slope}, {"derivative": lambda x, *values: two_slope(x, *values)}):
        functions["primitive"] = lambda x, alpha, beta: alpha / beta * softplus(x, beta)
        with pytest.raises(ValueError, match=r"'mine' is given beta, alpha .* its function takes x, alpha, beta"):
            register_surrogate("mine", **functions, beta=2.0, alpha=3.0)
    with pytest.raises(ValueError, match="x comes first"):
        register_surrogate("mine", derivative=lambda beta, x: torch.sigmoid(beta * x), beta=2.0)


def two_slope(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * torch.sigmoid(beta * x)


def test_registered_surrogate_with_exchanged_parameters_is_another_one() -> None:
    register_surrogate("mine", derivative=two_slope, alpha=1.0, beta=1.0)
    before, exchanged = SUGAR(surrogate="mine", alpha=2.0), lambda x, beta, alpha: two_slope(x, beta, alpha)
    with pytest.raises(ValueError, match="exists already"):
        register_surrogate("mine", derivative=exchanged, beta=1.0, alpha=1.0)
    register_surrogate("mine", derivative=exchanged, overwrite=True, beta=1.0, alpha=1.0)
    before.set_surrogate(alpha=4.0)
    assert repr(before) == "SUGAR(surrogate='mine', alpha=4, beta=1)"


def test_registered_surrogate_gets_half_precision_as_float32() -> None:
    seen = []
    register_surrogate("spy", derivative=lambda x: seen.append(x.dtype) or torch.ones_like(x))
    x = torch.ones(3, dtype=torch.float16, requires_grad=True)
    sugar(x, "spy").sum().backward()
    assert seen[-1] == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.float16


def test_surrogate_and_parameters_survive_json() -> None:
    register_surrogate("softplus", derivative=softplus_slope, primitive=softplus, beta=2.0)
    for settings in ({"surrogate": "softplus", "beta": 0.7}, {"surrogate": "nelu", "alpha": 0.05}, {}):
        back = SUGAR(**json.loads(json.dumps(settings)))
        assert repr(back) == repr(SUGAR(**settings))
        assert back.values == SUGAR(**settings).values


@pytest.mark.parametrize("name", ["bsilu", "gelu"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_built_in_name_is_taken(name: str, overwrite: bool) -> None:
    before = get_surrogate(name)
    with pytest.raises(ValueError, match=f"'{name}' exists already: choose another name$"):
        register_surrogate(name, derivative=softplus_slope, overwrite=overwrite, beta=1.0)
    assert get_surrogate(name) == before


def test_the_same_cell_of_a_notebook_runs_twice_and_another_formula_needs_overwrite() -> None:
    for _ in range(2):
        register_surrogate("mine", derivative=lambda x, beta: torch.sigmoid(beta * x), beta=1.0)
    for changed in ({"beta": 2.0}, {"beta": 1.0, "gamma": 1.0}):
        with pytest.raises(ValueError, match="exists already: choose another name or say overwrite=True"):
            register_surrogate("mine", derivative=lambda x, *_: torch.sigmoid(x), **changed)
    register_surrogate("mine", derivative=lambda x: torch.sigmoid(3 * x), overwrite=True)
    assert at("mine", 1.0) == [pytest.approx(1 / (1 + math.exp(-3)))]


def test_a_derivative_that_is_not_the_primitives_is_refused() -> None:
    with pytest.raises(ValueError, match="are not exchanged"):
        register_surrogate("mine", derivative=softplus, primitive=softplus_slope, beta=1.0)
    with pytest.raises(ValueError, match="the derivative at"):
        register_surrogate("mine", derivative=lambda x: 1.001 * torch.sigmoid(x), primitive=softplus)
    with pytest.raises(TypeError):
        register_surrogate("mine", softplus, softplus_slope)  # type: ignore[misc]
    assert list_surrogates() == NAMES


def test_a_surrogate_without_a_primitive_says_so_where_one_is_needed() -> None:
    register_surrogate("mine", derivative=lambda x: torch.sigmoid(x))
    with pytest.raises(ValueError, match="'mine' has no primitive"):
        get_surrogate("mine").evaluate(torch.zeros(1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_registering_a_default_that_is_not_finite_or_below_zero_fails(bad: float) -> None:
    with pytest.raises(ValueError, match="beta of surrogate 'mine' must be finite and 0 or more"):
        register_surrogate("mine", derivative=softplus_slope, beta=bad)
    assert list_surrogates() == NAMES


def test_the_name_of_each_activations_own_derivative_is_taken() -> None:
    with pytest.raises(ValueError, match="choose another name"):
        register_surrogate("same", derivative=torch.sigmoid)


def test_a_pickle_tells_its_values_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is loaded, the same formula may have its parameters in another order."""
    register_surrogate("mine", derivative=two_slope, alpha=1.0, beta=1.0)
    pickled = pickle.dumps(SUGAR(surrogate="mine", alpha=3.0, beta=7.0))
    monkeypatch.setattr(module, "_known", {})
    register_surrogate(
        "mine", derivative=lambda x, beta, alpha: two_slope(x, alpha, beta), overwrite=True, beta=1.0, alpha=1.0
    )
    assert repr(pickle.loads(pickled)) == "SUGAR(surrogate='mine', beta=7, alpha=3)"


@pytest.mark.parametrize("bad", [3, None, "", b"mine"])
def test_registering_a_name_that_is_no_name_fails(bad: object) -> None:
    with pytest.raises((TypeError, ValueError), match="name"):
        register_surrogate(bad, derivative=softplus_slope, beta=1.0)  # type: ignore[arg-type]


TAKEN = {"inplace", "surrogate", "x", "num_classes", "pretrained", "width", "scale", *dir(SUGAR()), *vars(SUGAR())}


@pytest.mark.parametrize("taken", sorted(TAKEN - {"alpha"}))
def test_registering_a_parameter_whose_name_is_taken_fails(taken: str) -> None:
    with pytest.raises(ValueError, match=taken):
        register_surrogate("mine", derivative=softplus_slope, **{taken: 1.0})


def test_registering_a_default_that_is_no_number_fails() -> None:
    with pytest.raises(TypeError, match="beta of surrogate 'mine' must be a number"):
        register_surrogate("mine", derivative=softplus_slope, beta="1")  # type: ignore[arg-type]
    assert list_surrogates() == NAMES


@pytest.mark.parametrize(
    "slope_",
    [
        lambda x: x.sum(),
        lambda x: x[:3],
        lambda x: torch.where(x == 0, math.nan, x),
        lambda x: 1 / x,
        lambda x: x.unsqueeze(0),
    ],
)
def test_registering_a_derivative_that_is_not_one_finite_value_per_element_fails(
    slope_: Callable[[Tensor], Tensor],
) -> None:
    with pytest.raises(ValueError, match="'mine' must return one finite value per element"):
        register_surrogate("mine", derivative=slope_)
    assert list_surrogates() == NAMES


@pytest.mark.parametrize("slope_", [lambda x: x.clamp_(0, 1), lambda x: x.mul_(0).add_(1)])
def test_registering_a_derivative_that_changes_its_input_fails(slope_: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="'mine' must not change its input"):
        register_surrogate("mine", derivative=slope_)
    assert list_surrogates() == NAMES


def test_registering_a_derivative_that_changes_its_input_at_other_values_of_its_parameter_fails() -> None:
    with pytest.raises(ValueError, match="'mine' must not change its input"):
        register_surrogate("mine", derivative=lambda x, slope: torch.sigmoid(x.mul_(slope)), slope=1.0)
    assert list_surrogates() == NAMES


# --- the fingerprint that keeps compiler caches honest


def fingerprint(function: Callable[..., Tensor], **parameters: float) -> str:
    name = f"probe{len(module._surrogates)}"
    register_surrogate(name, derivative=function, **parameters)
    return get_surrogate(name).formula


def test_every_built_in_formula_has_a_fingerprint_of_its_own() -> None:
    assert len({get_surrogate(name).formula for name in NAMES}) == len(NAMES)


def from_source(source: str, module_name: str | None = "formulas") -> Callable[..., Tensor]:
    namespace: dict[str, object] = {"torch": torch, "__name__": module_name}
    exec(source, namespace)
    return namespace["slope"]  # type: ignore[return-value]


def shifted(shift: object) -> Callable[[Tensor], Tensor]:
    return lambda x: x * 0 + (shift if isinstance(shift, float) else sum(shift))  # type: ignore[arg-type]


def called(helper: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: helper(x)


def plus(x: Tensor, shift: float) -> Tensor:
    return x + shift


class Callme:
    def __init__(self, shift: float) -> None:
        self.shift = shift

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.shift

    def method(self, x: Tensor) -> Tensor:
        return x + self.shift


PAIRS = {
    "number in the code": (lambda x: x + 1.0, lambda x: x + 2.0),
    "operation": (lambda x: x + x, lambda x: x * x),
    "torch function": (lambda x: torch.sigmoid(x), lambda x: torch.tanh(x)),
    "tensor method": (lambda x: x.sigmoid(), lambda x: x.tanh()),
    "closure": (shifted(1.0), shifted(2.0)),
    "sequence in a closure": (shifted([1.0]), shifted([2.0])),
    "module constant": (
        from_source("SHIFT = 1.0\ndef slope(x): return x + SHIFT"),
        from_source("SHIFT = 2.0\ndef slope(x): return x + SHIFT"),
    ),
    "helper function": (called(lambda x: x + 1.0), called(lambda x: x + 2.0)),
    "helper's closure": (called(shifted(1.0)), called(shifted(2.0))),
    "helper from torch": (called(torch.sigmoid), called(torch.tanh)),
    "nested function": (
        from_source("def slope(x):\n    return (lambda y: y + 1.0)(x)"),
        from_source("def slope(x):\n    return (lambda y: y + 2.0)(x)"),
    ),
    "default argument": (lambda x, shift=1.0: x + shift, lambda x, shift=2.0: x + shift),
    "keyword default": (
        from_source("def slope(x, *, shift=1.0): return x + shift"),
        from_source("def slope(x, *, shift=2.0): return x + shift"),
    ),
    "module whose name begins with torch": (
        from_source("def slope(x): return x + 1.0", "torch_formulas"),
        from_source("def slope(x): return x + 2.0", "torch_formulas"),
    ),
    "module without a name": (
        from_source("def slope(x): return x + 1.0", None),
        from_source("def slope(x): return x + 2.0", None),
    ),
    "torch function itself": (torch.sigmoid, torch.tanh),
    "partial": (functools.partial(plus, shift=1.0), functools.partial(plus, shift=2.0)),
    "callable object": (Callme(1.0), Callme(2.0)),
    "method": (Callme(1.0).method, Callme(2.0).method),
}


@pytest.mark.parametrize("what", PAIRS)
def test_formulas_that_differ_have_different_fingerprints(what: str) -> None:
    one, other = PAIRS[what]
    point = torch.tensor([0.5])
    assert not torch.equal(one(point), other(point))
    assert fingerprint(one) != fingerprint(other)


def step(at: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.where(x > at, 1.0, 0.1).to(x.dtype)


@pytest.mark.parametrize(("one", "other"), [(0.01, 0.02), (-0.03, -0.01), (-30.0, -20.0)])
def test_formulas_that_differ_in_a_narrow_or_far_place_have_different_fingerprints(one: float, other: float) -> None:
    assert fingerprint(step(one)) != fingerprint(step(other))


SAME_CODE = """
import math, torch
SHIFT = 0.25
def helper(x):
    return [y + SHIFT for y in (x, 2 * x)][0]
def slope(x, beta):
    return helper(torch.sigmoid(beta * x)) if {1: "a"} else (lambda y: y + 1.5)(x)
"""


@pytest.mark.slow
def test_the_same_formula_has_the_same_fingerprint_in_a_fresh_process(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    names = "[*NAMES, 'mine']".replace("NAMES", repr(NAMES))
    program.write_text(
        SAME_CODE
        + "from timm_sugar.surrogate import get_surrogate, register_surrogate\n"
        + "register_surrogate('mine', derivative=slope, beta=1.0)\n"
        + f"print(*[get_surrogate(name).formula for name in {names}])\n"
    )
    fresh = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True).stdout.split()
    here = [get_surrogate(name).formula for name in NAMES]
    assert fresh[:-1] == here
    scope: dict[str, object] = {"__name__": "__main__"}
    exec(SAME_CODE, scope)
    register_surrogate("mine", derivative=scope["slope"], beta=1.0)  # type: ignore[arg-type]
    assert fresh[-1] == get_surrogate("mine").formula


def test_an_old_pickle_gets_the_fingerprint_of_the_formula_of_today() -> None:
    old = SUGAR()
    old.formula = "of another version"
    assert pickle.loads(pickle.dumps(old)).formula == get_surrogate("bsilu").formula != old.formula
