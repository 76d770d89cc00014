"""One buffer for a pre-activation and for what the layers behind the activation save of its value (eager mode).

ReLU and the layer behind it save the same tensor, ReLU's value y. SUGAR saves the pre-activation x, so autograd would
keep both. Here the layer gives up its y for a reference to x, and takes relu(x) for its backward pass: the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks  # semi-private, as is all that is asked of nodes below
from torch._C._functorch import maybe_current_level
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.weak import TensorWeakRef

_SEEN = "timm_sugar"  # in a node's metadata
# The outputs of these nodes are their input's memory, looked at otherwise.
_VIEWS = {f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "T", "Squeeze")}


def can_share(x: Tensor) -> bool:
    """Whether autograd is recording ordinary operations on x, an ordinary tensor, and saves tensors as they are."""
    return (
        type(x) is Tensor
        and not x.is_meta  # has no address, by which the value is found
        and x.grad_fn is not None
        and not torch.jit.is_tracing()
        and not is_in_torch_dispatch_mode()
        and maybe_current_level() is None  # no torch.func transform
        and _top_saved_tensors_default_hooks(False) is None  # no checkpointing, no offloading
    )


@dataclass
class _Value:
    """What the node of an activation knows about the value that it returned; it doesn't keep it alive."""

    y: TensorWeakRef
    version: int
    address: int

    def is_in(self, saved: Any) -> bool:
        """Whether something that was saved is y, unchanged, or a view of it."""
        return (
            isinstance(saved, Tensor)
            and saved.layout == torch.strided
            and (saved.untyped_storage().data_ptr(), saved._version) == (self.address, self.version)
        )

    def is_changed(self) -> bool:
        """Whether y is still there, but changed in place."""
        y = self.y()
        return y is not None and y._version != self.version


def remember_value(y: Tensor) -> None:
    """Let `share_saved` find y, the value of an activation."""
    address = y.untyped_storage().data_ptr()
    y.grad_fn.sugar_value = _Value(TensorWeakRef(y), y._version, address)  # type: ignore[union-attr]


def share_saved(x: Tensor) -> None:
    """Let all that was computed between x and the activations before it give up the values of these that it saved."""
    nodes: list[Any] = [x.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or _SEEN in node.metadata:
            continue
        node.metadata[_SEEN] = True
        previous = [before for before, _ in node.next_functions]
        for activation in filter(None, map(_activation, previous)):
            for saved in _saved_by(node):
                if saved.unpack_hook is None and activation.sugar_value.is_in(saved.data):
                    _replace(saved, activation)
        nodes += previous


def _activation(node: Any) -> Any:
    """The node that `remember_value` marked if this is it, or if this node's output views that one's; or None."""
    while type(node).__name__ in _VIEWS:
        ((node, _),) = node.next_functions
    return node if hasattr(node, "sugar_value") else None


@functools.cache
def _saved_names(kind: type) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def _saved_by(node: Any) -> Iterator[Any]:
    for name in _saved_names(type(node)):  # type: ignore[arg-type]  # to mypy a type isn't hashable
        saved = getattr(node, name)
        yield from saved if isinstance(saved, tuple) else (saved,)


def _replace(saved: Any, activation: Any) -> None:
    """Save a pre-activation in place of its activation's value.

    As autograd does, the backward pass raises RuntimeError if one of them was changed in place meanwhile.
    """
    (x,) = activation.saved_tensors
    x, version, value = x.detach(), x._version, activation.sugar_value
    geometry = saved.data.size(), saved.data.stride(), saved.data.storage_offset()

    def unpack(_: None) -> Tensor:
        if x._version != version or value.is_changed():
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"input or output, of shape {list(x.shape)}, of sugar()"
            )
        return F.relu(x).as_strided(*geometry)

    saved.register_hooks(lambda _: None, unpack)
