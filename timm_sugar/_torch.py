"""Every private name of PyTorch's that this package uses, each looked up so that none of them has to be there.

What a release lacks costs speed, memory sharing or a transform (which then raises), and one line of the log says so; it
never costs the surrogate's gradient. Nothing else in the package may import a private name. Ranges of releases say what
was found in 2.6.0, 2.8.0, 2.10.0 and 2.14.1.

TorchScript and dynamo read functions of this file, so there is no `from __future__ import annotations`.
"""

import functools
import importlib
import inspect
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import Parameter

_logger = logging.getLogger("timm_sugar")
missing: list[str] = []  # what this release of PyTorch lacks
_lost: set[str] = set()  # what was said to be lost by it


def _find(*paths: str, loss: str) -> Any:
    """The object of the first of some dotted names below `torch` that is there, or None, with a line about the loss."""
    path = _which(*paths, loss=loss)
    return None if path is None else _resolve(path)


def _which(*paths: str, loss: str) -> str | None:
    """The first of some dotted names below `torch` that is there: a name, and what other releases call it."""
    for path in paths:
        with suppress(AttributeError, ImportError):
            _resolve(path)
            return path
    missing.append(paths[0])
    if loss not in _lost:
        _lost.add(loss)
        _logger.warning("this PyTorch has no torch.%s: timm_sugar works without %s", paths[0], loss)
    return None


def _resolve(path: str) -> Any:
    found: Any = torch
    for name in path.split("."):
        if not hasattr(found, name):
            importlib.import_module(f"{found.__name__}.{name}")
        found = getattr(found, name)
    return found


_TRANSFORMS = "forward mode under torch.func, and torch.func of a recorded graph"

# torch 2.6 to 2.14. How a kernel of the dispatcher applies an autograd.Function.
SingleLevelFunction: Any = _find("autograd.function._SingleLevelFunction", loss=_TRANSFORMS)
_allow_single_level = _find("_functorch.utils.enable_single_level_autograd_function", loss=_TRANSFORMS)
# torch 2.6 to 2.14. How such a kernel calls its own operator one level of torch.func further down.
_in_transform = _find("_C._are_functorch_transforms_active", loss=_TRANSFORMS)
_below_autograd = _find("_C._AutoDispatchBelowAutograd", loss=_TRANSFORMS)
_set_forward_mode = _find("autograd.forward_ad._set_fwd_grad_enabled", loss=_TRANSFORMS)
# torch 2.6 to 2.14. The public function asks for a level in Python, which a graph that was compiled doesn't open.
_unpack_dual = _find("_VF._unpack_dual", loss=_TRANSFORMS)
can_nest = None not in (
    *(SingleLevelFunction, _allow_single_level, _in_transform, _below_autograd, _set_forward_mode, _unpack_dual),
)

# torch 2.6 to 2.14. Without it, forward mode is looked for by unpacking each tensor.
_has_forward_level = _find("autograd.forward_ad._current_level", loss="speed where gradients are off") is not None
# torch 2.6 to 2.14. Without it, eager mode takes the longer way of a tracer.
_is_in_dispatch_mode = _find("utils._python_dispatch.is_in_torch_dispatch_mode", loss="a short way in eager mode")
# torch 2.6 to 2.14. Without them, a graph that was compiled or traced holds the operator where it could hold ReLU.
_dispatch_mode = _find("_C._get_dispatch_mode", loss="ReLU itself in compiled graphs")
_mode_keys = _find("_C._TorchDispatchModeKey", loss="ReLU itself in compiled graphs")
_tracing_context = _find("_guards.TracingContext.try_get", loss="ReLU itself in compiled graphs")
# torch 2.6 to 2.14. Without it, gradients are computed by the formula, whatever the size of a tensor.
_dispatch_keys = _find("_C._dispatch_keys", loss="the fast gradient of large tensors")
_plain_keys: dict[str, int] = {}  # those of an ordinary tensor, by type of device
# torch 2.6 to 2.14. Without it, compiled autograd refuses what a traced graph recorded.
compiled_autograd_key: Any = _find(
    "autograd.Function._compiled_autograd_key", loss="compiled autograd of recorded graphs"
)
# The first in torch 2.8 to 2.14, the second in 2.6, where nothing but torch.export sets it. (In 2.8 and 2.10 dynamo
# answers True to the public is_exporting(), whatever it compiles for.)
# Without them, torch.export(strict=True) records a checkpoint around the operator; so it does in 2.6 to 2.10.
_flag = _which(
    "compiler._is_exporting_flag", "compiler._is_compiling_flag", loss="a bare operator in strictly exported graphs"
)
_export_flag = None if _flag is None else _flag.rpartition(".")[2]

# torch 2.6 to 2.14. It imports the compiler when it is first called, the public function at once.
_disable = _find("_disable_dynamo", loss="a fast import") or torch.compiler.disable

# torch 2.6 to 2.14. The public function asks first whether TorchScript is compiling, which takes as long again.
_is_tracing = _find("_C._is_tracing", loss="a faster question in eager mode") or torch.jit.is_tracing
# torch 2.6 to 2.14.
_tracing_state = _find("_C._get_tracing_state", loss="torch.jit.trace's check of some traces")
_set_tracing_state = _find("_C._set_tracing_state", loss="torch.jit.trace's check of some traces")

# torch 2.6 to 2.14. Without it, diagnose counts a checkpointed layer twice.
_graph_task = _find("_C._current_graph_task_id", loss="one count of checkpointed layers in diagnose")

_SHARING = "memory sharing"
_default_hooks = _find("_C._autograd._top_saved_tensors_default_hooks", loss=_SHARING)  # torch 2.8 to 2.14, not 2.6
_saved_data = _find("_C._autograd.SavedTensor.data", loss=_SHARING)  # torch 2.10 to 2.14, not 2.8
_saved_hook = _find("_C._autograd.SavedTensor.unpack_hook", loss=_SHARING)  # torch 2.10 to 2.14, not 2.8
StorageWeakRef: Any = _find("multiprocessing.reductions.StorageWeakRef", loss=_SHARING)  # torch 2.6 to 2.14
TensorWeakRef: Any = _find("utils.weak.TensorWeakRef", loss=_SHARING)  # torch 2.6 to 2.14
# torch 2.6 to 2.14: dictionaries that are filled in place.
_global_hooks = _find("nn.modules.module._global_forward_hooks", loss=_SHARING)
_global_pre_hooks = _find("nn.modules.module._global_forward_pre_hooks", loss=_SHARING)
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


def may_be_in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open, as far as PyTorch says so.

    Inside an autograd.Function, where no tangent is seen.
    """
    return not _has_forward_level or forward_ad._current_level >= 0


def has_tangent(*tensors: Tensor) -> bool:
    """Whether one of the tensors has a tangent at the open level of forward-mode differentiation."""
    return in_forward_mode(tensors[0]) and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def records_graph() -> bool:
    """Whether somebody traces a graph of operations to keep (make_fx, run_decompositions), not to run it at once."""
    if torch.onnx.is_in_onnx_export():
        return False
    if _tracing_context is not None and _tracing_context() is not None and not _decomposes():
        return not _compiles_again_in_forward_mode()
    return _dispatch_mode is None or _mode_keys is None or _dispatch_mode(_mode_keys.PROXY) is not None


def _compiles_again_in_forward_mode() -> bool:
    """Let dynamo compile again once forward mode begins or ends. False if it can't be told: the operator stays then."""
    found = _dynamo_guard()
    if found is None:
        return False
    install, guard = found
    install(guard)
    return True


@functools.cache
def _dynamo_guard() -> tuple[Any, Any] | None:
    # torch 2.6 to 2.14.
    install = _find("_dynamo.guards.install_guard", loss="ReLU itself in compiled graphs")
    level = _find(
        "_dynamo.variables.ctx_manager.DualLevelContextManager._guards_singleton", loss="ReLU itself in compiled graphs"
    )
    return None if None in (install, level) else (install, level)


def is_in_compiler() -> bool:
    """Whether a compiler traces a graph, in which forward mode may begin unseen, as far as PyTorch says so."""
    return _tracing_context is None or _tracing_context() is not None


def is_surely_in_compiler() -> bool:
    """Whether a compiler traces a graph, and PyTorch says so."""
    return _tracing_context is not None and _tracing_context() is not None


def _decomposes() -> bool:
    """Whether an exported program is being decomposed; without the flag the name of the running method tells."""
    return is_exporting() if _export_flag else next(_locals("run_decompositions", "self"), None) is not None


def leave_to_eager(kernel: Any) -> Any:
    """A kernel that dynamo doesn't compile by itself where it left the call of the operator to eager mode.

    It would, and forget tangents that autograd has hidden from it there.
    """
    disabled = _disable(kernel)

    @functools.wraps(kernel)
    def call(*arguments: Any) -> Any:
        return (disabled if "torch._dynamo" in sys.modules else kernel)(*arguments)

    return call


def loses_tangents() -> bool:
    """Whether a compiler traces what may run on dual numbers later, with ReLU's tangent instead of the surrogate's.

    It does where forward mode began before a compiled function was called and dynamo takes dual numbers for ordinary
    ones. (Forward mode that begins inside of the function is traced, and a graph of it doesn't open a level in Python.)
    """
    if not _has_forward_level or forward_ad._current_level < 0 or None in (_dispatch_mode, _mode_keys):
        return False
    if not is_in_compiler():  # torch.func.linearize traces tangents, too
        return False
    return _dispatch_mode(_mode_keys.PROXY) is not None and (in_transform() or not _refuses_duals())


@functools.cache
def _refuses_duals() -> bool:
    """Whether dynamo leaves functions of dual numbers to eager mode: in torch 2.14, not in 2.6 to 2.10.

    It doesn't see a dual number that is first used within torch.func. Nothing but its source tells; without that, a
    compiled function raises in forward mode.
    """
    builder = _find("_dynamo.variables.builder", loss="forward mode through compiled functions")
    with suppress(OSError, TypeError):
        return builder is not None and "unpack_dual" in inspect.getsource(builder)
    return False


def is_exporting() -> bool:
    """Whether dynamo traces for torch.export."""
    return _export_flag is not None and getattr(torch.compiler, _export_flag)


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


def forward_mode() -> Any:
    """A context in which forward mode is on, at all levels of torch.func."""
    return _set_forward_mode(True)


def primal(x: Tensor) -> Tensor:
    """x without its tangent at the current level of torch.func."""
    found: Tensor = _unpack_dual(x, level=0)[0]  # PyTorch has no other level
    return found


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


_COMPILED = "the fast gradient of large tensors"


class _Compiler(NamedTuple):
    """What compiles outside of torch.compile. Found when it is first used: importing it takes a second."""

    compile: Any
    settings: Any
    fake_mode: Any
    constant: Any
    shapes: Any
    dimension: Any
    make_fx: Any


@functools.cache
def _compiler() -> _Compiler | None:
    found = _Compiler(
        _find("_inductor.standalone_compile", loss=_COMPILED),  # torch 2.8 to 2.14, not 2.6
        # torch 2.6 to 2.14.
        _find("_dynamo.config", loss=_COMPILED),
        _find("_subclasses.fake_tensor.FakeTensorMode", loss=_COMPILED),
        _find("_dynamo.source.ConstantSource", loss=_COMPILED),
        _find("fx.experimental.symbolic_shapes.ShapeEnv", loss=_COMPILED),
        _find("fx.experimental.symbolic_shapes.DimDynamic", loss=_COMPILED),
        _find("fx.experimental.proxy_tensor.make_fx", loss=_COMPILED),
    )
    return None if None in found else found


def compiles() -> bool:
    """Whether inductor may compile here: there is one that does it outside of torch.compile, and it is switched on."""
    found = _compiler()
    return found is not None and not getattr(found.settings, "disable", False)  # TORCH_COMPILE_DISABLE=1


def _needed_compiler() -> _Compiler:
    found = _compiler()
    if found is None:
        raise RuntimeError("this PyTorch compiles nothing outside of torch.compile")
    return found


def fake_rows(dtype: torch.dtype, device: torch.device, width: int, scalar: torch.dtype, scalars: int) -> list[Tensor]:
    """Examples for `trace` that take no memory: two matrices (rows, width) on a device, and 0-dim tensors on the CPU.

    `rows` is any number: nothing that is compiled for them is bound to one.
    """
    found = _needed_compiler()
    env, source, likely = found.shapes(), found.constant("rows"), 2**16
    symbol = env.create_symbol(likely, source, found.dimension.DYNAMIC)
    rows: Any = env.create_symintnode(symbol, hint=likely, source=source)
    with found.fake_mode(shape_env=env):
        large = [torch.empty((rows, width), dtype=dtype, device=device) for _ in range(2)]
        return [*large, *(torch.empty((), dtype=scalar, device="cpu") for _ in range(scalars))]


def trace(function: Any, examples: list[Tensor]) -> Any:
    """The graph of a function of tensors of any size, as inductor takes it."""
    graph = _needed_compiler().make_fx(function, tracing_mode="symbolic")(*examples)
    for node in graph.graph.nodes:  # torch 2.8 to 2.10 look for the examples under another name
        if "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]
    return graph


def asks_for_numbers(graph: torch.fx.GraphModule) -> bool:
    """Whether a graph takes a number out of a tensor, as torch.full_like does: inductor makes a constant of it."""
    return any(node.target is torch.ops.aten._local_scalar_dense.default for node in graph.graph.nodes)


def compile_graph(graph: Any, examples: list[Any]) -> Any:
    """A graph as compiled code, which is kept on disk under a hash of the graph. Raises what a compiler may raise."""
    options = {"config_patches": {"cpp.dynamic_threads": True}}  # torch.set_num_threads holds for it, too
    return _needed_compiler().compile(graph, examples, options=options)


def in_dispatch_mode() -> bool:
    """Whether a TorchDispatchMode sees every operation."""
    return _is_in_dispatch_mode is None or _is_in_dispatch_mode()


def has_saved_tensors_hooks() -> bool:
    """Whether hooks on all saved tensors are in force, as in checkpointing and offloading."""
    return _default_hooks(False) is not None


def repeats_trace_with_gradients() -> bool:
    """Whether torch.jit.trace is checking, as always without gradients, a graph that it recorded with them.

    Reads the name of a function and of a variable of torch.jit._trace, as they are in torch 2.6 to 2.14; where they are
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


# torch 2.6 to 2.14. Without them, sugarize(example=...) raises.
_EXAMPLES = "sugarize(example=...)"
TorchDispatchMode: Any = _find("utils._python_dispatch.TorchDispatchMode", loss=_EXAMPLES)
tree_leaves: Any = _find("utils._pytree.tree_leaves", loss=_EXAMPLES)
tree_map: Any = _find("utils._pytree.tree_map", loss=_EXAMPLES)


def check_examples() -> None:
    """Raise RuntimeError if nothing can watch what a model does with an example."""
    if None in (TorchDispatchMode, tree_leaves, tree_map):
        raise RuntimeError("this PyTorch lacks what sugarize(example=...) needs: leave the example out")


def storage_id(x: Tensor) -> int:
    """What identifies the memory of a strided tensor while that is there."""
    return x.untyped_storage()._cdata


def in_backward_pass() -> bool:
    """Whether autograd is going backward in this thread, so that a forward pass is one of a checkpoint."""
    return _graph_task is not None and _graph_task() != -1


def forward_hooks(module: torch.nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """The forward hooks and the forward pre-hooks of a module, as they are kept in torch 2.6 to 2.14."""
    return module._forward_hooks, module._forward_pre_hooks


def has_forward_hooks(module: torch.nn.Module) -> bool:
    """Whether anybody receives what goes into a module or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_global_hooks() -> bool:
    """Whether anybody receives what goes into every module, or comes out of it."""
    return bool(_global_hooks or _global_pre_hooks)


def count_hooks() -> int | None:
    """How many hooks were ever registered, of any kind; None if PyTorch doesn't say."""
    return getattr(torch.utils.hooks.RemovableHandle, "next_id", None)


def is_tensor_or_view(tensor: Tensor, base: Tensor) -> bool:
    """Whether a tensor is another one or, as autograd knows, a view of it, so that both count changes together."""
    return tensor is base or tensor._base is base


def saved_names(kind: type) -> list[str]:
    """Names under which a type of autograd node keeps what it saved."""
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def is_compiled_module(module: torch.nn.Module) -> bool:
    """Whether `torch.compile` made a module of another one."""
    return (type(module).__module__, type(module).__name__) == ("torch._dynamo.eval_frame", "OptimizedModule")


def rebind_compiled(module: torch.nn.Module) -> None:
    """Let a module of `torch.compile` call what it wraps now; any other is left."""
    if is_compiled_module(module):
        module.__setstate__(module.__getstate__())  # torch 2.6 to 2.14: binds its forward


def uncompiled(function: Any) -> Any:
    """The function that `torch.compile` made another of; any other as it is."""
    # torch 2.6 to 2.14
    return inspect.unwrap(function) if "_torchdynamo_orig_callable" in getattr(function, "__dict__", {}) else function


def find_scripted_model() -> torch.nn.Module | None:
    """The model that torch.jit.script has been called with, if it is preparing one.

    Reads the name of a function and of a variable of torch.jit._script, as they are in torch 2.6 to 2.14; where they
    are others, torch.jit.script raises for a model that shares memory.
    """
    model = next(_locals("call_prepare_scriptable_func", "obj"), None)
    return model if isinstance(model, torch.nn.Module) else None
