"""A surrogate's gradient as one loop over memory, compiled by inductor for eager mode.

Inductor keeps what it compiled on disk, under a hash of the traced formula itself, so the next process is ready within
a second or two and never meets the gradient of an older formula.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from timm_sugar.surrogate import surrogate_derivative

_logger = logging.getLogger(__name__)
_state = {"announced": False, "usable": True}

Gradient = Callable[[Tensor, Tensor], Tensor]

_gradients: dict[tuple[str, tuple[float, ...], torch.dtype], Gradient | None] = {}


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
