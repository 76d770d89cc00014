"""One buffer for a pre-activation and for what the layers behind the activation save of its value (eager mode).

ReLU and the layer behind it save the same tensor, ReLU's value y. SUGAR saves the pre-activation x, so autograd would
keep both. Here the layer gives up its y for a reference to x, and takes relu(x) for its backward pass: the same bits.

What writes to y's memory unseen by autograd, before the layer reads it (`y.data`, NumPy, a collective on y.detach()),
can't be told from outside. So values are shared only where that is asked for, and by the activations of a model within
one call of it (`Scope`).
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_sugar import _torch

# Whether each shared value is compared with what it replaces, and with what the backward pass gets.
check_sharing = os.environ.get("TIMM_SUGAR_CHECK_SHARING", "") not in ("", "0")

_LEAST = 1 << 18  # bytes; looking for the value of a smaller activation costs more than its memory is worth
_SEEN = "timm_sugar"  # in a node's metadata
# The outputs of these nodes are their input's memory, looked at otherwise.
_VIEWS = {f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "T", "Squeeze")}


@dataclass(eq=False)
class _Call:
    """One call of a model, from its beginning to its end."""

    scope: Scope | None = None
    model: weakref.ref[nn.Module] | None = None
    frame: FrameType | None = None  # of Python, in which the model runs
    hooks: int | None = None  # how many PyTorch had ever registered when `is_private` was found
    is_private: bool = False

    def is_running(self) -> bool:
        """Whether it was not broken off by Ctrl-C, of which PyTorch tells no hook."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None

    def end(self) -> None:
        """Forget the call, and the frame, which holds what the model was given and returned."""
        _calls.running.remove(self)
        self.frame = None

    def has_no_hooks(self) -> bool:
        """Whether no hook receives what is computed inside."""
        hooks, model = _torch.count_hooks(), None if self.model is None else self.model()
        if hooks is None or hooks != self.hooks:
            below = [] if model is None else [module for module in model.modules() if module is not model]
            self.hooks = hooks
            self.is_private = not _torch.has_global_hooks() and not any(map(_torch.has_forward_hooks, below))
        return self.is_private


class _Calls(threading.local):
    """The calls of models that are running in a thread, the innermost last."""

    def __init__(self) -> None:
        self.running: list[_Call] = []


_calls = _Calls()
_ANYWHERE = _Call()  # where activations outside of a model share, if they are asked to


class Scope:
    """A model whose activations share memory within one call of it, since nobody else receives their values.

    Its two methods are forward hooks of the model. Called in parts (`forward_features`), it shares nothing.
    """

    def open(self, model: nn.Module, inputs: Any) -> None:
        """Begin a call, and end those that were broken off."""
        if _torch.can_share and not torch.compiler.is_compiling():
            self.close()
            for call in [call for call in _calls.running if not call.is_running()]:
                call.end()
            _calls.running.append(_Call(self, weakref.ref(model), sys._getframe(1)))

    def close(self, *_: Any) -> None:
        """End a call, also one that raised."""
        if not torch.compiler.is_compiling():
            for call in [call for call in _calls.running if call.scope is self]:
                call.end()


def share_within(model: nn.Module, activations: list[nn.Module]) -> None:
    """Let the activations of a model share memory within one call of it."""
    unshare_within(model)
    scope = Scope()
    for activation in activations:
        vars(activation)["scope"] = scope
    _hook(model, scope)


def _hook(model: nn.Module, scope: Scope) -> None:
    model.register_forward_pre_hook(scope.open)
    model.register_forward_hook(scope.close, always_call=True)


def keep_sharing(model: nn.Module) -> Callable[[], None]:
    """Return what lets a model, and models inside, share memory again as they do now."""
    scopes = [(module, vars(module)["scope"]) for module in model.modules() if "scope" in vars(module)]
    hooks = [(module, hook) for module in model.modules() for hook in _torch.forward_hooks(module)[1].values()]
    opened = [(module, hook.__self__) for module, hook in hooks if isinstance(getattr(hook, "__self__", None), Scope)]

    def restore() -> None:
        unshare_within(model)
        for module, scope in scopes:
            vars(module)["scope"] = scope
        for module, scope in opened:
            _hook(module, scope)

    return restore


def unshare_within(model: nn.Module) -> None:
    """Remove what `share_within` has added to a model or to models inside."""
    for module in model.modules():
        if isinstance(vars(module).get("scope"), Scope):
            vars(module)["scope"] = Scope()  # nobody calls it, so nothing is shared; None is for sharing anywhere
        for hooks in _torch.forward_hooks(module):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Scope)]:
                del hooks[key]


def find_call(x: Tensor, scope: Scope | None) -> _Call | None:
    """The call within which an activation of a scope may share the memory of x now, or None.

    It may if autograd is recording ordinary operations on x, an ordinary tensor, and saves tensors as they are.
    """
    can_share = (
        _torch.can_share
        and _torch.is_eager(x)
        and type(x) is Tensor
        and x.grad_fn is not None
        and torch.is_grad_enabled()
        and x.layout == torch.strided
        and not x.is_meta  # has no memory
        and x.numel() * x.element_size() >= _LEAST
        and not _torch.has_saved_tensors_hooks()
    )
    if not can_share or scope is None:
        return _ANYWHERE if can_share else None
    call = _calls.running[-1] if _calls.running else _ANYWHERE
    if call.scope is not scope:
        return None
    if not call.is_running():
        call.end()
        return None
    return call if call.has_no_hooks() else None


@dataclass(eq=False)
class _Value:
    """The output of an activation, held by weak reference: both the tensor and its memory."""

    y: Any
    storage: Any
    version: int
    call: _Call
    module: weakref.ref[nn.Module] | None

    def is_in(self, saved: Any) -> bool:
        """Whether something that was saved is y, unchanged and in its own memory, or a view of it."""
        y = self.y()
        return (
            type(saved) is Tensor
            and y is not None
            and _torch.is_tensor_or_view(saved, y)
            and (saved.layout, saved.dtype, saved._version) == (torch.strided, y.dtype, self.version)
            and _torch.StorageWeakRef(saved.untyped_storage()) == self.storage
            and not saved.is_neg()
            and _end(saved) <= y.numel()
        )

    def is_changed(self) -> bool:
        """Whether y is still there, but changed in place."""
        y = self.y()
        return y is not None and y._version != self.version

    def name(self) -> str:
        """The name of the activation in its model, for messages."""
        module = None if self.module is None else self.module()
        model = None if self.call.model is None else self.call.model()
        if module is None:
            return "sugar()"
        names = [name for name, other in model.named_modules() if other is module] if model is not None else []
        return names[0] if names else repr(module)


def _end(tensor: Tensor) -> int:
    """How many elements of its memory a tensor spans, from the beginning of the memory."""
    if not tensor.numel():
        return 0
    lengths = zip(tensor.shape, tensor.stride(), strict=True)
    return int(tensor.storage_offset()) + 1 + sum((size - 1) * stride for size, stride in lengths)


def remember_value(y: Tensor, call: _Call, module: nn.Module | None) -> None:
    """Let `share_saved` find y, the value of an activation."""
    storage = _torch.StorageWeakRef(y.untyped_storage())
    module_ref = None if module is None else weakref.ref(module)
    y.grad_fn.sugar_value = _Value(_torch.TensorWeakRef(y), storage, y._version, call, module_ref)  # type: ignore[union-attr]


def share_saved(x: Tensor, call: _Call) -> None:
    """Let all that was computed in a call, from the activations before x to x, give up the values of these."""
    nodes: list[Any] = [x.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or _SEEN in node.metadata:
            continue
        node.metadata[_SEEN] = True
        previous = [before for before, _ in node.next_functions]
        for activation in filter(None, map(_activation, previous)):
            if activation.sugar_value.call is call:
                for saved in _saved_by(node):
                    if activation.sugar_value.is_in(saved.data):
                        _replace(saved, activation)
        nodes += previous


def _activation(node: Any) -> Any:
    """The node that `remember_value` marked if this is it, or if this node's output views that one's; or None."""
    while type(node).__name__ in _VIEWS:
        ((node, _),) = node.next_functions
    return node if hasattr(node, "sugar_value") else None


_names: weakref.WeakKeyDictionary[type, list[str]] = weakref.WeakKeyDictionary()  # keeps no Function of a user's alive


def _saved_by(node: Any) -> Iterator[Any]:
    """What a node saved and holds as it was saved; nothing of a node that a backward pass has freed."""
    names = _names.get(type(node))
    if names is None:
        names = _names[type(node)] = _torch.saved_names(type(node))
    for name in names:
        try:
            saved = getattr(node, name)
        except RuntimeError:  # freed
            return
        for one in saved if isinstance(saved, tuple) else (saved,):
            if one.unpack_hook is None:
                yield one


def _replace(saved: Any, activation: Any) -> None:
    """Save a pre-activation in place of its activation's value, unless it was freed or changed in place.

    As autograd does, the backward pass raises RuntimeError if one of them is changed in place later.
    """
    try:
        (x,) = activation.saved_tensors
    except RuntimeError:
        return
    x, version, value = x.detach(), x._version, activation.sugar_value
    geometry = saved.data.size(), saved.data.stride(), saved.data.storage_offset()
    original = saved.data.detach().clone() if check_sharing else None

    def restore() -> Tensor:
        y = F.relu(x).as_strided(*geometry)
        if original is not None and not torch.equal(y.nan_to_num(), original.nan_to_num()):
            raise RuntimeError(
                f"the value of {value.name()}, of shape {list(x.shape)}, was overwritten by something that autograd "
                "doesn't see (.data, NumPy, a collective): save_memory=False keeps it apart from the pre-activation"
            )
        return y

    def unpack(_: None) -> Tensor:
        if x._version != version or value.is_changed():
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"input or output, of shape {list(x.shape)}, of {value.name()}"
            )
        return restore()

    if check_sharing:
        restore()
    saved.register_hooks(lambda _: None, unpack)
