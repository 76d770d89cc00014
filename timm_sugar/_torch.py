"""Every private name of PyTorch's that this package uses, each looked up so that none of them has to be there.

What a release lacks costs speed, memory sharing or a transform (which then raises), and one line of the log says so; it
never costs the surrogate's gradient. Nothing else in the package may import a private name.

TorchScript and dynamo read functions of this file, so there is no `from __future__ import annotations`.
"""

import importlib
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import Parameter

_logger = logging.getLogger("timm_sugar")
missing: list[str] = []  # what this release of PyTorch lacks
_lost: set[str] = set()  # what was said to be lost by it


def _find(path: str, loss: str) -> Any:
    """The object of a dotted name below `torch`, or None, with a line about what is lost without it."""
    found: Any = torch
    try:
        for name in path.split("."):
            if not hasattr(found, name):
                importlib.import_module(f"{found.__name__}.{name}")
            found = getattr(found, name)
    except (AttributeError, ImportError):
        missing.append(path)
        if loss not in _lost:
            _lost.add(loss)
            _logger.warning("this PyTorch has no torch.%s: timm_sugar works without %s", path, loss)
        return None
    return found


_TRANSFORMS = "forward mode under torch.func, and torch.func of a recorded graph"

# torch 2.0 to 2.14. How a kernel of the dispatcher applies an autograd.Function.
SingleLevelFunction: Any = _find("autograd.function._SingleLevelFunction", _TRANSFORMS)
_allow_single_level = _find("_functorch.utils.enable_single_level_autograd_function", _TRANSFORMS)
# torch 2.0 to 2.14. How such a kernel calls its own operator one level of torch.func further down.
_in_transform = _find("_C._are_functorch_transforms_active", _TRANSFORMS)
_below_autograd = _find("_C._AutoDispatchBelowAutograd", _TRANSFORMS)
_set_forward_mode = _find("autograd.forward_ad._set_fwd_grad_enabled", _TRANSFORMS)
can_nest = None not in (*(SingleLevelFunction, _allow_single_level, _in_transform, _below_autograd, _set_forward_mode),)

# torch 2.0 to 2.14. Without it, forward mode is looked for by unpacking each tensor.
_has_forward_level = _find("autograd.forward_ad._current_level", "speed where gradients are off") is not None
# torch 2.2 to 2.14. Without it, eager mode takes the longer way of a tracer.
_is_in_dispatch_mode = _find("utils._python_dispatch.is_in_torch_dispatch_mode", "a short way in eager mode")
# torch 2.1 to 2.14. Without them, a graph that was compiled or traced holds the operator where it could hold ReLU.
_dispatch_mode = _find("_C._get_dispatch_mode", "ReLU itself in compiled graphs")
_mode_keys = _find("_C._TorchDispatchModeKey", "ReLU itself in compiled graphs")
_tracing_context = _find("_guards.TracingContext.try_get", "ReLU itself in compiled graphs")
# torch 1.12 to 2.14. Without it, gradients are computed by the formula, whatever the size of a tensor.
_dispatch_keys = _find("_C._dispatch_keys", "the fast gradient of large tensors")
_plain_keys: dict[str, int] = {}  # those of an ordinary tensor, by type of device
# torch 2.1 to 2.14. Without it, compiled autograd refuses what a traced graph recorded.
compiled_autograd_key: Any = _find("autograd.Function._compiled_autograd_key", "compiled autograd of recorded graphs")
# torch 2.7 to 2.14, public. Without it, torch.export(strict=True) records a checkpoint around the operator.
_is_exporting = _find("compiler.is_exporting", "a bare operator in strictly exported graphs")

# torch 1.0 to 2.14. The public function asks first whether TorchScript is compiling, which takes as long again.
_is_tracing = _find("_C._is_tracing", "a faster question in eager mode") or torch.jit.is_tracing
# torch 1.0 to 2.14.
_tracing_state = _find("_C._get_tracing_state", "torch.jit.trace's check of some traces")
_set_tracing_state = _find("_C._set_tracing_state", "torch.jit.trace's check of some traces")

# torch 2.1 to 2.14. Without it, diagnose counts a checkpointed layer twice.
_graph_task = _find("_C._current_graph_task_id", "one count of checkpointed layers in diagnose")

_SHARING = "memory sharing"
_default_hooks = _find("_C._autograd._top_saved_tensors_default_hooks", _SHARING)  # torch 2.1 to 2.14
_saved_data = _find("_C._autograd.SavedTensor.data", _SHARING)  # torch 2.8 to 2.14
_saved_hook = _find("_C._autograd.SavedTensor.unpack_hook", _SHARING)  # torch 2.8 to 2.14
StorageWeakRef: Any = _find("multiprocessing.reductions.StorageWeakRef", _SHARING)  # torch 1.10 to 2.14
TensorWeakRef: Any = _find("utils.weak.TensorWeakRef", _SHARING)  # torch 2.0 to 2.14
# torch 1.0 to 2.14: dictionaries that are filled in place.
_global_hooks = _find("nn.modules.module._global_forward_hooks", _SHARING)
_global_pre_hooks = _find("nn.modules.module._global_forward_pre_hooks", _SHARING)
can_share = None not in (
    *(_global_hooks, _global_pre_hooks),
    *(_default_hooks, _saved_data, _saved_hook, StorageWeakRef, TensorWeakRef, _is_in_dispatch_mode),
    _in_transform,
)


def in_transform() -> bool:
    """Whether a torch.func transform is at work, as far as PyTorch says so. Dynamo can trace it."""
    return _in_transform is not None and _in_transform()


def is_eager(x: Tensor) -> bool:
    """Whether operations on x run at once, on x alone: nothing traces, wraps, batches or watches them."""
    return (
        (type(x) is Tensor or type(x) is Parameter)
        and not _is_tracing()
        and _is_in_dispatch_mode is not None
        and not _is_in_dispatch_mode()
        and not (can_nest and _in_transform())
    )


def in_forward_mode(x: Tensor) -> bool:
    """Whether x may have a tangent: a level of forward-mode differentiation is open."""
    if _has_forward_level:
        return forward_ad._current_level >= 0
    return forward_ad.unpack_dual(x).tangent is not None


def has_tangent(*tensors: Tensor) -> bool:
    """Whether one of the tensors has a tangent at the open level of forward-mode differentiation."""
    return in_forward_mode(tensors[0]) and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def records_graph() -> bool:
    """Whether somebody traces a graph of operations to keep (make_fx, run_decompositions), not to run it at once."""
    if torch.onnx.is_in_onnx_export():
        return False
    if _tracing_context is not None and _tracing_context() is not None and not _decomposes():
        return False
    return _dispatch_mode is None or _mode_keys is None or _dispatch_mode(_mode_keys.PROXY) is not None


def _decomposes() -> bool:
    """Whether an exported program is being decomposed; before torch 2.7 the name of the running method tells."""
    return is_exporting() if _is_exporting else next(_locals("run_decompositions", "self"), None) is not None


def is_exporting() -> bool:
    """Whether dynamo traces for torch.export."""
    return _is_exporting is not None and _is_exporting()


def allow_single_level() -> Any:
    """A context in which a SingleLevelFunction can be applied under torch.func."""
    return _allow_single_level() if can_nest and in_transform() else nullcontext()


@contextmanager
def one_level_down(grad_mode: bool) -> Iterator[None]:
    """A context in which operations skip autograd at the current level of torch.func, and only there.

    `grad_mode` is the grad mode of the levels below; forward mode is on in them.
    """
    with _below_autograd(), torch.set_grad_enabled(grad_mode), _set_forward_mode(True):
        yield


def is_ordinary_memory(*tensors: Tensor) -> bool:
    """Whether tensors are ordinary ones of a type of device: what traces, batches or wraps them shows in their keys."""
    if _dispatch_keys is None:
        return False
    kind = tensors[0].device.type
    if kind not in _plain_keys:
        if kind == "meta" or in_dispatch_mode() or in_transform():  # in which a new tensor isn't an ordinary one
            return False
        _plain_keys[kind] = _dispatch_keys(torch.empty(0, device=kind)).raw_repr()
    return all(_dispatch_keys(x).raw_repr() == _plain_keys[kind] for x in tensors)


def compiles() -> bool:
    """Whether inductor may compile here: there is one that does it outside of torch.compile, and it is switched on."""
    from torch import _inductor  # takes a second

    # torch 2.8 to 2.14; TORCH_COMPILE_DISABLE=1
    return hasattr(_inductor, "standalone_compile") and not torch._dynamo.config.disable


def fake_rows(dtype: torch.dtype, device: torch.device, width: int, scalar: torch.dtype, scalars: int) -> list[Tensor]:
    """Examples for `trace` that take no memory: two matrices (rows, width) on a device, and 0-dim tensors on the CPU.

    `rows` is any number: nothing that is compiled for them is bound to one.
    """
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env, source, likely = ShapeEnv(), ConstantSource("rows"), 2**16
    rows: Any = env.create_symintnode(env.create_symbol(likely, source, DimDynamic.DYNAMIC), hint=likely, source=source)
    with FakeTensorMode(shape_env=env):
        large = [torch.empty((rows, width), dtype=dtype, device=device) for _ in range(2)]
        return [*large, *(torch.empty((), dtype=scalar, device="cpu") for _ in range(scalars))]


def trace(function: Any, examples: list[Tensor]) -> Any:
    """The graph of a function of tensors of any size, as inductor takes it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, tracing_mode="symbolic")(*examples)


def compile_graph(graph: Any, examples: list[Any]) -> Any:
    """A graph as compiled code, which is kept on disk under a hash of the graph. Raises what a compiler may raise."""
    from torch._inductor import standalone_compile

    options = {"config_patches": {"cpp.dynamic_threads": True}}  # torch.set_num_threads holds for it, too
    return standalone_compile(graph, examples, options=options)


def in_dispatch_mode() -> bool:
    """Whether a TorchDispatchMode sees every operation."""
    return _is_in_dispatch_mode is None or _is_in_dispatch_mode()


def has_saved_tensors_hooks() -> bool:
    """Whether hooks on all saved tensors are in force, as in checkpointing and offloading."""
    return _default_hooks(False) is not None


def repeats_trace_with_gradients() -> bool:
    """Whether torch.jit.trace is checking, as always without gradients, a graph that it recorded with them.

    Reads the name of a function and of a variable of torch.jit._trace, as they are in torch 1.0 to 2.14; where they are
    others, the check of a trace fails, with an error.
    """
    paused = nullcontext() if None in (_tracing_state, _set_tracing_state) else _paused_trace()
    with paused:  # or the trace records the constants of the other graph
        return any("timm_sugar::relu" in str(local.inlined_graph) for local in _locals("_check_trace", "traced_func"))


@contextmanager
def _paused_trace() -> Iterator[None]:
    state = _tracing_state()
    _set_tracing_state(None)
    try:
        yield
    finally:
        _set_tracing_state(state)


def _locals(function: str, name: str) -> Iterator[Any]:
    """A local variable of each running function of a name."""
    for frame, _ in traceback.walk_stack(None):
        if frame.f_code.co_name == function and name in frame.f_locals:
            yield frame.f_locals[name]


def in_backward_pass() -> bool:
    """Whether autograd is going backward in this thread, so that a forward pass is one of a checkpoint."""
    return _graph_task is not None and _graph_task() != -1


def forward_hooks(module: torch.nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """The forward hooks and the forward pre-hooks of a module, as they are kept in torch 1.0 to 2.14."""
    return module._forward_hooks, module._forward_pre_hooks


def has_forward_hooks(module: torch.nn.Module) -> bool:
    """Whether anybody receives what goes into a module or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_global_hooks() -> bool:
    """Whether anybody receives what goes into every module, or comes out of it."""
    return bool(_global_hooks or _global_pre_hooks)


def is_tensor_or_view(tensor: Tensor, base: Tensor) -> bool:
    """Whether a tensor is another one or, as autograd knows, a view of it, so that both count changes together."""
    return tensor is base or tensor._base is base


def saved_names(kind: type) -> list[str]:
    """Names under which a type of autograd node keeps what it saved."""
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def find_scripted_model() -> torch.nn.Module | None:
    """The model that torch.jit.script has been called with, if it is preparing one.

    Reads the name of a function and of a variable of torch.jit._script, as they are in torch 1.8 to 2.14; where they
    are others, torch.jit.script raises for a model that shares memory.
    """
    model = next(_locals("call_prepare_scriptable_func", "obj"), None)
    return model if isinstance(model, torch.nn.Module) else None
