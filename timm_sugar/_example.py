"""What one batch shows of a sugarized model: activations that are not SUGAR's, and inputs read after an in-place ReLU.

An in-place ReLU overwrites its input, and some models read that input again (`self.act(h); return out + h`). SUGAR
leaves its input alone, so such a model would compute something else. One forward pass under a dispatch mode sees it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from timm_sugar import _torch
from timm_sugar.activation import SUGAR

_HIDDEN = {
    name: getattr(torch.ops.aten, name)
    for name in ("relu", "relu_", "gelu", "silu", "silu_", "mish", "hardswish", "elu", "celu", "selu", "leaky_relu")
}
_NAMES = {packet: name for name, packet in _HIDDEN.items()}


class _Watch(_torch.TorchDispatchMode or object):  # type: ignore[misc]
    """Records what is computed outside SUGAR, and what is read of the inputs that SUGAR was given."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []  # names of the modules that are running
        self.inside = 0  # of SUGAR
        self.inputs: dict[int, tuple[Any, str]] = {}  # storages that an in-place activation would have overwritten
        self.outside: dict[str, set[str]] = defaultdict(set)
        self.read_again: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside:
            if name := _NAMES.get(func.overloadpacket):
                self.outside[self.stack[-1] if self.stack else ""].add(name)
            for x in _torch.tree_leaves((args, kwargs)):
                if isinstance(x, Tensor) and (found := self.inputs.get(_storage(x))):
                    self.read_again.add(found[1])
        return func(*args, **(kwargs or {}))


def _storage(x: Tensor) -> int:
    return _torch.storage_id(x) if x.layout == torch.strided else 0


def call(model: nn.Module, example: Any) -> Any:
    """Call a model on an example, of which it gets a copy: a tensor, a tuple of arguments, or a dict of named ones."""
    example = dict(example) if isinstance(example, Mapping) else example
    copied = _torch.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, example)
    if isinstance(copied, Mapping):
        return model(**copied)
    return model(*copied) if isinstance(copied, (tuple, list)) else model(copied)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def watch_example(model: nn.Module, example: Any, in_place: Mapping[nn.Module, str]) -> _Watch:
    """Run a sugarized model on an example.

    Args:
        model: any module; it is left as it was.
        example: what `call` takes.
        in_place: SUGAR modules that stand for in-place activations, and their names.

    Returns:
        `outside`: activations computed outside SUGAR by the name of the module; `read_again`: names of `in_place` whose
        input was read after them.
    """
    watch = _Watch()
    handles = []
    for name, module in model.named_modules():
        enter, leave = _hooks(watch, name, in_place)
        handles += [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        ]
    try:
        with inference(model), watch:
            output = call(model, example)
        for x in _tensors(output):  # what is returned is read, too
            if found := watch.inputs.get(_storage(x)):
                watch.read_again.add(found[1])
    finally:
        for handle in handles:
            handle.remove()
    return watch


def _hooks(watch: _Watch, name: str, in_place: Mapping[nn.Module, str]) -> tuple[Callable[..., None], ...]:
    def enter(module: nn.Module, inputs: Any, named: Any) -> None:
        x = next(iter([*inputs, *named.values()]), None)
        if isinstance(module, SUGAR) and isinstance(x, Tensor) and (found := watch.inputs.get(_storage(x))):
            watch.read_again.add(found[1])
        watch.stack.append(name)
        watch.inside += isinstance(module, SUGAR)

    def leave(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        watch.stack.pop()
        watch.inside -= isinstance(module, SUGAR)
        if module in in_place:
            x = next(iter([*inputs, *named.values()]))
            watch.inputs[_storage(x)] = x.untyped_storage(), in_place[module]

    return enter, leave


def equal_outputs(one: Any, other: Any) -> bool:
    """Whether two outputs hold the same tensors, bit for bit but for NaN."""
    return all(torch.equal(_dense(a), _dense(b)) for a, b in zip(_tensors(one), _tensors(other), strict=True))


def _tensors(output: Any, seen: dict[int, Any] | None = None) -> Iterator[Tensor]:
    """What a model returns in containers, or in the attributes of an object, each object once."""
    seen = {} if seen is None else seen
    for leaf in _torch.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in seen and not isinstance(leaf, (type, ModuleType, nn.Module)):
            seen[id(leaf)] = leaf  # kept, so that its id is not another's
            yield from _tensors(_inside(leaf), seen)


def _inside(one: Any) -> list[Any]:
    """What a mapping or an object holds."""
    if isinstance(one, Mapping):
        return [*one.values()]
    slots = [name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ())]
    return [getattr(one, name) for name in (*slots, *getattr(one, "__dict__", ())) if hasattr(one, name)]


def _dense(x: Tensor) -> Tensor:
    """The elements of a tensor that may be sparse or nested, with numbers for NaN."""
    x = torch.nested.to_padded_tensor(x, 0.0) if x.is_nested else x
    return (x if x.layout == torch.strided else x.to_dense()).nan_to_num()
