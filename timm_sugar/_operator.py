"""The dispatcher operator `torch.ops.timm_sugar.relu`: ReLU forward, a surrogate's derivative backward.

The one place that knows autograd, compilers and exporters. Tracers that look through an autograd.Function and keep
ReLU's gradient (torch.fx, torch.export) see an operator and leave it alone, while autograd, vmap and compilers find its
meaning by dispatch. Eager mode goes without the operator: an autograd.Function is enough there, and faster.

TorchScript reads the types, so there is no `from __future__ import annotations` in this file.
"""

from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from timm_sugar import _torch
from timm_sugar._compiled import prepare, times_derivative
from timm_sugar.surrogate import Surrogate, known_surrogate

_library = torch.library.Library("timm_sugar", "DEF")
# `formula` identifies the derivative: compiler caches key on an operator's arguments, not on its Python kernel.
_library.define(
    "relu(Tensor x, str surrogate, float[] values, str formula) -> Tensor",
    tags=(torch.Tag.pointwise, torch.Tag.pt2_compliant_tag),
)
_operator = torch.ops.timm_sugar.relu.default
# The same with parameters that are arguments of a compiled graph, not constants in it: 0-dim tensors.
_library.define(
    "relu_scheduled(Tensor x, str surrogate, Tensor[] values, str formula) -> Tensor",
    tags=(torch.Tag.pointwise, torch.Tag.pt2_compliant_tag),
)
_scheduled_operator = torch.ops.timm_sugar.relu_scheduled.default


class Block:
    """A block of `relu_gradient()`, which ends for all contexts that were copied inside, as a task's."""

    is_open = True


block_of_relu_gradient: ContextVar[Block | None] = ContextVar("block_of_relu_gradient", default=None)


def _uses_relu_gradient() -> bool:
    block = block_of_relu_gradient.get()
    return block is not None and block.is_open


Setting = tuple[Surrogate | None, list[float]]  # None for ReLU's own derivative; values of the parameters


def _gradient(ctx: Any, direction: Tensor) -> Tensor:
    """direction * derivative at the saved x: the surrogate's, or ReLU's own for None."""
    return _times_slope(direction, ctx.saved_tensors[0], *ctx.setting)


def _times_slope(direction: Tensor, x: Tensor, surrogate: Surrogate | None, values: list[Any]) -> Tensor:
    if surrogate is None:
        if direction.layout != torch.strided:  # where() takes none
            return direction * ~(x <= 0)
        return torch.where(x <= 0, 0.0, direction)  # as F.relu: 0 at 0, also of infinity; NaN in x lets all through
    return times_derivative(direction, x, surrogate, values)


class _EagerFunction(torch.autograd.Function):
    """ReLU with another derivative, in eager mode. (Without setup_context, which costs 20 microseconds a call.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, setting: Setting) -> Tensor:
        ctx.setting = setting
        ctx.save_for_backward(x)
        if _torch.may_be_in_forward_mode():
            ctx.save_for_forward(x)
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gradient(ctx, grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _gradient(ctx, tangent)


class _TransformedFunction(torch.autograd.Function):
    """The same for torch.func by public means alone; nested forward mode would be wrong, so it has none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, setting: Setting) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.setting = inputs
        ctx.save_for_backward(x)

    backward = _EagerFunction.backward


class _OperatorFunction(_torch.SingleLevelFunction or torch.autograd.Function):  # type: ignore[misc]
    """The same inside the operator's kernel, where `autograd.Function.apply` fails under torch.func."""

    if _torch.compiled_autograd_key:
        _compiled_autograd_key = staticmethod(_torch.compiled_autograd_key)

    @staticmethod
    def forward(x: Tensor, grad_mode: bool, *arguments: Any) -> Tensor:
        return _value(x, grad_mode, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, surrogate, values, formula = inputs
        of_relu = _uses_relu_gradient()
        ctx.setting = None if of_relu else known_surrogate(surrogate, formula), values
        if of_relu and _torch.is_surely_in_compiler():  # whose caches know nothing of the block
            raise RuntimeError(
                "nothing is compiled inside of relu_gradient(): set no other stance of the compiler there"
            )
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _gradient(ctx, grad), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        if _torch.can_nest and _torch.in_transform():
            # PyTorch has switched forward mode off, for the levels below, too, which are to differentiate this. So is
            # reverse mode at this level, if the tangent is one of a dual number.
            with _torch.forward_mode():
                return _times_slope(tangent, _torch.primal(ctx.saved_tensors[0]), *ctx.setting)
        return _gradient(ctx, tangent)


def _value(x: Tensor, grad_mode: bool, surrogate: str, values: list[Any], formula: str) -> Tensor:
    """relu(x) for the level of torch.func at which the operator was called: the levels below record the operator."""
    if _torch.loses_tangents():
        raise RuntimeError("this PyTorch compiles no dual numbers: call the function uncompiled in forward mode")
    if _torch.in_transform() or _torch.records_graph():
        if not _torch.can_nest:
            raise RuntimeError(f"this PyTorch can't record sugar(): it has no torch.{_torch.missing[0]}")
        with _torch.one_level_down(grad_mode):
            return _operator_for(values)(x, surrogate, values, formula)
    return torch.ops.aten.relu.default(x)


def _operator_for(values: list[Any]) -> Any:
    return _scheduled_operator if any(isinstance(value, Tensor) for value in values) else _operator


def _autograd_kernel(x: Tensor, surrogate: str, values: list[Any], formula: str) -> Tensor:
    grad_mode = torch.is_grad_enabled()
    if not (grad_mode or _torch.in_forward_mode(x) or _torch.in_transform() or _torch.is_in_compiler()):
        return _value(x, grad_mode, surrogate, values, formula)
    with _torch.allow_single_level():
        return _OperatorFunction.apply(x, grad_mode, surrogate, values, formula)


def _plain_kernel(x: Tensor, surrogate: str, values: list[Any], formula: str) -> Tensor:
    return torch.ops.aten.relu.default(x)


def _vmap_rule(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, surrogate: str, values: list[Any], formula: str
) -> tuple[Tensor, int]:
    return _operator_for(values)(x, surrogate, values, formula), in_dims[0]


for _name in ("relu", "relu_scheduled"):
    _library.impl(_name, _torch.leave_to_eager(_autograd_kernel), "Autograd")
    _library.impl(_name, _plain_kernel, "CompositeExplicitAutograd")
    torch.library.register_vmap(f"timm_sugar::{_name}", _vmap_rule, lib=_library)


def _check(x: Tensor) -> None:
    """Raise TypeError for what is no real floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"sugar() needs a tensor, not {type(x).__name__}")
    if not x.dtype.is_floating_point:
        what = "real floating-point tensor"
        if x.is_quantized:
            raise TypeError(f"sugar() needs a {what}, not a quantised one: call timm_sugar.to_relu(model) before")
        raise TypeError(f"sugar() needs a {what}, not {x.dtype}: convert it, e.g. with .float()")


def _is_recorded(x: Tensor) -> bool:
    """Whether somebody may ask for a derivative; if not, a deployed graph holds ReLU and no more."""
    if torch.compiler.is_dynamo_compiling():  # forward mode comes first, so that dynamo compiles again when it begins
        return _torch.in_forward_mode(x) or torch.is_grad_enabled() or _torch.in_transform()
    if torch.jit.is_tracing():
        if torch.onnx.is_in_onnx_export():
            return False
        return torch.is_grad_enabled() or _torch.repeats_trace_with_gradients()
    return torch.is_grad_enabled() or _torch.in_forward_mode(x)


def constants(values: list[Any]) -> list[Any]:
    """Numbers and names as constants of the graph, which what is compiled depends on.

    torch.compile(dynamic=True) makes arguments of numbers, which fails below, and nested_compile_region, together with
    a checkpoint, takes a region with one name for that with another. What is the key of a dictionary is a constant.
    """
    return [next(iter({value: None})) for value in values]


def _recomputed(operator: Any, x: Tensor, surrogate: str, values: list[Any], formula: str) -> Tensor:
    """The operator under a compiler: only x is saved, from which the backward pass takes relu(x) too."""
    surrogate, formula = constants([surrogate, formula])
    return checkpoint(operator, x, surrogate, values, formula, use_reentrant=False, preserve_rng_state=False)


def _apply_eagerly(x: Tensor, surrogate: str, values: list[float], formula: str) -> Tensor:
    if not x.dtype.is_floating_point:
        _check(x)
    recorded = torch.is_grad_enabled() and (x.requires_grad or not _torch.can_nest)  # which may hide it
    if not recorded and not _torch.in_forward_mode(x):
        return F.relu(x)
    if x.layout != torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else x.layout
        raise TypeError(f"sugar() has no gradient for a tensor of layout {layout}: call it on the values inside")
    known = known_surrogate(surrogate, formula)
    prepare(x, known, values)
    function = _EagerFunction if _torch.can_nest else _TransformedFunction
    return function.apply(x, (None if _uses_relu_gradient() else known, values))


def apply(x: Tensor, surrogate: str, values: list[float], formula: str) -> Tensor:
    """relu(x) with the surrogate's gradient, by the cheapest way that keeps it: what `sugar` and `SUGAR` call."""
    if not torch.jit.is_scripting():  # alone, so that TorchScript skips what it can't compile
        is_compiling = torch.compiler.is_dynamo_compiling()
        if not is_compiling and _torch.is_eager(x):
            return _apply_eagerly(x, surrogate, values, formula)
        if isinstance(x, torch.fx.Proxy):  # has no dtype, and its graph may run with gradients later
            return torch.ops.timm_sugar.relu(x, surrogate, values, formula)  # TorchScript knows no `.default`
        _check(x)
        if is_compiling:
            if not _is_recorded(x):
                return F.relu(x)
            if not _torch.is_exporting() and not _torch.in_transform():  # which takes no checkpoint
                return _recomputed(_operator, x, surrogate, constants(values), formula)
        elif x.layout != torch.strided or x.is_nested:
            return _apply_eagerly(x, surrogate, values, formula)
        elif not _is_recorded(x):
            return F.relu(x)
    return torch.ops.timm_sugar.relu(x, surrogate, values, formula)


class RunTimeValues:
    """Values of a surrogate's parameters as tensors, so that code compiled for them takes others without compiling.

    They are replaced, never written to: a backward pass has the values of its forward pass.
    """

    def __init__(self, values: list[float]) -> None:
        with torch.inference_mode(False):  # compiled code saves them for a backward pass
            self.single, self.double = (
                [torch.tensor(value, dtype=dtype, device="cpu") for value in values]
                for dtype in (torch.float32, torch.float64)  # the latter for float64 alone: MPS and some GPUs have none
            )


def apply_scheduled(x: Tensor, surrogate: str, values: RunTimeValues, formula: str) -> Tensor:
    """`apply` under torch.compile, with values that may be others when what is compiled runs again."""
    _check(x)
    if not _is_recorded(x):
        return F.relu(x)
    tensors = values.double if x.dtype == torch.float64 else values.single
    if _torch.in_transform():  # which takes no checkpoint
        return _scheduled_operator(x, surrogate, tensors, formula)
    return _recomputed(_scheduled_operator, x, surrogate, tensors, formula)
