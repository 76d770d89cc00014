"""A surrogate's gradient as one loop over memory, which inductor compiles for any of its devices, for eager mode.

The formula alone is up to 14 kernels, with float32 temporaries for half precision. One compiled kernel serves every
value of the parameters, which it gets at run time, and every size. Inductor keeps it on disk, under a hash of the
traced formula itself, so the next process is ready within a second or two and never meets an older formula. Where there
is no compiler, or it computes something else than the formula, the formula runs.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_sugar import _torch
from timm_sugar.surrogate import (
    Formula,
    Surrogate,
    find_surrogate,
    is_built_in,
    known_surrogate,
    surrogate_derivative,
)

_CHUNK = 1 << 17  # elements, from which on a CPU's gradient is compiled; so many intermediate results stay in its cache
_WORTHWHILE = 1 << 14  # elements, from which on a compiled gradient is faster on a CPU if it is there already
_DEVICES = ("cpu", "cuda", "xpu", "mps")  # ROCm calls itself cuda
_INDEXABLE = 2**31  # elements; indices in compiled code have 32 bits
_MOST_BAKED = 8  # kernels that hold the values of their parameters, for each formula
_HALF = (torch.float16, torch.bfloat16)
_logger = logging.getLogger(__name__)

Gradient = Callable[[Tensor, Tensor], Tensor]


class Kind(NamedTuple):
    """What a kernel is made for. `formula` is the fingerprint, `width` the number of elements in a row."""

    surrogate: str
    formula: str
    dtype: torch.dtype
    device: torch.device  # with its index, which compiled code holds
    width: int

    @classmethod
    def of(cls, x: Tensor, surrogate: str | Surrogate) -> Kind:
        """The kind of kernel for a dense tensor: on a GPU, loads are vectorised in rows of 16 elements alone."""
        width = 1 if x.is_cpu or x.numel() % 16 else 16
        found = find_surrogate(surrogate)
        return cls(found.name, found.formula, x.dtype, x.device, width)

    @property
    def known(self) -> Surrogate:
        """The surrogate with this formula; what its parameters are is not said."""
        return known_surrogate(self.surrogate, self.formula)


Kernel = Callable[..., tuple[Tensor]]
# With None, the parameters are arguments; with values, these are in the code. None: it can't be made.
_kernels: dict[tuple[Kind, tuple[float, ...] | None], Kernel | None] = {}
_off: set[Kind] = set()  # the formula does without; a line said why
_lock = threading.RLock()  # the compiler is not made for several threads


def times_derivative(direction: Tensor, x: Tensor, surrogate: str | Surrogate, values: list[Any]) -> Tensor:
    """direction * derivative of the surrogate at x, rounded once to direction's dtype, by the fastest way there is.

    x and direction: one shape; values: numbers or 0-dim tensors. Differentiable once more; any layout, device,
    wrapper or transform.
    """
    if x.numel() > _used_from(x) and _is_plain(x, direction):
        kind, values = Kind.of(x, surrogate), [float(value) for value in values]
        if x.numel() > _compiled_from(x) or is_compiled(kind, values):
            return _fused(direction, x, kind, values)
    return (direction * surrogate_derivative(x, surrogate, values)).to(direction.dtype)


def prepare(x: Tensor, surrogate: str | Surrogate, values: list[float]) -> None:
    """Compile in the forward pass what `times_derivative` will want for x, so that all backward passes are alike."""
    if x.numel() <= _WORTHWHILE:  # the usual reason, told fast
        return
    if x.numel() > _compiled_from(x) and x.device.type in _DEVICES and not _torch.in_dispatch_mode():
        compiled_gradient(Kind.of(x, surrogate), values)


def prepare_all(
    settings: Iterable[tuple[str | Surrogate, list[float]]], dtype: torch.dtype, device: torch.device
) -> None:
    """Compile what `times_derivative` will want for surrogates with their values, for tensors of any size."""
    for surrogate, values in settings:
        for size in (16, 1):  # each has its kind of kernel
            compiled_gradient(Kind.of(torch.empty(size, dtype=dtype, device=device), surrogate), values)


def _compiled_from(x: Tensor) -> int:
    return _CHUNK if x.is_cpu else _WORTHWHILE


def _used_from(x: Tensor) -> int:
    return _WORTHWHILE if x.is_cpu else 0  # a GPU waits for each launch, whatever the size


def _is_plain(x: Tensor, direction: Tensor) -> bool:
    """Whether two tensors are ordinary ones of one device, x without gaps, and nothing differentiates them."""
    return (
        _torch.is_ordinary_memory(x, direction)
        and (x.dtype, x.shape, x.device) == (direction.dtype, direction.shape, direction.device)
        and x.device.type in _DEVICES
        and x.numel() < _INDEXABLE
        and torch.ops.aten.is_non_overlapping_and_dense.default(x)
        and not torch.is_grad_enabled()
        and not _torch.has_tangent(x, direction)  # dual numbers are ordinary tensors in all other respects
    )


def _fused(direction: Tensor, x: Tensor, kind: Kind, values: list[float]) -> Tensor:
    """direction * derivative in one pass over memory, by a compiled kernel if there is one."""
    kernel = None if _torch.in_dispatch_mode() else compiled_gradient(kind, values)
    if kernel is None and not x.is_cpu:
        return (direction * surrogate_derivative(x, kind.known, values)).to(direction.dtype)
    if direction.stride() != x.stride():
        direction = torch.empty_like(x).copy_(direction)
    if kernel is None:
        flat_x, flat_direction = (tensor.as_strided((x.numel(),), (1,)) for tensor in (x, direction))
        return _in_chunks(flat_direction, flat_x, kind.known, values).as_strided(x.shape, x.stride())
    rows = (x.numel() // kind.width, kind.width)
    matrices = (tensor.as_strided(rows, (kind.width, 1)) for tensor in (direction, x))
    return kernel(*matrices).as_strided(x.shape, x.stride())


def _in_chunks(direction: Tensor, x: Tensor, surrogate: Surrogate, values: list[float]) -> Tensor:
    """direction * derivative, a piece of memory at a time: on a CPU the formula is otherwise as slow as the memory."""
    result = torch.empty_like(x)
    pieces = (tensor.split(_CHUNK * torch.get_num_threads()) for tensor in (result, x, direction))
    for into, piece, factor in zip(*pieces, strict=True):
        into.copy_(factor * surrogate_derivative(piece, surrogate, values))
    return result


def is_compiled(kind: Kind, values: list[float]) -> bool:
    """Whether `compiled_gradient` was asked for this one before, and made it."""
    return _kernels.get((kind, None)) is not None or _kernels.get((kind, tuple(values))) is not None


def compiled_gradient(kind: Kind, values: list[float]) -> Gradient | None:
    """A function of (direction, x), two matrices of dense rows, that returns direction * derivative, rounded once.

    None where inductor can't compile it, torch.compile is switched off, or a CUDA graph is being captured. The first
    call in a process takes a second or two, and up to some 15 if the cache on disk is empty: a line says so.
    """
    for baked in (None, tuple(values)) if values else (None,):
        if kind in _off or not ((kind, baked) in _kernels or _make(kind, values, baked)):
            return None
        kernel = _kernels[kind, baked]
        if kernel and (baked is not None or _is_right_for(kernel, kind, tuple(values))):
            return functools.partial(_call, kernel, _scalars(tuple(values), kind.dtype) if baked is None else ())
    return None


def _call(kernel: Kernel, scalars: tuple[Tensor, ...], direction: Tensor, x: Tensor) -> Tensor:
    return kernel(direction, x, *scalars)[0]


def _scalar_type(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32  # MPS and some GPUs have no float64


@functools.lru_cache(1024)  # a new tensor takes as long as a small gradient
def _scalars(values: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value, dtype=_scalar_type(dtype), device="cpu") for value in values)


@functools.cache
def _say_once(line: str, *arguments: object) -> None:
    _logger.warning(line, *arguments)


def _make(kind: Kind, values: list[float], baked: tuple[float, ...] | None) -> bool:
    """Try to add a kernel to `_kernels`; returns False if it is not there and may be later."""
    if kind.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False  # what compiles also measures and compares
    with _lock:
        if (kind, baked) in _kernels:
            return True
        if baked is not None and sum(of == kind and held is not None for of, held in _kernels) >= _MOST_BAKED:
            return False
        try:
            with torch.no_grad(), torch.autocast(kind.device.type, enabled=False), torch.device("cpu"):
                _kernels[kind, baked] = _compile_and_check(kind, values, baked)
        except Exception as error:  # whatever is wrong with a compiler, its cache or its headers: it only costs speed
            _kernels[kind, baked] = None
            _off.add(kind)
            reason = next(iter(str(error).splitlines()), "")
            _say_once("the gradient of SUGAR is not compiled, so slower: %s: %.150s", type(error).__name__, reason)
    return True


def _compile_and_check(kind: Kind, values: list[float], baked: tuple[float, ...] | None) -> Kernel | None:
    """A kernel that computes the formula; None where it can't have its parameters as arguments."""
    if not _torch.compiles():
        _off.add(kind)
        return None
    _say_once("compiling the gradient of SUGAR: some seconds, once (TORCH_COMPILE_DISABLE=1 does without)")
    arguments = kind.dtype, kind.device, kind.width, len(values), baked
    try:
        graph, examples = trace_gradient(kind.known.derivative, *arguments)
    except Exception:
        if baked is None and values:  # the formula asks for a number, as math.sqrt(alpha) does
            return None
        raise
    try:
        kernel: Kernel = _torch.compile_graph(graph, examples)
    except KeyError:
        if baked is None and values:  # torch 2.8 loses a number that isn't float64
            return None
        raise
    factors = (1.0,) if baked is not None else (1.0, 0.6, 2.5)
    if all(_agrees(kernel, kind, [factor * value for value in values], baked is not None) for factor in factors):
        return kernel
    if baked is None and values:
        return None
    raise RuntimeError(f"what was compiled is not the derivative of {kind.surrogate}")


def trace_gradient(
    formula: Formula,
    dtype: torch.dtype,
    device: torch.device,
    width: int = 1,
    parameters: int = 0,
    baked: tuple[float, ...] | None = None,
) -> tuple[Any, list[Tensor]]:
    """Trace (direction, x, *parameters) -> (direction * formula(x, *parameters),).

    direction, x: (any number of rows, width); parameters: 0-dim CPU tensors, or none if `baked` has their values.

    Returns:
        The graph as inductor takes it, and examples of its arguments.
    """

    # A tuple, as of every graph of inductor's. No annotations: torch can't make a key for its cache of a tuple's.
    def gradient(direction, x, *scalars):  # type: ignore[no-untyped-def]
        numbers = [scalar.item() for scalar in scalars] if baked is None else baked
        return ((direction * formula(x.float() if dtype in _HALF else x, *numbers)).to(dtype),)

    count = parameters if baked is None else 0
    examples = _torch.fake_rows(dtype, device, width, _scalar_type(dtype), count)
    return _torch.trace(gradient, examples), examples


def compile_gradient(formula: Formula, dtype: torch.dtype, device: torch.device) -> Gradient:
    """Compile direction * formula(x), for two tensors (any number of rows, 1). Raises what a compiler may raise."""
    return functools.partial(_call, _torch.compile_graph(*trace_gradient(formula, dtype, device)), ())


def _agrees(kernel: Kernel, kind: Kind, values: list[float], are_baked: bool) -> bool:
    """Whether a kernel computes the formula, also at infinities and NaN: a compiler's mistake may cost speed only."""
    points = [*torch.linspace(-12, 12, 64 * 16 - 5).tolist(), *map(float, ("inf", "-inf", "nan", "6e4", "-6e4"))]
    x = torch.tensor(points, dtype=kind.dtype, device=kind.device).view(-1, kind.width)
    half = torch.full_like(x, 0.5)
    expected = surrogate_derivative(x, kind.known, values)
    scalars = () if are_baked else _scalars(tuple(values), kind.dtype)
    found = 2 * _call(kernel, scalars, half, x).to(expected.dtype)
    rounding = {"rtol": 8 * torch.finfo(kind.dtype).eps, "atol": 64 * torch.finfo(expected.dtype).eps}
    return torch.allclose(found, expected, **rounding, equal_nan=True)


_right: dict[tuple[Kind, tuple[float, ...]], bool] = {}


def _is_right_for(kernel: Kernel, kind: Kind, values: tuple[float, ...]) -> bool:
    """Whether a kernel that has its parameters as arguments computes the formula for these values, too.

    A formula of one's own may ask about its parameter (`isinstance(alpha, float) and alpha > 4`), and is told something
    else when it is traced.
    """
    if not values or is_built_in(kind.surrogate):
        return True
    if (kind, values) not in _right:
        if kind.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        if len(_right) > 1024:  # as many as a schedule takes
            _right.clear()
        with torch.no_grad(), torch.autocast(kind.device.type, enabled=False), torch.device("cpu"):
            _right[kind, values] = _agrees(kernel, kind, list(values), are_baked=False)
    return _right[kind, values]


def takes_tensors(surrogate: Surrogate) -> bool:
    """Whether compiled code may have the parameters as tensors: not if the formula asks for numbers, or about them."""
    if is_built_in(surrogate.name):
        return True
    graph = _traced(surrogate.name, surrogate.formula, len(surrogate.values))
    x = torch.linspace(-12, 12, 1024, dtype=torch.float64, device="cpu")
    tensors = [torch.tensor(value, dtype=torch.float64, device="cpu") for value in surrogate.values]
    expected = surrogate.derivative(x, *surrogate.values)
    return graph is not None and torch.allclose(graph(x, *tensors), expected, rtol=1e-9, atol=1e-12)


@functools.lru_cache(64)
def _traced(name: str, formula: str, count: int) -> Any:
    """What a compiler records of a derivative whose parameters are tensors; None if it needs numbers."""
    tensors = [torch.ones((), dtype=torch.float64, device="cpu") for _ in range(count)]
    x = torch.zeros(2, dtype=torch.float64, device="cpu")
    try:
        graph = _torch.trace(known_surrogate(name, formula).derivative, [x, *tensors])
    except Exception:  # they have no value: math.sqrt(alpha), alpha > 1
        return None
    return None if _torch.asks_for_numbers(graph) else graph
