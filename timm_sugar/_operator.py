"""The dispatcher operator `torch.ops.timm_sugar.relu`: ReLU forward, a surrogate's derivative backward.

The one place that knows autograd, compilers and exporters. Tracers that look through an autograd.Function and keep
ReLU's gradient (torch.fx, torch.export) see an operator and leave it alone, while autograd, vmap and compilers find its
meaning by dispatch.

TorchScript reads the types, so there is no `from __future__ import annotations` in this file.
"""

import traceback

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function  # semi-private, guarded by tests
from torch.autograd.function import _SingleLevelFunction
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint

from timm_sugar._compiled import compiled_gradient, is_compiled
from timm_sugar._saved_tensors import can_share, remember_value, share_saved
from timm_sugar.surrogate import surrogate_derivative

_library = torch.library.Library("timm_sugar", "DEF")
# `formula` identifies the derivative: compiler caches key on an operator's arguments, not on its Python kernel.
_library.define(
    "relu(Tensor x, str surrogate, float[] values, str formula) -> Tensor",
    tags=(torch.Tag.pointwise, torch.Tag.pt2_compliant_tag),
)
_operator = torch.ops.timm_sugar.relu.default


_CHUNK = 1 << 17  # elements; the intermediate results of a formula for so many of them stay in a core's cache
_WORTHWHILE = 1 << 14  # elements, from which on a compiled gradient is faster than the formula if it is there already
_PLAIN = torch._C._dispatch_keys(torch.empty(0, device="cpu"))  # semi-private, guarded by tests


def _is_plain(x: Tensor, direction: Tensor) -> bool:
    """Whether two tensors are ordinary ones in a CPU's memory, laid out alike without gaps, that nothing records.

    Whatever traces, batches, wraps or distributes a tensor shows in its dispatch keys.
    """
    return (
        torch._C._dispatch_keys(x).raw_repr() == torch._C._dispatch_keys(direction).raw_repr() == _PLAIN.raw_repr()
        and (x.dtype, x.shape, x.stride()) == (direction.dtype, direction.shape, direction.stride())
        and torch.ops.aten.is_non_overlapping_and_dense.default(x)
        and not torch.is_grad_enabled()
    )


def _large_gradient(direction: Tensor, x: Tensor, surrogate: str, values: list[float]) -> Tensor:
    """direction * derivative in one pass over memory, by a compiled loop if there is one."""
    flat_x, flat_direction = (tensor.as_strided((x.numel(),), (1,)) for tensor in (x, direction))
    compiled = None if is_in_torch_dispatch_mode() else compiled_gradient(surrogate, tuple(values), x.dtype)
    if compiled is None:
        return _in_chunks(flat_direction, flat_x, surrogate, values).as_strided(x.shape, x.stride())
    return compiled(flat_direction, flat_x).as_strided(x.shape, x.stride())


def _in_chunks(direction: Tensor, x: Tensor, surrogate: str, values: list[float]) -> Tensor:
    """direction * derivative, a piece of memory at a time: on a CPU the formula is otherwise as slow as the memory."""
    result = torch.empty_like(x)
    pieces = (tensor.split(_CHUNK * torch.get_num_threads()) for tensor in (result, x, direction))
    for into, piece, factor in zip(*pieces, strict=True):
        into.copy_(factor * surrogate_derivative(piece, surrogate, values))
    return result


class _SugarFunction(_SingleLevelFunction):
    """Plain `autograd.Function.apply` can't be called below autograd's dispatch key; its single-level form can."""

    @staticmethod
    def forward(x: Tensor, surrogate: str, values: list[float]) -> Tensor:
        return torch.ops.aten.relu.default(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        x, ctx.surrogate, ctx.values = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def _times_derivative(ctx, direction: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        least = _WORTHWHILE if is_compiled(ctx.surrogate, tuple(ctx.values), x.dtype) else _CHUNK
        if x.numel() > least and _is_plain(x, direction):
            return _large_gradient(direction, x, ctx.surrogate, ctx.values)
        return (direction * surrogate_derivative(x, ctx.surrogate, ctx.values)).to(direction.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        return _SugarFunction._times_derivative(ctx, grad), None, None

    @staticmethod
    def jvp(ctx, tangent: Tensor, *_: None) -> Tensor:  # type: ignore[no-untyped-def]
        return _SugarFunction._times_derivative(ctx, tangent)


def _autograd_kernel(x: Tensor, surrogate: str, values: list[float], formula: str) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.relu.default(x)
    with enable_single_level_autograd_function():
        return _SugarFunction.apply(x, surrogate, values)  # type: ignore[attr-defined]


def _plain_kernel(x: Tensor, surrogate: str, values: list[float], formula: str) -> Tensor:
    return torch.ops.aten.relu.default(x)


def _vmap_rule(info, in_dims, x: Tensor, *arguments) -> tuple[Tensor, int]:  # type: ignore[no-untyped-def]
    return _operator(x, *arguments), in_dims[0]


_library.impl("relu", _autograd_kernel, "Autograd")
_library.impl("relu", _plain_kernel, "CompositeExplicitAutograd")
torch.library.register_vmap("timm_sugar::relu", _vmap_rule, lib=_library)


def _repeats_trace_with_gradients() -> bool:
    """Whether torch.jit.trace is checking, as always without gradients, a graph that it recorded with them."""
    frames = (frame for frame, _ in traceback.walk_stack(None) if frame.f_code.co_name == "_check_trace")
    return any("timm_sugar::relu" in str(frame.f_locals["traced_func"].inlined_graph) for frame in frames)


def _is_plain_relu(x: Tensor) -> bool:
    """Whether nothing can ask for a gradient here, so that a deployed graph holds ReLU and no more."""
    if isinstance(x, torch.fx.Proxy):  # has no dtype, and its graph may run with gradients later
        return False
    if not isinstance(x, Tensor):
        raise TypeError(f"sugar() needs a tensor, not {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"sugar() needs a real floating-point tensor, not {x.dtype}: convert it, e.g. with .float()")
    if torch.jit.is_tracing():
        return torch.onnx.is_in_onnx_export() or not (torch.is_grad_enabled() or _repeats_trace_with_gradients())
    return not torch.is_grad_enabled()


def _recomputed(x: Tensor, surrogate: str, values: list[float], formula: str) -> Tensor:
    """The operator under a compiler: only x is saved, from which the backward pass takes relu(x) too."""
    return checkpoint(_operator, x, surrogate, values, formula, use_reentrant=False, preserve_rng_state=False)


def apply(x: Tensor, surrogate: str, values: list[float], formula: str) -> Tensor:
    """relu(x) with the surrogate's gradient, by the cheapest way that keeps it: what `sugar` and `SUGAR` call."""
    if not torch.jit.is_scripting():  # alone, so that TorchScript skips what it can't compile
        if _is_plain_relu(x):
            return F.relu(x)
        if torch.compiler.is_dynamo_compiling():
            if not torch.compiler.is_exporting():
                return _recomputed(x, surrogate, values, formula)
        elif can_share(x):
            if x.numel() > _CHUNK and x.is_cpu:  # before the first backward pass, so that all of them are alike
                compiled_gradient(surrogate, tuple(values), x.dtype)
            share_saved(x)
            y = _operator(x, surrogate, values, formula)
            remember_value(y)
            return y
    return torch.ops.timm_sugar.relu(x, surrogate, values, formula)
