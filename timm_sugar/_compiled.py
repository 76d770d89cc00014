"""A surrogate's gradient as one loop over memory, compiled by inductor for eager mode.

Inductor keeps what it compiled on disk, under a hash of the traced formula itself, so the next process is ready within
a second or two and never meets the gradient of an older formula.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from timm_sugar import _torch
from timm_sugar.surrogate import surrogate_derivative

_CHUNK = 1 << 17  # elements; the intermediate results of a formula for so many of them stay in a core's cache
_WORTHWHILE = 1 << 14  # elements, from which on a compiled gradient is faster than the formula if it is there already
_logger = logging.getLogger(__name__)
_state = {"announced": False, "usable": True}

Gradient = Callable[[Tensor, Tensor], Tensor]

_gradients: dict[tuple[str, tuple[float, ...], torch.dtype], Gradient | None] = {}
_lock = threading.Lock()  # the compiler is not made for several threads


def times_derivative(direction: Tensor, x: Tensor, surrogate: str, values: list[float]) -> Tensor:
    """direction * derivative of the surrogate at x, rounded once to direction's dtype, by the fastest way there is.

    x and direction: one shape. Differentiable once more; any layout, device, wrapper or transform.
    """
    if x.numel() > _WORTHWHILE:
        least = _WORTHWHILE if is_compiled(surrogate, tuple(values), x.dtype) else _CHUNK
        if x.numel() > least and _is_plain(x, direction):
            return _large_gradient(direction, x, surrogate, values)
    return (direction * surrogate_derivative(x, surrogate, values)).to(direction.dtype)


def prepare(x: Tensor, surrogate: str, values: list[float]) -> None:
    """Compile in the forward pass what `times_derivative` will want for x, so that all backward passes are alike."""
    if x.numel() > _CHUNK and x.is_cpu:
        compiled_gradient(surrogate, tuple(values), x.dtype)


def _is_plain(x: Tensor, direction: Tensor) -> bool:
    """Whether two tensors are ordinary ones in a CPU's memory, laid out alike without gaps, that nothing records."""
    return (
        _torch.is_ordinary_memory(x, direction)
        and (x.dtype, x.shape, x.stride()) == (direction.dtype, direction.shape, direction.stride())
        and torch.ops.aten.is_non_overlapping_and_dense.default(x)
        and not torch.is_grad_enabled()
    )


def _large_gradient(direction: Tensor, x: Tensor, surrogate: str, values: list[float]) -> Tensor:
    """direction * derivative in one pass over memory, by a compiled loop if there is one."""
    flat_x, flat_direction = (tensor.as_strided((x.numel(),), (1,)) for tensor in (x, direction))
    compiled = None if _torch.in_dispatch_mode() else compiled_gradient(surrogate, tuple(values), x.dtype)
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


def is_compiled(surrogate: str, values: tuple[float, ...], dtype: torch.dtype) -> bool:
    """Whether `compiled_gradient` was asked for this one before, and made it."""
    return _gradients.get((surrogate, values, dtype)) is not None


def compiled_gradient(surrogate: str, values: tuple[float, ...], dtype: torch.dtype) -> Gradient | None:
    """A function of (direction, x), two dense one-dimensional CPU tensors of a dtype, that returns their
    direction * derivative, rounded once; None where inductor can't compile it, or torch.compile is switched off.

    The first call in a process takes a second or two, and up to some 15 if the cache on disk is empty: a line says so.
    """
    key = surrogate, values, dtype
    if key not in _gradients:
        with _lock:
            if key not in _gradients:
                _gradients[key] = _try_to_compile(*key)
    return _gradients[key]


def _try_to_compile(surrogate: str, values: tuple[float, ...], dtype: torch.dtype) -> Gradient | None:
    if not _state["usable"]:
        return None
    try:
        if torch._dynamo.config.disable:  # TORCH_COMPILE_DISABLE=1
            return None
        if not _state["announced"]:
            _state["announced"] = True
            _logger.warning(
                "compiling the gradient of SUGAR: some seconds, once (TORCH_COMPILE_DISABLE=1 does without)"
            )
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return compile_loop(lambda x: surrogate_derivative(x, surrogate, list(values)), dtype)
    except Exception as error:  # whatever is wrong with a compiler, its cache or its headers: it only costs speed
        _state["usable"] = False
        reason = next(iter(str(error).splitlines()), "")
        _logger.warning("the gradient of SUGAR is not compiled, so slower: %s: %.150s", type(error).__name__, reason)
        return None


def compile_loop(factor: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Gradient:
    """direction * factor(x) as one loop. `factor`: elementwise torch operations. Raises what a compiler may raise."""
    from torch._inductor import standalone_compile  # takes a second
    from torch.fx.experimental.proxy_tensor import make_fx

    # A tuple, as of every graph of inductor's. No annotations: torch can't make a key for its cache of a tuple's.
    def gradient(direction, x):  # type: ignore[no-untyped-def]
        return ((direction * factor(x)).to(dtype),)

    examples: list[Any] = [torch.zeros(2**20, dtype=dtype), torch.zeros(2**20, dtype=dtype)]
    graph = make_fx(gradient, tracing_mode="symbolic")(*examples)
    options = {"config_patches": {"cpp.dynamic_threads": True}}  # set_num_threads holds for it, too
    kernel = standalone_compile(graph, examples, options=options)
    return lambda direction, x: kernel(direction, x)[0]
