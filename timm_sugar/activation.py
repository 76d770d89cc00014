"""`sugar()` and the `SUGAR` module: ReLU forward, a surrogate's derivative backward."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from timm_sugar import _torch
from timm_sugar._compiled import prepare_all, takes_tensors
from timm_sugar._operator import Block, RunTimeValues, apply, apply_scheduled, block_of_relu_gradient, constants
from timm_sugar._saved_tensors import find_call, remember_value, share_saved, unshare_within
from timm_sugar.surrogate import (
    Surrogate,
    find_surrogate,
    get_surrogate,
    known_surrogate,
    list_surrogates,
)


def sugar(x: Tensor, surrogate: str | Surrogate = "bsilu", *, save_memory: bool = False, **parameters: float) -> Tensor:
    """Compute relu(x), whose gradient is that of a surrogate: grad * surrogate'(x) (SUGAR, arXiv 2505.22074, eq. 4).

    Bit-equal to `F.relu(x)` in value.

    Args:
        x: any shape, elementwise, real floating point.
        surrogate: its name (`timm_sugar.list_surrogates()` has all of them), or what `get_surrogate` returns.
        save_memory: whether the next layer and the activation keep one tensor between them, not two (eager mode). Only
            for a value that nothing writes to unseen by autograd: not through `.data`, NumPy or a collective.
        parameters: the surrogate's, e.g. alpha.

    Raises:
        TypeError: if x has another dtype, or a parameter is unknown.
        ValueError: if the surrogate is unknown, or a parameter is out of range.

    Example:
        >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> y = timm_sugar.sugar(x, "nelu", alpha=0.5)
        >>> y.sum().backward()
        >>> x.grad
        tensor([-0.2500,  1.0000])
    """
    chosen = get_surrogate(surrogate, **parameters) if parameters else find_surrogate(surrogate)
    if save_memory and not torch.compiler.is_compiling():
        return _apply_sharing(x, chosen.name, chosen.values, chosen.formula, None, None)
    return apply(x, chosen.name, chosen.values, chosen.formula)


def _apply_sharing(
    x: Tensor, surrogate: str, values: list[float], formula: str, scope: Any, module: nn.Module | None
) -> Tensor:
    """`apply`, and one buffer for x and what the next layer saves, where that is safe."""
    call = find_call(x, scope) if isinstance(x, Tensor) else None
    if call is None:
        return apply(x, surrogate, values, formula)
    share_saved(x, call)
    y = apply(x, surrogate, values, formula)
    remember_value(y, call, module)
    return y


@contextmanager
def relu_gradient() -> Iterator[None]:
    """Let SUGAR backpropagate ReLU's own derivative, e.g. to attribute or to attack what a deployed model computes.

    Both the forward and the backward pass belong inside. Holds for the thread or asynchronous task that enters it, not
    for the threads in which nn.DataParallel runs its replicas. As a decorator it does so for ordinary functions; write
    `with` inside of `async def`, and in a generator leave the block before each `yield`.

    Compiled functions run uncompiled inside; set no other stance of the compiler there, with which they keep the
    surrogate's gradient or can't be compiled. What was compiled ahead of time keeps its gradient, too. A task that was
    begun inside has ReLU's for as long as the block lasts. A checkpoint needs use_reentrant=False: a reentrant one runs
    the forward pass anew in a thread of autograd's.

    Raises:
        RuntimeError: if it is entered inside of a compiled function, or something is compiled inside of it.

    Example:
        >>> x = torch.tensor([-1.0, 1.0], requires_grad=True)
        >>> with timm_sugar.relu_gradient():
        ...     (gradient,) = torch.autograd.grad(timm_sugar.sugar(x).sum(), x)
        >>> gradient
        tensor([0., 1.])
    """
    _uncompiled.enter()
    block = Block()
    token = block_of_relu_gradient.set(block)
    try:
        yield
    finally:
        block.is_open = False
        _uncompiled.leave()
        with suppress(ValueError):  # a generator that is closed in another context than it began in
            block_of_relu_gradient.reset(token)


class _Uncompiled:
    """Runs compiled functions as they were before torch.compile, while anybody is inside (in any thread)."""

    def __init__(self) -> None:
        self._lock, self._inside, self._stance = threading.Lock(), 0, ExitStack()

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                try:
                    self._stance.enter_context(torch.compiler.set_stance("force_eager"))
                except RuntimeError as error:
                    raise RuntimeError("enter relu_gradient() outside of the compiled function") from error
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stance.close()


_uncompiled = _Uncompiled()


class SUGAR(nn.Module):
    """`sugar` as a module, for any place that takes an activation layer.

    Args:
        inplace: comes first and is accepted because timm and torchvision pass it. Has no effect, as the backward pass
            needs the pre-activation.
        surrogate: as of `sugar`.
        save_memory: as of `sugar`.
        parameters: the surrogate's, e.g. alpha; they are attributes of the module, too.

    Raises:
        TypeError: as `sugar`, and for a surrogate's name in the place of `inplace`.
        ValueError: as `sugar`.

    Example:
        >>> module = timm_sugar.SUGAR(surrogate="nelu", alpha=0.05)
        >>> module.alpha
        0.05
    """

    surrogate: str
    formula: str
    _values: list[float]  # TorchScript reads the type here (so no `from __future__ import annotations` in this file)
    __jit_unused_properties__ = ("values",)

    def __init__(
        self,
        inplace: bool = False,
        *,
        surrogate: str | Surrogate = "bsilu",
        save_memory: bool = False,
        **parameters: float,
    ) -> None:
        super().__init__()
        if not isinstance(inplace, bool):
            raise TypeError(f"inplace must be True or False, not {inplace!r}; a surrogate is a keyword argument")
        chosen = get_surrogate(surrogate, **parameters)
        vars(self).update(surrogate=chosen.name, _values=chosen.values, formula=chosen.formula)
        self.made_with = self.formula  # stays in a pickle that comes back with another formula
        self.run_time: Any = None  # the values for compiled code, once they have been changed
        self.overwrites = False  # whether its value is written into its input, as an in-place ReLU's is
        self.save_memory = save_memory
        self.scope = None  # of the model within a call of which memory is shared, if it belongs to one

    @property
    def values(self) -> list[float]:
        """A copy of the values of the surrogate's parameters, in their order."""
        return list(self._values)

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        given = state.pop("given", None)
        if "_values" not in state:  # as it was called once
            state["_values"] = state.pop("values")
        state.setdefault("made_with", state.get("formula", ""))
        super().__setstate__({"overwrites": False, "save_memory": False, "scope": None, "run_time": None, **state})
        # Today's, if none of this process was that of the module, as in a pickle of another version.
        known = known_surrogate(self.surrogate, state.get("formula", ""))
        if given is not None and known.formula != self.formula:
            if gone := given.keys() - known.parameters.keys():
                raise ValueError(
                    f"this module was saved with another surrogate {self.surrogate!r}: the one that is registered here "
                    f"has no {', '.join(sorted(gone))}"
                )
            vars(self)["_values"] = [given.get(key, value) for key, value in known.parameters.items()]
        self.formula = known.formula
        vars(self)["run_time"] = _run_time(known, self._values) if self.run_time else None

    def __getstate__(self) -> dict[str, Any]:
        # No tensors of run_time, which torch.load may move, or leave without their values.
        return {**vars(self), "run_time": self.run_time is not None, "given": self._parameters_by_name()}

    def set_surrogate(self, surrogate: str | Surrogate | None = None, **parameters: float) -> None:
        """Exchange the surrogate, or values of its parameters, from the next forward pass on.

        Compiled code is compiled once more when this is called first, and then for another surrogate only. Raises as
        `sugar` does.

        Example:
            >>> module = timm_sugar.SUGAR()
            >>> module.set_surrogate(alpha=0.5)
            >>> module
            SUGAR(surrogate='bsilu', alpha=0.5)
        """
        if surrogate is None:
            known = known_surrogate(self.surrogate, self.formula)
            surrogate = get_surrogate(known, **dict(zip(known.parameters, self._values, strict=True)))
        chosen = get_surrogate(surrogate, **parameters)
        for key in chosen.parameters:  # an attribute of the activation before, which would hide the parameter
            vars(self).pop(key, None)
        vars(self).update(
            surrogate=chosen.name,
            _values=chosen.values,  # a new list: a backward pass has the values of its forward pass
            formula=chosen.formula,
            made_with=chosen.formula,
            run_time=_run_time(chosen, chosen.values),
        )

    def _parameters_by_name(self) -> dict[str, float]:
        """Names and values of the surrogate's parameters, if it is known and the module is complete."""
        own = vars(self)
        if "formula" not in own or own["surrogate"] not in list_surrogates():
            return {}
        return dict(zip(known_surrogate(own["surrogate"], own["formula"]).parameters, own["_values"], strict=True))

    def __getattr__(self, name: str) -> Any:
        """The value of a parameter of the surrogate, e.g. `module.alpha`."""
        parameters = {} if name.startswith("_") else self._parameters_by_name()
        return parameters[name] if name in parameters else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "surrogate":
            self.set_surrogate(value)
        elif name not in vars(self) and name in self._parameters_by_name():
            self.set_surrogate(**{name: value})
        elif name == "values" and "formula" in vars(self):
            self.set_surrogate(**dict(zip(self._parameters_by_name(), value, strict=True)))
        else:
            super().__setattr__(name, value)

    def forward(self, input: Tensor) -> Tensor:
        """relu(input), any shape."""
        if self.overwrites:
            return input.copy_(self._relu(input.clone(), False))
        return self._relu(input, self.save_memory)

    def _relu(self, x: Tensor, save_memory: bool) -> Tensor:
        if not torch.jit.is_scripting():  # alone, so that TorchScript skips what it can't compile
            if save_memory and not torch.compiler.is_compiling():
                return _apply_sharing(x, self.surrogate, self._values, self.formula, self.scope, self)
            if torch.compiler.is_compiling():
                # Code that PyTorch keeps on disk has a pickle of this module to compare with, whose formula is today's.
                constants([self.made_with])
            if self.run_time is not None and torch.compiler.is_compiling() and not _torch.is_exporting():
                return apply_scheduled(x, self.surrogate, self.run_time, self.formula)
        return apply(x, self.surrogate, self._values, self.formula)

    def __prepare_scriptable__(self) -> "SUGAR":
        """Take the hooks off the model that torch.jit.script is about to compile: TorchScript compiles hooks, too."""
        model = _torch.find_scripted_model()
        if model is not None:
            unshare_within(model)
        return self

    def extra_repr(self) -> str:
        parameters = self._parameters_by_name().items()
        return ", ".join([f"surrogate={self.surrogate!r}", *(f"{key}={value:g}" for key, value in parameters)])


def _run_time(surrogate: Surrogate, values: list[float]) -> RunTimeValues | None:
    """Values that compiled code takes when it runs; None for a formula that takes none, or numbers alone."""
    return RunTimeValues(values) if values and takes_tensors(surrogate) else None


class FunctionalSUGAR(SUGAR):
    """SUGAR in the place of a function such as `F.gelu` that a model keeps as an attribute, and called like that."""

    def forward(
        self,
        input: Tensor,
        a: float = 0.0,
        b: float = 0.0,
        c: bool = False,
        d: bool = False,
        inplace: bool = False,
        alpha: float = 0.0,
        negative_slope: float = 0.0,
        lower: float = 0.0,
        upper: float = 0.0,
        training: bool = False,
        approximate: str = "none",
    ) -> Tensor:
        """relu(input), any shape; what else torch's activation functions take has no effect."""
        if not torch.jit.is_scripting():  # TorchScript knows no super()
            return super().forward(input)
        if self.overwrites:
            return input.copy_(apply(input.clone(), self.surrogate, self._values, self.formula))
        return apply(input, self.surrogate, self._values, self.formula)


def sugar_modules(model: nn.Module) -> list[SUGAR]:
    """The SUGAR modules of a model, itself among them, each once."""
    return [module for module in model.modules() if isinstance(module, SUGAR)]


def warm_up(model: nn.Module, device: Any = None, dtype: torch.dtype | None = None) -> Any:
    """Compile now the gradients that a model's SUGAR modules need; otherwise the first step of training does.

    Takes a second or two for each surrogate, and up to some 15 where PyTorch's compiler keeps nothing on disk yet.

    Args:
        model: with SUGAR in it.
        device: where it is trained; that of its weights if None.
        dtype: of its activations; autocast's if None and this is called inside of it, else that of the weights.

    Returns:
        The model.

    Raises:
        TypeError: if it is no module, or the data type has no gradients.
        ValueError: if there is no SUGAR in it.

    Example:
        >>> model = timm.create_model("test_resnet_sugar")
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     model = timm_sugar.warm_up(model)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"warm_up() needs an nn.Module, not {type(model).__name__}")
    modules = sugar_modules(model)
    if not modules:
        raise ValueError(f"there is no SUGAR module in {type(model).__name__} to warm up")
    weight = next((weight for weight in model.parameters() if weight.is_floating_point()), torch.empty(0))
    at = weight.device if device is None else torch.device(device)
    if dtype is None:
        dtype = torch.get_autocast_dtype(at.type) if torch.is_autocast_enabled(at.type) else weight.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"warm_up() needs a real floating-point type, not {dtype}")
    prepare_all(((known_surrogate(m.surrogate, m.formula), m.values) for m in modules), dtype, at)
    return model
