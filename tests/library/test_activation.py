"""`sugar` and `SUGAR`: ReLU bit for bit forward, the surrogate's derivative backward, on every route of a gradient."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from fgi import FGI, SETTINGS, inject, injected, slope
from timm.layers import GELUTanh
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from timm_sugar import SUGAR, _compiled, _torch, register_surrogate, sugar
from timm_sugar import surrogate as surrogate_module
from timm_sugar.activation import FunctionalSUGAR

NAMES = sorted(SETTINGS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
JIT_IS_DEPRECATED = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
NEEDS_COMPILER = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler: install g++"
)
# What is left after the formula was rounded to a dtype (half a unit in the last place, and the last bits of float32).
TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-15},
    torch.float32: {"rtol": 1e-5, "atol": 5e-7},
    torch.bfloat16: {"rtol": 0.51 * 2**-7, "atol": 2e-7},
    torch.float16: {"rtol": 0.51 * 2**-10, "atol": 2e-7},
}


def bits(x: Tensor) -> Tensor:
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    return x.detach().contiguous().view(integer)


def every_finite(dtype: torch.dtype) -> Tensor:
    """All finite numbers of a half-precision type."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[x.isfinite()]


def assert_slope(grad: Tensor, upstream: Tensor, x: Tensor, name: str, **parameters: float) -> None:
    """Whether a gradient is upstream * surrogate'(x), up to the rounding of its dtype."""
    expected = upstream.double() * slope(x, name, **parameters)
    torch.testing.assert_close(grad.double(), expected, **TOLERANCES[grad.dtype])


# --- forward: ReLU, bit for bit

SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 1e-8, -1e-8, 6e4, -6e4]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x[:, ::2, 1:, ::3],
    "transposed": lambda x: x.transpose(1, 3),
    "expanded": lambda x: x[:1].expand(5, -1, -1, -1),
    "zero_stride_everywhere": lambda x: x[0, 0, 0, 0].expand(2, 3, 2, 2),
    "empty": lambda x: x[:0],
    "scalar": lambda x: x[0, 0, 0, 0],
}


def sample(dtype: torch.dtype) -> Tensor:
    x = 3 * torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    x.view(-1)[:200:18] = torch.tensor([*SPECIAL, -2.5])
    return x.to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradients", [True, False])
def test_forward_is_bit_equal_to_relu(layout: str, dtype: torch.dtype, gradients: bool) -> None:
    x = LAYOUTS[layout](sample(dtype))
    before = bits(x).clone()
    with torch.set_grad_enabled(gradients):
        leaf = x.detach().requires_grad_(gradients)
        for y in (sugar(x), sugar(leaf, "nelu", alpha=0.5), SUGAR()(leaf), SUGAR(True)(leaf), FunctionalSUGAR()(leaf)):
            assert torch.equal(bits(y), bits(F.relu(x)))
            assert (y.dtype, y.shape, y.stride()) == (x.dtype, x.shape, F.relu(x).stride())
    assert torch.equal(bits(x), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_keeps_the_sign_of_zero_and_nan_as_relu_does(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, math.nan, -math.inf, math.inf], dtype=dtype, requires_grad=True)
    y = sugar(x)
    assert torch.equal(y.signbit(), F.relu(x).signbit())
    assert y.isnan().tolist() == [False, False, True, False, False]
    assert y.tolist()[3:] == [0.0, math.inf]


@pytest.mark.parametrize("dtype", HALVES)
def test_forward_is_relu_for_every_half_precision_number(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert torch.equal(bits(sugar(x.requires_grad_())), bits(F.relu(x)))


def test_train_and_eval_mode_compute_the_same() -> None:
    module, x = SUGAR(), sample(torch.float32).requires_grad_()
    outcomes = []
    for mode in (True, False):
        y = module.train(mode)(x)
        outcomes.append((y, *torch.autograd.grad(y[y.isfinite()].sum(), x)))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*outcomes, strict=True))


# --- backward: the formula


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_the_formula(name: str, dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-12, 12, 501), torch.tensor([0.0, -0.0])]).to(dtype).requires_grad_()
    upstream = torch.randn(503, generator=torch.Generator().manual_seed(1)).to(dtype)
    for settings in ({}, SETTINGS[name]):
        (grad,) = torch.autograd.grad(sugar(x, name, **settings), x, upstream)
        assert grad.dtype == dtype
        assert_slope(grad, upstream, x, name, **settings)
        (by_module,) = torch.autograd.grad(SUGAR(surrogate=name, **settings)(x), x, upstream)
        assert torch.equal(grad, by_module)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_forward_gradient_injection(name: str) -> None:
    x = torch.linspace(-9, 9, 401, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(401, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    results = []
    for module in (SUGAR(surrogate=name, **SETTINGS[name]), FGI(name, **SETTINGS[name])):
        y = module(x)
        results.append((y, *torch.autograd.grad(y, x, upstream)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", HALVES)
def test_gradient_is_finite_and_right_for_every_finite_half_precision_number(name: str, dtype: torch.dtype) -> None:
    x = every_finite(dtype).requires_grad_()
    assert dtype != torch.float16 or len(x) == 63488
    (grad,) = torch.autograd.grad(sugar(x, name).sum(), x)
    assert grad.isfinite().all()
    assert_slope(grad, torch.ones_like(x), x, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_finite_at_the_ends_of_the_dtype_and_beyond(name: str, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    ends = [info.max, info.max / 2, info.tiny, info.smallest_normal / 2, 0.0, math.inf, 65504, 1e3, 1e4]
    x = torch.tensor([*ends, *(-end for end in ends)], dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(sugar(x, name)[x.isfinite()].sum() + sugar(x, name)[x.isinf()].sum(), x)
    assert grad.isfinite().all()


def test_gradient_of_a_subnormal_upstream_and_a_large_one_is_rounded_once() -> None:
    x = torch.tensor([0.5, 0.5, -1.0], dtype=torch.float16, requires_grad=True)
    upstream = torch.tensor([5e4, 6e-8, 3e-7], dtype=torch.float16)
    (grad,) = torch.autograd.grad(sugar(x), x, upstream)
    assert_slope(grad, upstream, x, "bsilu")
    assert grad[0] > 5.5e4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["bsilu", "nelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_the_formula_in_every_layout(layout: str, name: str, dtype: torch.dtype) -> None:
    base = sample(torch.float32).nan_to_num(0.3, 4.0, -4.0).to(dtype).requires_grad_()
    x = LAYOUTS[layout](base)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    x.retain_grad()
    sugar(x, name).backward(weight)
    assert_slope(x.grad, weight, x, name)  # type: ignore[arg-type]


@pytest.mark.parametrize("upstream_layout", [torch.contiguous_format, torch.channels_last])
def test_gradient_of_a_channels_last_input_is_channels_last(upstream_layout: torch.memory_format) -> None:
    x = sample(torch.float32).nan_to_num().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = sugar(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    upstream = torch.ones_like(y).contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(y, x, upstream)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    scrambled = torch.randn(y.shape).contiguous(memory_format=upstream_layout)
    assert_slope(torch.autograd.grad(sugar(x), x, scrambled)[0], scrambled, x, "bsilu")


def test_gradient_comes_with_parameters_of_a_frozen_batch_norm_in_eval_mode() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), SUGAR(), nn.Linear(6, 1)).double().eval()
    oracle = inject(copy.deepcopy(net), (SUGAR,))
    x = torch.randn(7, 4, dtype=torch.float64)
    for model in (net, oracle):
        model(x).sum().backward()
    assert_same_gradients(net, oracle)


def test_changing_the_input_after_the_forward_pass_is_noticed() -> None:
    leaf = torch.randn(5, requires_grad=True)
    x = leaf * 2
    y = sugar(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_changing_the_output_in_place_keeps_the_gradient() -> None:
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    y = sugar(x)
    y.mul_(3)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert_slope(grad, torch.full_like(x, 3), x, "bsilu")


def test_backward_saves_the_input_and_nothing_else() -> None:
    x, saved = torch.randn(100, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        sugar(x)
    assert [t.data_ptr() for t in saved if t.numel()] == [x.data_ptr()]


# --- large tensors, whose gradient is computed piece by piece


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes every tensor of more than 7 elements a large one; the sizes of those that were taken in pieces."""
    sizes, in_pieces = [], _compiled._in_chunks
    monkeypatch.setattr(_compiled, "_CHUNK", 7)
    monkeypatch.setattr(_compiled, "_WORTHWHILE", 7)
    monkeypatch.setattr(_compiled, "is_compiled", lambda *_: False)
    monkeypatch.setattr(_compiled, "compiled_gradient", lambda *_: None)
    monkeypatch.setattr(_compiled, "_in_chunks", lambda g, x, *rest: sizes.append(x.numel()) or in_pieces(g, x, *rest))
    return sizes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["bsilu", "nelu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_in_pieces_is_the_formula(layout: str, name: str, dtype: torch.dtype, pieces: list[int]) -> None:
    base = sample(torch.float32).nan_to_num(0.3, 4.0, -4.0).to(dtype).requires_grad_()
    x = LAYOUTS[layout](base)
    y = sugar(x, name)
    upstream = torch.empty_like(y).copy_(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
    (grad,) = torch.autograd.grad(y, x, upstream)
    assert_slope(grad, upstream, x, name)
    assert grad.stride() == y.stride()
    dense = layout in ("contiguous", "channels_last", "transposed")
    assert pieces == ([x.numel()] if dense else [])


def test_gradient_in_pieces_of_a_slice_reads_nothing_else(pieces: list[int]) -> None:
    x = torch.randn(40, generator=torch.Generator().manual_seed(0))[10:30].requires_grad_()
    upstream = torch.randn(40, generator=torch.Generator().manual_seed(1))[20:]
    (grad,) = torch.autograd.grad(sugar(x), x, upstream)
    assert_slope(grad, upstream, x, "bsilu")
    assert pieces == [20]


def test_gradient_of_memory_with_gaps_is_not_taken_in_pieces(pieces: list[int]) -> None:
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))[:, ::2].requires_grad_()
    upstream = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))[:, ::2]
    (grad,) = torch.autograd.grad(sugar(x), x, upstream)
    assert_slope(grad, upstream, x, "bsilu")
    assert pieces == []


def test_no_intermediate_result_of_a_large_gradient_is_as_large() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result._base is None and not func._schema.is_mutable:
                made.append((func._schema.name, result.numel()))
            return result

    made: list[tuple[str, int]] = []
    x = torch.randn(8, 64, 33, 65, requires_grad=True)
    y, upstream = sugar(x), torch.ones(x.shape)
    with Sizes():
        torch.autograd.grad(y, x, upstream)
    large = [name for name, size in made if size > _compiled._CHUNK * torch.get_num_threads()]
    assert large == [*["aten::as_strided"] * 2, "aten::empty_like", "aten::as_strided"]  # the result, and views
    assert len(made) > 10


def test_large_batched_and_recorded_gradients_are_not_taken_in_pieces(pieces: list[int]) -> None:
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 20, dtype=torch.float64)
    (grads,) = torch.autograd.grad(sugar(x), x, upstream, is_grads_batched=True)
    for grad, one in zip(grads, upstream, strict=True):
        assert_slope(grad, one, x, "bsilu")
    (grad,) = torch.autograd.grad(sugar(x), x, torch.ones_like(x), create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert second.abs().sum() > 1
    torch.testing.assert_close(torch.func.grad(lambda t: sugar(t).sum())(x.detach()), grad.detach())
    per_sample = torch.func.vmap(torch.func.grad(lambda t: sugar(t).sum()))(x.detach().expand(4, 20))
    torch.testing.assert_close(per_sample, grad.detach().expand(4, 20))
    assert pieces == []


# --- second derivatives


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_is_the_second_derivative_of_the_primitive(name: str) -> None:
    x = torch.cat([torch.linspace(-8, -0.01, 200), torch.linspace(0.01, 8, 200)]).double().requires_grad_()
    (grad,) = torch.autograd.grad(sugar(x, name, **SETTINGS[name]).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    h = 1e-5
    expected = (slope(x + h, name, **SETTINGS[name]) - slope(x - h, name, **SETTINGS[name])) / (2 * h)
    torch.testing.assert_close(second, expected, rtol=1e-7, atol=1e-8)
    assert (second.abs().max() > 0.1) == (name not in ("leaky_relu", "relu"))


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_passes_gradgradcheck(name: str) -> None:
    x = torch.tensor([-4.0, -1.3, -0.4, 0.6, 2.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: sugar(t, name, **SETTINGS[name]), (x,))


def test_gradient_penalty_reaches_the_weights() -> None:
    """d/dw of (d/dx sugar(w x))² for one unit, by hand: 2 w s (s + w x s') with s = slope(w x)."""
    w, x = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (0.8, -1.5))
    (gx,) = torch.autograd.grad(sugar(w * x), x, create_graph=True)
    (gw,) = torch.autograd.grad(gx.square(), w)
    h, u = 1e-6, (w * x).detach()
    s, s2 = slope(u), (slope(u + h) - slope(u - h)) / (2 * h)
    torch.testing.assert_close(gw, 2 * w * s * (s + w * x * s2), rtol=1e-7, atol=0.0)


# --- a bank of all eight surrogates, taken through every route


class Bank(nn.Module):
    """One unit per surrogate and per element of x: (n,) -> (units, n)."""

    def __init__(self, kind: Callable[..., nn.Module], names: list[str] = NAMES) -> None:
        super().__init__()
        self.activations = nn.ModuleList([kind(surrogate=name, **SETTINGS[name]) for name in names])
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, len(names), dtype=torch.float64))
        self.shift = nn.Parameter(torch.linspace(-0.3, 0.4, len(names), dtype=torch.float64))

    # No types: torch 2.6 and 2.8 pickle no graph with types as strings.
    def forward(self, x):  # type: ignore[no-untyped-def]
        outputs = []
        for i, module in enumerate(self.activations):
            outputs.append(module(self.scale[i] * x + self.shift[i]))
        return torch.stack(outputs)  # so that each gradient from upstream is dense


class FunctionalBank(Bank):
    """The same with `sugar` called as a function."""

    # No types: torch 2.6 and 2.8 pickle no graph with types as strings.
    def forward(self, x):  # type: ignore[no-untyped-def]
        outputs = []
        for i, name in enumerate(NAMES):
            outputs.append(sugar(self.scale[i] * x + self.shift[i], name, **SETTINGS[name]))
        return torch.stack(outputs)  # so that each gradient from upstream is dense


def bank_input() -> Tensor:
    return torch.linspace(-5, 5, 40, dtype=torch.float64)


def gradients(call: Callable[[Tensor], Tensor], *parameters: Tensor) -> list[Tensor]:
    """Output, then gradients of the input and of the parameters for a fixed upstream gradient."""
    x = bank_input().requires_grad_()
    y = call(x)
    upstream = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    y.backward(upstream)  # reentrant checkpointing doesn't work with autograd.grad
    return [y.detach(), x.grad, *(p.grad for p in parameters)]  # type: ignore[list-item]


def assert_bank(call: Callable[[Tensor], Tensor], model: nn.Module, names: list[str] = NAMES) -> None:
    """Whether values and gradients of a bank are those of FGI."""
    oracle = Bank(FGI, names)
    model.zero_grad()
    parameters = dict(model.named_parameters())
    got = gradients(call, *(next(p for n, p in parameters.items() if n.endswith(k)) for k in ("scale", "shift")))
    torch.testing.assert_close(got, gradients(oracle, oracle.scale, oracle.shift), rtol=1e-10, atol=1e-12)


def assert_same_gradients(model: nn.Module, oracle: nn.Module, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    expected = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert expected
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


Route = Callable[[nn.Module], Callable[[Tensor], Tensor]]


def _traced_without_gradients(model: nn.Module) -> torch.fx.GraphModule:
    with torch.no_grad():
        return torch.fx.symbolic_trace(model)


def _ema(model: nn.Module) -> nn.Module:
    return ModelEmaV3(model).module.requires_grad_()


def _timm_extractor(model: nn.Module) -> Callable[[Tensor], Tensor]:
    from timm.models import create_feature_extractor

    extractor = create_feature_extractor(model, ["stack"])
    return lambda x: extractor(x)["stack"]


def _torchvision_extractor(model: nn.Module) -> Callable[[Tensor], Tensor]:
    from torchvision.models.feature_extraction import create_feature_extractor

    extractor = create_feature_extractor(model, ["stack"])
    return lambda x: extractor(x)["stack"]


def _exported(model: nn.Module, strict: bool, reload: bool = False) -> nn.Module:
    program = torch.export.export(model.train(), (bank_input(),), strict=strict)
    if reload:
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        program = torch.export.load(buffer)
    return program.module()


def _jit_reloaded(script: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    buffer = io.BytesIO()
    torch.jit.save(script, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {  # routes that give a model with parameters of its own
    "eager": lambda m: m,
    "eval_mode": lambda m: m.eval(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "ema": _ema,
    "fx": torch.fx.symbolic_trace,
    "fx_traced_without_gradients": _traced_without_gradients,
    "fx_pickled": lambda m: pickle.loads(pickle.dumps(torch.fx.symbolic_trace(m))),
    "fx_deepcopied": lambda m: copy.deepcopy(torch.fx.symbolic_trace(m)),
    "fx_twice": lambda m: torch.fx.symbolic_trace(torch.fx.symbolic_trace(m)),
    "export": lambda m: _exported(m, strict=False),
    "export_strict": lambda m: _exported(m, strict=True),
    "export_reloaded": lambda m: _exported(m, strict=False, reload=True),
}
WRAPPERS: dict[str, Route] = {  # routes that keep the model's parameters
    "checkpoint": lambda m: lambda x: checkpoint(m, x, use_reentrant=False),
    "checkpoint_reentrant": lambda m: lambda x: checkpoint(m, x, use_reentrant=True),
    "timm_extractor": _timm_extractor,
    "torchvision_extractor": _torchvision_extractor,
    "functional_call": lambda m: lambda x: torch.func.functional_call(m, dict(m.named_parameters()), (x,)),
    "compile_aot_eager": lambda m: torch.compile(m, fullgraph=True, backend="aot_eager"),
}


@pytest.fixture
def compiler() -> None:
    torch.compiler.reset()


@pytest.fixture(
    params=[
        "small",
        pytest.param("in pieces", marks=pytest.mark.slow),
        pytest.param("compiled", marks=[NEEDS_COMPILER, pytest.mark.slow]),
    ]
)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How eager mode computes a gradient: as of a small tensor, or as of a large one without or with a compiler."""
    if request.param != "small":
        monkeypatch.setattr(_compiled, "_CHUNK", 7)
        monkeypatch.setattr(_compiled, "_WORTHWHILE", 7)
    if request.param == "in pieces":
        monkeypatch.setattr(_compiled, "is_compiled", lambda *_: False)
        monkeypatch.setattr(_compiled, "compiled_gradient", lambda *_: None)
    return request.param


@pytest.mark.parametrize("bank", [Bank, FunctionalBank])
@pytest.mark.parametrize("route", COPIES)
def test_copies_have_the_gradient_of_the_formula(route: str, bank: type[Bank], compiler: None, way: str) -> None:
    model = COPIES[route](bank(SUGAR))
    assert_bank(model, model)


@pytest.mark.parametrize("bank", [Bank, FunctionalBank])
@pytest.mark.parametrize("route", WRAPPERS)
def test_wrappers_have_the_gradient_of_the_formula(route: str, bank: type[Bank], compiler: None, way: str) -> None:
    model = bank(SUGAR)
    assert_bank(WRAPPERS[route](model), model)


@JIT_IS_DEPRECATED
@pytest.mark.parametrize("bank", [Bank, FunctionalBank])
@pytest.mark.parametrize("reload", [False, True])
def test_jit_trace_with_its_default_check_has_the_gradient_of_the_formula(bank: type[Bank], reload: bool) -> None:
    traced = torch.jit.trace(bank(SUGAR), bank_input())
    model = _jit_reloaded(traced) if reload else traced
    for _ in range(3):  # the profiling executor rewrites the graph after the first runs
        assert_bank(model, model)


@JIT_IS_DEPRECATED
@pytest.mark.parametrize(
    "names",
    [
        ["bsilu", "elu", "leaky_relu", "nelu"],
        ["gelu", "mish", "selu", "silu"],
    ],
)
@pytest.mark.parametrize("reload", [False, True])
@pytest.mark.parametrize("kind", [SUGAR, FunctionalSUGAR])
def test_jit_script_has_the_gradient_of_the_formula(names: list[str], reload: bool, kind: type[SUGAR]) -> None:
    scripted = torch.jit.script(Bank(kind, names))
    model = _jit_reloaded(scripted) if reload else scripted
    for _ in range(3):
        assert_bank(model, model, names)


@NEEDS_COMPILER
@pytest.mark.parametrize("bank", [Bank, FunctionalBank])
def test_inductor_has_the_gradient_of_the_formula(bank: type[Bank], compiler: None, inductor_cache: Path) -> None:
    model = bank(SUGAR)
    assert_bank(torch.compile(model, fullgraph=True), model)


# --- mixed precision


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo reads it
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("route", ["eager", "fx", "checkpoint", "compile_aot_eager"])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_gives_the_gradient_of_the_formula_at_the_rounded_input(
    dtype: torch.dtype, route: str, name: str, compiler: None
) -> None:
    module = SUGAR(surrogate=name)
    call = {**COPIES, **WRAPPERS}[route](module)
    layer, x = nn.Linear(6, 40), 3 * torch.randn(5, 6, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", dtype):
        hidden = layer(x)
        y = call(hidden)
        loss = (y * torch.randn(40, generator=torch.Generator().manual_seed(6))).sum()
    grad, upstream = torch.autograd.grad(loss, [hidden, y])
    assert hidden.dtype == y.dtype == dtype
    assert_slope(grad, upstream, hidden, name)


# --- torch.func


def test_func_grad_and_value() -> None:
    x = bank_input()
    for name in NAMES:
        got, value = torch.func.grad_and_value(lambda t, name=name: sugar(t, name).sum())(x)
        torch.testing.assert_close(got, slope(x, name), rtol=1e-12, atol=1e-15)
        assert value == F.relu(x).sum()


@pytest.mark.parametrize("in_dim", [0, 1, -1, -2])
@pytest.mark.parametrize("gradients_on", [True, False])
def test_vmap_forward_is_relu(in_dim: int, gradients_on: bool) -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(gradients_on):
        assert torch.equal(torch.func.vmap(sugar, in_dims=in_dim, out_dims=in_dim)(x), F.relu(x))
        assert torch.equal(torch.func.vmap(torch.func.vmap(SUGAR()))(x), F.relu(x))


@pytest.mark.parametrize("name", NAMES)
def test_vmap_of_grad_and_grad_of_vmap_are_the_formula(name: str) -> None:
    x = torch.linspace(-5, 5, 60, dtype=torch.float64).reshape(4, 15)
    expected = slope(x, name, **SETTINGS[name])

    def total(t: Tensor) -> Tensor:
        return sugar(t, name, **SETTINGS[name]).sum()

    for in_dim in (0, 1):
        got = torch.func.vmap(torch.func.grad(total), in_dims=in_dim, out_dims=in_dim)(x)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
    got = torch.func.grad(lambda t: torch.func.vmap(total)(t).sum())(x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
    leaf = x.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(torch.func.vmap(total)(leaf).sum(), leaf)
    torch.testing.assert_close(by_autograd, expected, rtol=1e-12, atol=1e-15)


@JIT_IS_DEPRECATED  # PyTorch's own forward mode scripts its decompositions
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_derivatives_are_the_formula(name: str) -> None:
    x = bank_input()
    tangent = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    expected = slope(x, name, **SETTINGS[name])

    def function(t: Tensor) -> Tensor:
        return sugar(t, name, **SETTINGS[name])

    value, along = torch.func.jvp(function, (x,), (tangent,))
    assert torch.equal(value, F.relu(x))
    torch.testing.assert_close(along, tangent * expected, rtol=1e-12, atol=1e-15)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(function)(x), torch.diag(expected), rtol=1e-12, atol=1e-15)


@JIT_IS_DEPRECATED
@pytest.mark.parametrize("jacobian", [torch.func.jacrev, torch.func.jacfwd])
def test_hessian_is_the_second_derivative(jacobian: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    x, h = torch.tensor([-2.0, -0.7, 0.4, 1.9], dtype=torch.float64), 1e-5
    got = jacobian(torch.func.grad(lambda t: sugar(t).sum()))(x)
    torch.testing.assert_close(got, torch.diag((slope(x + h) - slope(x - h)) / (2 * h)), rtol=1e-7, atol=1e-9)


def test_per_sample_gradients_are_those_of_one_sample_at_a_time() -> None:
    model, oracle = Bank(SUGAR), Bank(FGI)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (sample,)).square().sum()

    samples = bank_input().reshape(8, 5)
    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)
    for i, sample_ in enumerate(samples):
        expected = torch.autograd.grad(oracle(sample_).square().sum(), [oracle.scale, oracle.shift])
        torch.testing.assert_close([got["scale"][i], got["shift"][i]], list(expected), rtol=1e-10, atol=1e-12)


# --- whole networks of timm

NETWORKS = {"test_resnet": nn.ReLU, "test_convnext": GELUTanh}


def features(name: str, feature_cls: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True, feature_cls=feature_cls, in_chans=2).double()
    for name_, parameter in model.named_parameters():
        if name_.endswith("gamma"):  # layer scales start at 1e-6, which would hide the activations
            nn.init.constant_(parameter, 0.5)
    return model.train()


def feature_gradients(model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Features, and gradients by parameter name without the prefixes and dots that differ among wrappers."""
    x = torch.randn(2, 2, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs = model(x)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    generator = torch.Generator().manual_seed(2)
    sum((y * torch.randn(y.shape, dtype=y.dtype, generator=generator)).sum() for y in outputs).backward()
    prefixes = ("body.", "graph_module.", "model.")
    names = [next((n.removeprefix(p) for p in prefixes if n.startswith(p)), n) for n, _ in model.named_parameters()]
    grads = [p.grad for p in model.parameters()]
    return outputs, {n.replace(".", "_"): g for n, g in zip(names, grads, strict=True) if g is not None}


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx", "getter"])
@pytest.mark.parametrize("base", NETWORKS)
def test_features_only_has_the_gradients_of_forward_gradient_injection(base: str, feature_cls: str) -> None:
    oracle = inject(features(base, "list"), (NETWORKS[base],))
    expected_features, expected = feature_gradients(oracle)
    got_features, got = feature_gradients(features(f"{base}_sugar", feature_cls))
    torch.testing.assert_close(list(got_features), list(expected_features), rtol=1e-10, atol=1e-12)
    assert expected.keys() <= got.keys()
    torch.testing.assert_close({name: got[name] for name in expected}, expected, rtol=1e-8, atol=1e-9)


# --- gradients off: ReLU and nothing else


def test_without_gradients_nothing_is_recorded() -> None:
    x = torch.randn(5, requires_grad=True)
    with torch.no_grad():
        assert sugar(x).grad_fn is None
        assert torch.equal(sugar(x), F.relu(x))
    with torch.inference_mode():
        y = SUGAR()(x)
        assert y.is_inference()
        assert torch.equal(y, F.relu(x))
    assert torch.equal(sugar(y), y)  # a tensor from inference mode is a fine input with gradients on


def test_without_gradients_the_call_is_relu_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    marker = torch.zeros(1)
    monkeypatch.setattr(F, "relu", lambda x: marker)
    with torch.no_grad():
        assert SUGAR()(torch.ones(1)) is marker


def targets(graph: torch.fx.Graph) -> set[object]:
    return {node.target for node in graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("strict", [True, False])
def test_export_without_gradients_holds_relu_only(strict: bool, compiler: None) -> None:
    with torch.no_grad():
        program = torch.export.export(nn.Sequential(SUGAR(), SUGAR(surrogate="gelu")), (torch.ones(3),), strict=strict)
    assert targets(program.graph) == {torch.ops.aten.relu.default}


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_gradients_is_decomposed_to_relu_only_on_request(strict: bool, compiler: None) -> None:
    program = torch.export.export(nn.Sequential(SUGAR(), SUGAR(surrogate="gelu")), (torch.ones(3),), strict=strict)
    operator = torch.ops.timm_sugar.relu.default
    assert targets(program.graph) == {operator}
    assert targets(program.run_decompositions().graph) == {operator}
    to_relu = {operator: lambda x, *_: torch.relu(x)}
    assert targets(program.run_decompositions(to_relu).graph) == {torch.ops.aten.relu.default}


@JIT_IS_DEPRECATED
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_jit_trace_without_gradients_holds_relu_only(mode: type[torch.no_grad]) -> None:
    with mode():
        traced = torch.jit.trace(nn.Sequential(SUGAR(), SUGAR(surrogate="gelu")), torch.ones(3))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()} - {"prim::GetAttr", "prim::Constant"}
    assert kinds == {"aten::relu"}


@JIT_IS_DEPRECATED
def test_jit_trace_with_gradients_holds_the_operator_and_computes_relu_without() -> None:
    traced = torch.jit.trace(SUGAR(), torch.ones(3))
    assert "timm_sugar::relu" in str(traced.inlined_graph)
    x = torch.tensor([-1.0, -0.0, 2.0], requires_grad=True)
    with torch.no_grad():
        assert torch.equal(bits(traced(x)), bits(F.relu(x)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@JIT_IS_DEPRECATED
def test_onnx_holds_relu_only() -> None:
    buffer = io.BytesIO()
    try:
        torch.onnx.export(nn.Sequential(SUGAR(), SUGAR(surrogate="gelu")), (torch.ones(3),), buffer, dynamo=False)
    except (ImportError, torch.onnx.errors.OnnxExporterError) as error:
        pytest.skip(f"pip install onnx onnxscript makes it run: {error}")
    assert buffer.getvalue().count(b"Relu") >= 2
    assert b"timm_sugar" not in buffer.getvalue()


# --- compilers and their caches


def test_every_alpha_has_its_own_compiled_gradient(compiler: None) -> None:
    compiled = torch.compile(lambda t, alpha: sugar(t, "nelu", alpha=alpha), fullgraph=True, backend="aot_eager")
    x = bank_input().requires_grad_()
    for alpha in (0.01, 0.05, 0.1, 0.01):
        (grad,) = torch.autograd.grad(compiled(x, alpha).sum(), x)
        torch.testing.assert_close(grad, slope(x, "nelu", alpha=alpha), rtol=1e-12, atol=1e-15)


@pytest.mark.skipif(not hasattr(torch.compiler, "nested_compile_region"), reason="this PyTorch has no regions")
def test_a_region_that_is_compiled_once_has_each_blocks_own_surrogate(compiler: None) -> None:
    class Block(nn.Module):
        def __init__(self, surrogate: str) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(6, 6), SUGAR(surrogate=surrogate)

        @torch.compiler.nested_compile_region
        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.fc(x))

    names = ("silu", "silu", "gelu")
    model = nn.Sequential(*map(Block, names)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    weights = [block.fc.weight for block in model]
    found = torch.autograd.grad(torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum(), weights)
    for block, name in zip(model, names, strict=True):
        x = injected(block.fc(x), name)
    for one, expected in zip(found, torch.autograd.grad(x.square().sum(), weights), strict=True):
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("is_set", [False, True])
def test_one_module_called_twice_is_compiled_for_any_size_and_value(is_set: bool, compiler: None) -> None:
    """As torchvision's ResNets call theirs; dynamic=True makes arguments of numbers, too."""
    act = SUGAR(surrogate="nelu", alpha=0.05)
    if is_set:
        act.set_surrogate(alpha=0.05)
    compiled = torch.compile(lambda t: act(act(t) - 1), fullgraph=True, dynamic=True, backend="aot_eager")
    for alpha, size in ((0.05, 3), (0.3, 5)):
        act.alpha = alpha
        x = torch.linspace(-3, 3, size, dtype=torch.float64, requires_grad=True)
        expected = slope(F.relu(x) - 1, "nelu", alpha=alpha) * slope(x, "nelu", alpha=alpha)
        torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], expected, rtol=1e-12, atol=1e-15)


def test_sugar_called_twice_is_compiled_for_any_size_and_value(compiler: None) -> None:
    def twice(x: Tensor, alpha: float) -> Tensor:
        return sugar(sugar(x, "nelu", alpha=alpha) - 1, "nelu", alpha=alpha)

    compiled = torch.compile(twice, fullgraph=True, dynamic=True, backend="aot_eager")
    x = bank_input().requires_grad_()
    for alpha in (0.05, 0.3):
        expected = slope(F.relu(x) - 1, "nelu", alpha=alpha) * slope(x, "nelu", alpha=alpha)
        (grad,) = torch.autograd.grad(compiled(x, alpha).sum(), x)
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-15)


def test_compiled_modules_of_different_settings_keep_their_own_gradient(compiler: None) -> None:
    x = bank_input().requires_grad_()
    for alpha in (0.01, 0.05, 0.1):
        compiled = torch.compile(SUGAR(surrogate="nelu", alpha=alpha), fullgraph=True, backend="aot_eager")
        (grad,) = torch.autograd.grad(compiled(x).sum(), x)
        torch.testing.assert_close(grad, slope(x, "nelu", alpha=alpha), rtol=1e-12, atol=1e-15)


def test_compiled_function_is_compiled_again_when_gradients_are_switched(compiler: None) -> None:
    compiled = torch.compile(SUGAR(), fullgraph=True, backend="aot_eager")
    x = bank_input().requires_grad_()
    with torch.no_grad():
        assert torch.equal(compiled(x), F.relu(x))
    (grad,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(grad, slope(x), rtol=1e-12, atol=1e-15)


@pytest.fixture(scope="module")
def inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that no earlier run has filled, shared by the tests here because the first kernel takes long."""
    folder = tmp_path_factory.mktemp("inductor")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    yield folder
    del os.environ["TORCHINDUCTOR_CACHE_DIR"]


PROGRAM = """
import sys, torch
from torch._dynamo.utils import counters
from timm_sugar import register_surrogate, sugar
HEIGHT = float(sys.argv[1])
def slope(x):
    return torch.full_like(x, HEIGHT)
register_surrogate("mine", derivative=slope)
x = torch.ones(3, requires_grad=True)
for _ in range(2):
    torch.compiler.reset()
    (grad,) = torch.autograd.grad(torch.compile(lambda t: sugar(t, "mine"), fullgraph=True)(x).sum(), x)
    print(*grad.tolist(), counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow
@NEEDS_COMPILER
def test_compiler_cache_of_an_older_formula_is_not_used(tmp_path: Path, inductor_cache: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    outcomes = []
    for height in ("2", "3"):
        command = [sys.executable, str(program), height]
        outcomes.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())
    assert outcomes[0] == ["2.0 2.0 2.0 0", "2.0 2.0 2.0 1"]  # so the cache is at work
    assert outcomes[1] == ["3.0 3.0 3.0 0", "3.0 3.0 3.0 1"]


def test_modules_carry_the_fingerprint_of_their_formula() -> None:
    assert len({SUGAR(surrogate=name).formula for name in NAMES}) == len(NAMES)


# --- the module


def test_inplace_comes_first_and_changes_nothing() -> None:
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    for module in (SUGAR(True), SUGAR(inplace=True), SUGAR(False), FunctionalSUGAR(True)):
        assert module(x * 1).tolist() == [0.0, 2.0]
    assert FunctionalSUGAR()(x, inplace=True).tolist() == [0.0, 2.0]
    assert x.tolist() == [-1.0, 2.0]
    with pytest.raises(TypeError):
        SUGAR(False, "nelu")  # type: ignore[misc]


def test_surrogate_in_the_place_of_inplace_is_refused() -> None:
    with pytest.raises(TypeError, match="surrogate"):
        SUGAR("nelu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (SUGAR(), "SUGAR(surrogate='bsilu', alpha=1.67)"),
        (SUGAR(surrogate="nelu", alpha=0.05), "SUGAR(surrogate='nelu', alpha=0.05)"),
        (SUGAR(True, surrogate="gelu"), "SUGAR(surrogate='gelu')"),
        (SUGAR(surrogate="leaky_relu"), "SUGAR(surrogate='leaky_relu', negative_slope=0.01)"),
    ],
)
def test_repr_shows_surrogate_and_parameters(module: SUGAR, text: str) -> None:
    assert repr(module) == text


def test_module_has_no_state() -> None:
    assert not SUGAR().state_dict()
    assert not list(SUGAR().parameters())


def test_copies_keep_their_settings() -> None:
    module = SUGAR(surrogate="nelu", alpha=0.05)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(twin) == repr(module)


# --- bad input


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128])
@pytest.mark.parametrize("gradients_on", [True, False])
def test_input_that_is_not_real_floating_point_is_refused(dtype: torch.dtype, gradients_on: bool) -> None:
    for call in (sugar, SUGAR(), FunctionalSUGAR()):
        with torch.set_grad_enabled(gradients_on), pytest.raises(TypeError, match=f"floating-point.*{dtype}"):
            call(torch.ones(2).to(dtype))


@pytest.mark.parametrize("bad", [{"surrogate": "nope"}, {"beta": 1.0}, {"alpha": math.nan}, {"alpha": "1"}])
def test_bad_settings_are_refused_without_gradients_too(bad: dict[str, object]) -> None:
    with torch.no_grad(), pytest.raises((ValueError, TypeError)):
        sugar(torch.ones(1), **bad)  # type: ignore[arg-type]


# --- what this package takes from PyTorch's semi-private API


def test_pytorch_still_has_what_the_operator_is_made_of() -> None:
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.function import Function, _SingleLevelFunction

    assert issubclass(Function, _SingleLevelFunction)
    with enable_single_level_autograd_function():
        pass
    assert callable(torch.library.register_vmap)
    leaf = torch.ones(2, requires_grad=True)
    for plain in (torch.ones(2), leaf, leaf * 2, torch.ones(3, 3)[1:], torch.ones(2).half()):
        assert _torch.is_ordinary_memory(plain)
    assert {torch.Tag.pointwise, torch.Tag.pt2_compliant_tag} <= set(torch.ops.timm_sugar.relu.default.tags)


def test_pytorch_still_checks_traces_in_the_function_that_is_looked_for() -> None:
    import inspect

    from torch.jit import _trace

    assert "traced_func" in inspect.signature(_trace._check_trace).parameters


def test_operator_passes_pytorchs_own_check() -> None:
    x = torch.randn(6, requires_grad=True)
    module = SUGAR(surrogate="nelu")
    torch.library.opcheck(
        torch.ops.timm_sugar.relu.default,
        (x, module.surrogate, module.values, module.formula),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_registered_surrogate_takes_the_same_routes(monkeypatch: pytest.MonkeyPatch, compiler: None) -> None:
    monkeypatch.setattr(surrogate_module, "_surrogates", dict(surrogate_module._surrogates))
    register_surrogate("mine", derivative=lambda x, a: torch.sigmoid(a * x), a=2.0)
    for route in ("eager", "pickle", "fx", "export", "compile_aot_eager", "checkpoint"):
        x = bank_input().requires_grad_()
        y = {**COPIES, **WRAPPERS}[route](SUGAR(surrogate="mine", a=0.5))(x)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.sigmoid(0.5 * x.detach()))


@JIT_IS_DEPRECATED
@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")  # of torch.fx's own modules
def test_a_traced_graph_can_be_scripted() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), SUGAR(surrogate="nelu", alpha=0.3)).double())
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(graph(x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(torch.jit.script(graph)(x).sum(), x), expected)
