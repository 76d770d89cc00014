"""Where the hidden activations of a live model sit: which types they have, and under which name each is found.

What counts as a hidden activation stands here and nowhere else. Gates and attention (sigmoids, tanh, softmax) never do,
nor PReLU, whose learned slopes are weights of the model. Types of other packages are known by name, so that none of
these packages is imported.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from timm_sugar import _torch
from timm_sugar.activation import SUGAR, FunctionalSUGAR, sugar
from timm_sugar.surrogate import Surrogate, get_surrogate, known_surrogate

# Each type or function with the surrogate that has its derivative, or the nearest one: ReLU's for ReLU6, SiLU's for
# Hardswish, GELU's for its approximations.
_TYPES: dict[type, str] = {
    **dict.fromkeys((nn.ReLU, nn.ReLU6), "relu"),
    **dict.fromkeys((nn.LeakyReLU, nn.RReLU), "leaky_relu"),
    **dict.fromkeys((nn.ELU, nn.CELU), "elu"),
    **dict.fromkeys((nn.SiLU, nn.Hardswish), "silu"),
    **{nn.SELU: "selu", nn.GELU: "gelu", nn.Mish: "mish"},
}
_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((torch.relu, torch.relu_, F.relu, F.relu_, F.relu6), "relu"),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_, torch.rrelu, torch.rrelu_, F.rrelu, F.rrelu_), "leaky_relu"),
    **dict.fromkeys((F.elu, F.elu_, torch.celu, torch.celu_, F.celu, F.celu_), "elu"),
    **dict.fromkeys((torch.selu, torch.selu_, F.selu, F.selu_), "selu"),
    **dict.fromkeys((F.silu, F.hardswish), "silu"),
    **{F.gelu: "gelu", F.mish: "mish"},
}
RELU = ("ReLU", "relu", "relu_")  # what `name_of` calls ReLU
_TIMM = {
    **dict.fromkeys(("Swish", "SwishMe", "HardSwish", "HardSwishMe", "swish", "swish_me"), "silu"),
    **dict.fromkeys(("hard_swish", "hard_swish_me"), "silu"),
    **dict.fromkeys(
        ("Mish", "MishMe", "HardMish", "HardMishMe", "mish", "mish_me", "hard_mish", "hard_mish_me"), "mish"
    ),
    **dict.fromkeys(("GELU", "GELUTanh", "QuickGELU", "gelu", "gelu_tanh", "quick_gelu"), "gelu"),
}
_TRANSFORMERS = {
    **dict.fromkeys(("GELUActivation", "NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation"), "gelu"),
    **dict.fromkeys(("QuickGELUActivation", "ClippedGELUActivation", "GELUTanh", "PytorchGELUTanh"), "gelu"),
    **{"SiLUActivation": "silu", "MishActivation": "mish"},
}
_BY_NAME = {  # by module and name
    **{f"timm.layers.{file}.{name}": own for name, own in _TIMM.items() for file in ("activations", "activations_me")},
    **{f"transformers.activations.{name}": own for name, own in _TRANSFORMERS.items()},
    **dict.fromkeys(("efficientnet_pytorch.utils.Swish", "efficientnet_pytorch.utils.MemoryEfficientSwish"), "silu"),
    **dict.fromkeys(("mmcv.cnn.bricks.swish.Swish", "mmcv.cnn.bricks.hswish.HSwish"), "silu"),
}
# How the configs of transformers name activations that `sugarize` replaces, also behind "gated-".
NAMED_BY_CONFIGS = (
    *("gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "gelu_python_tanh"),
    *("gelu_accurate", "hardswish", "leaky_relu", "mish", "quick_gelu", "relu6", "silu", "swish"),
)
# SUGAR as torch.fx records it.
SUGAR_OPERATORS = (torch.ops.timm_sugar.relu, torch.ops.timm_sugar.relu.default)
_METHODS = ("relu", "relu_")  # of a tensor
# What stands behind x in a call in a graph, where it stands there without its name.
_ARGUMENTS = {
    **{"leaky_relu": ("negative_slope", "inplace"), "elu": ("alpha", "inplace"), "celu": ("alpha", "inplace")},
    **{"rrelu": ("lower", "upper", "training", "inplace"), "sugar": ("surrogate",)},
}


def _qualified(kind: Any) -> str:
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__name__', '')}"


def _known_type(kind: type) -> str | None:
    """The surrogate that belongs to a type of modules, or to a subclass that computes the same; None for others."""
    for base in kind.__mro__:
        if (own := _TYPES.get(base) or _BY_NAME.get(_qualified(base))) is not None:
            same = all(getattr(kind, method) is getattr(base, method) for method in ("forward", "__call__"))
            return own if same else None
    return None


def _is_plain_sugar(module: nn.Module) -> bool:
    """Whether a module is SUGAR, and computes what SUGAR does."""
    kind = FunctionalSUGAR if isinstance(module, FunctionalSUGAR) else SUGAR
    return isinstance(module, SUGAR) and all(
        getattr(type(module), method) is getattr(kind, method) for method in ("forward", "__call__", "_relu")
    )


def is_activation(module: nn.Module, types: Collection[Any] = ()) -> bool:
    """Whether a module is a hidden activation: of a type that `sugarize` replaces, or of `types`, or SUGAR itself."""
    return _is_plain_sugar(module) or type(module) in types or _known_type(type(module)) is not None


def is_activation_function(function: Any, types: Collection[Any] = ()) -> bool:
    """Whether a callable is a hidden activation as a function: torch's (`F.gelu`), timm's, `sugar`, or one of them
    as a partial or compiled."""
    function = _unwrapped(function)
    if isinstance(function, (nn.Module, type)) or not callable(function):
        return False
    return _qualified(function) in _BY_NAME or any(function is known for known in (*_FUNCTIONS, sugar, *types))


def _unwrapped(function: Any) -> Any:
    return _parts(function)[0]


def _parts(function: Any) -> tuple[Any, dict[str, Any]]:
    """What a partial or a compiled function calls, and the arguments that it gives by name."""
    keywords: dict[str, Any] = {}
    while (inner := _torch.uncompiled(function)) is not function or isinstance(function, functools.partial):
        if isinstance(inner, functools.partial):
            keywords = {**inner.keywords, **keywords}
            inner = inner.func
        function = inner
    return function, keywords


def own_surrogate(activation: Any) -> Surrogate:
    """The surrogate with the derivative of an activation, or the nearest; its parameters are the activation's.

    Raises ValueError for an activation that has none, one of `types`.
    """
    if isinstance(activation, SUGAR):
        return activation_of(activation)
    if _unwrapped(activation) is sugar:
        return _surrogate_of_call(activation)
    if isinstance(activation, nn.Module):
        name, settings = _known_type(type(activation)), vars(activation)
    else:
        function, settings = _parts(activation)
        name = "relu" if function in _METHODS else _BY_NAME.get(_qualified(function))
        name = name or next((own for known, own in _FUNCTIONS.items() if known is function), None)
    if name is None:
        raise ValueError(f"no surrogate has the derivative of {name_of(activation)}: name one, not 'same'")
    if name == "leaky_relu" and ("lower" in settings or name_of(activation).startswith("rrelu")):
        lower, upper = settings.get("lower", 1 / 8), settings.get("upper", 1 / 3)  # PyTorch's defaults
        settings = {"negative_slope": (lower + upper) / 2}  # the mean slope
    if name_of(activation).lower().startswith("celu"):
        settings = {}  # its slope is 1 on both sides of 0, as ELU's is with alpha 1 alone
    given = {key: settings[key] for key in get_surrogate(name).parameters if key in settings}
    return get_surrogate(name, **given)


def _surrogate_of_call(function: Any) -> Surrogate:
    """The surrogate of `sugar`, or of a partial of it."""
    given = {key: value for key, value in _parts(function)[1].items() if key != "save_memory"}
    return get_surrogate(given.pop("surrogate", "bsilu"), **given)


def activation_of(module: SUGAR) -> Surrogate:
    """The surrogate of a SUGAR module with the values that it has now."""
    return _with_values(module.surrogate, module.values, module.formula)


def _with_values(name: str, values: list[float], formula: str) -> Surrogate:
    known = known_surrogate(name, formula)
    return get_surrogate(known, **dict(zip(known.parameters, values, strict=True)))


def name_of(activation: Any) -> str:
    """The type of an activation: a class, a function, or a tensor's method."""
    if isinstance(activation, nn.Module):
        return type(activation).__name__
    return str(getattr(_unwrapped(activation), "__name__", activation))


@dataclass(frozen=True)
class Place:
    """Where an activation sits: under a name in a module, or at a node of a torch.fx graph."""

    name: str
    activation: Any
    owner: nn.Module
    key: str | torch.fx.Node

    def arguments(self) -> dict[str, Any]:
        """What else than x the activation is called with, by name, at a node of a graph."""
        if not isinstance(self.key, torch.fx.Node) or self.activation in SUGAR_OPERATORS:
            return {}
        names = _ARGUMENTS.get(name_of(self.activation).rstrip("_"), ("inplace",))
        return {**dict(zip(names, self.key.args[1:], strict=False)), **self.key.kwargs}

    def with_arguments(self) -> Any:
        """The activation, as a partial where a graph calls a function with further arguments."""
        if isinstance(self.key, torch.fx.Node) and self.activation in SUGAR_OPERATORS:
            return functools.partial(sugar, surrogate=_with_values(*self.settings()))  # type: ignore[misc]
        given = {} if self.activation in _METHODS else self.arguments()
        return functools.partial(self.activation, **given) if given else self.activation

    def settings(self) -> tuple[str, list[float], str] | None:
        """Surrogate, parameter values and formula if SUGAR is here already."""
        if isinstance(self.activation, SUGAR):
            return self.activation.surrogate, self.activation.values, self.activation.formula
        if _unwrapped(self.activation) is sugar:
            surrogate = _surrogate_of_call(self.with_arguments())
            return surrogate.name, surrogate.values, surrogate.formula
        if isinstance(self.key, torch.fx.Node) and self.activation in SUGAR_OPERATORS:
            _, name, values, formula = self.key.args
            return name, list(values), formula  # type: ignore[return-value, arg-type]
        return None


def is_in_place(place: Place) -> bool:
    """Whether an activation overwrites its input."""
    if isinstance(place.activation, nn.Module):
        return bool(getattr(place.activation, "inplace", False) or getattr(place.activation, "overwrites", False))
    given = place.arguments() if isinstance(place.key, torch.fx.Node) else _parts(place.activation)[1]
    return bool(given.get("inplace", False) or name_of(place.activation).endswith("_"))


def overwrites_input(place: Place, args: Collection[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function that a module keeps overwrites its input when it is called with these further arguments."""
    given = {**dict(zip(_ARGUMENTS.get(name_of(place.activation), ("inplace",)), args, strict=False)), **kwargs}
    return is_in_place(place) or given.get("inplace") is True


def find_places(model: nn.Module, types: Collection[Any] = ()) -> Iterator[Place]:
    """Find every hidden activation below a model, SUGAR among them."""
    for prefix, owner in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if _is_fused(owner):
            continue
        for key, child in owner._modules.items():
            if child is not None and is_activation(child, types) and vars(owner).get(key, child) is child:
                yield Place(dot + key, child, owner, key)
        if isinstance(owner, SUGAR):  # what the activation before it kept has no effect
            continue
        for key, value in vars(owner).items():
            # A module would be kept elsewhere, where an attribute of the class hides it.
            if is_activation_function(value, types) and not hasattr(type(owner), key):
                yield Place(dot + key, value, owner, key)
        if isinstance(owner, torch.fx.GraphModule):
            for node in owner.graph.nodes:
                method = node.op == "call_method" and node.target in _METHODS
                function = node.op == "call_function" and (
                    is_activation_function(node.target, types) or node.target in SUGAR_OPERATORS
                )
                if method or function:
                    yield Place(dot + node.name, node.target, owner, node)


def _names(module: nn.Module) -> list[str]:
    """Attributes under which a module keeps the name of an activation, which its forward looks up, as Mamba's."""
    kept = vars(module).items()
    return [key for key, value in kept if "act" in key and isinstance(value, str) and value in NAMED_BY_CONFIGS]


def find_hidden(model: nn.Module) -> list[str]:
    """Find SUGAR that never runs, because an attribute of its owner has its name."""
    return [
        _dotted(prefix, key)
        for prefix, owner in model.named_modules()
        for key, child in owner._modules.items()
        if isinstance(child, SUGAR) and vars(owner).get(key, child) is not child
    ]


_CALLED = frozenset(
    {"relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "sugar"}
)


def find_leftovers(model: nn.Module, types: Collection[Any] = ()) -> dict[str, str]:
    """Find activations that can't be replaced where they sit, and modules that only behave like one: {name: why}."""
    found: dict[str, str] = {}
    replaced = {id(place.activation) for place in find_places(model, types)}
    for prefix, owner in model.named_modules():
        if isinstance(owner, torch.jit.ScriptModule):
            if getattr(owner, "original_name", "") in {kind.__name__ for kind in _TYPES}:
                found[prefix] = f"a scripted {owner.original_name}"
            continue
        if id(owner) not in replaced:  # what an activation keeps has no effect on what takes its place
            found |= _out_of_reach(prefix, owner, replaced, lambda value: _is_either(value, types), _CALLED)
            found |= {_dotted(prefix, key): f"named {vars(owner)[key]!r}" for key in _names(owner)}
        if _is_fused(owner):
            found[prefix] = "fused with its layer: sugarize before fuse_modules"
        elif "RNN" in type(owner).__name__ and getattr(owner, "nonlinearity", None) == "relu":
            found[prefix] = "computes ReLU itself"
        elif prefix and not is_activation(owner, types) and _behaves_like_relu(owner):
            found[prefix] = f"{type(owner).__name__} behaves like a ReLU: pass types=({type(owner).__name__},)"
    return found


def find_sugar_left(model: nn.Module) -> dict[str, str]:
    """Find SUGAR that `to_relu` can't replace: {name: why}. A function that a forward calls is not looked into."""
    found: dict[str, str] = {}
    replaced = {id(place.activation) for place in find_places(model)}
    for prefix, owner in model.named_modules():
        if isinstance(owner, SUGAR):
            if not _is_plain_sugar(owner):
                found[prefix or type(model).__name__] = f"{type(owner).__name__} computes something else"
            continue
        if isinstance(owner, torch.jit.ScriptModule):
            inside = any(f"{prefix}.".startswith(f"{name}." if name else "") for name in found)
            if not inside and hasattr(owner, "forward") and "timm_sugar::" in str(owner.inlined_graph):
                found[prefix or type(model).__name__] = "scripted"
            continue
        found |= _out_of_reach(prefix, owner, replaced, _is_sugar, {"sugar"})
        for kind in () if isinstance(owner, torch.fx.GraphModule) else _own_types(owner):  # whose code is its graph
            for key, value in vars(kind).items():
                value = _function_of(value)
                if key != "__init__" and isinstance(value, types.FunctionType) and _calls_sugar(value):
                    found[_dotted(prefix, key)] = "calls sugar()"
    return found


def _function_of(value: Any) -> Any:
    """What a property, method of a class or decorated function calls."""
    function: Any = value.fget if isinstance(value, property) else value
    return inspect.unwrap(function)


@functools.cache
def _of_every_module() -> frozenset[str]:
    """Names of what every module keeps."""
    return frozenset(vars(nn.Module()))


def _out_of_reach(
    prefix: str, owner: nn.Module, replaced: set[int], wanted: Callable[[Any], bool], called: Collection[str]
) -> dict[str, str]:
    """Wanted activations that a module or its class keeps where they can't be exchanged: {name: why}."""
    found: dict[str, str] = {}
    if _torch.is_compiled_module(owner):  # it keeps functions of what it wraps, which are bound anew
        return found
    for key, value in vars(owner).items():
        names = {"sugar"} & set(called) if key.startswith("_") else called  # others keep a wrapped forward there
        if isinstance(value, nn.Module) and wanted(value) and owner._modules.get(key) is not value:
            found[_dotted(prefix, key)] = "not among the modules"  # set by object.__setattr__
            continue
        known = key in _of_every_module() or id(value) in replaced
        if not known and (why := _why_out_of_reach(value, wanted, names)):
            found[_dotted(prefix, key)] = why
    for kind in _own_types(owner):
        for key, value in vars(kind).items():
            value = vars(owner).get(key, value)
            value = value.__func__ if isinstance(value, staticmethod) else value
            reached = key in owner._modules or (key not in vars(owner) and id(value) in replaced)
            method = isinstance(value, types.FunctionType)
            if not reached and (wanted(value) or (not method and _why_out_of_reach(value, wanted, ()))):
                found[_dotted(prefix, key)] = "an attribute of the class"
    return found


def _dotted(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _own_types(module: nn.Module) -> tuple[type, ...]:
    """The type of a module and those that it inherits from, up to nn.Module."""
    return type(module).__mro__[: type(module).__mro__.index(nn.Module)]


def _is_either(value: Any, types: Collection[Any]) -> bool:
    return is_activation(value, types) if isinstance(value, nn.Module) else is_activation_function(value, types)


def _is_sugar(value: Any) -> bool:
    return isinstance(value, SUGAR) or _unwrapped(value) is sugar


def _is_fused(module: nn.Module) -> bool:
    """Whether torch.ao has fused a layer with the ReLU behind it, which its quantisation computes itself."""
    return type(module).__module__.startswith("torch.ao.nn.intrinsic") and "ReLU" in type(module).__name__


def _why_out_of_reach(value: Any, wanted: Callable[[Any], bool], called: Collection[str]) -> str:
    """What holds an activation without being one: a container, function, method or partial; empty for others."""
    if any(map(wanted, _inside(value))):
        return f"in a {type(value).__name__}"
    known = (getattr(value, "__module__", "") or "").startswith(("torch.", "timm.layers."))
    code = getattr(value, "__code__", None) if not known else None
    if code and {name.rstrip("_") for name in code.co_names} & set(called):
        return "called inside a function"
    return ""


def _inside(value: Any, depth: int = 3) -> Iterator[Any]:
    """What a container, partial, method or function holds, and what these hold in turn."""
    values: Iterable[Any] = ()
    if isinstance(value, dict):
        values = value.values()
    elif isinstance(value, (list, tuple, set)):
        values = value
    elif isinstance(value, functools.partial):
        values = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        values = [value.__self__]
    elif isinstance(value, types.FunctionType):
        values = _given(value)
    for one in values:
        yield one
        if depth > 1:
            yield from _inside(one, depth - 1)


def _given(function: types.FunctionType) -> list[Any]:
    """The defaults of a function, and what it reads of the functions around it."""
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*defaults, *inspect.getclosurevars(function).nonlocals.values()]


def _calls_sugar(function: types.FunctionType) -> bool:
    """Whether the code of a function names `sugar`, also below another name or inside of an inner function."""
    if any(map(_is_sugar, _given(function))):
        return True
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        if any(name == "sugar" or function.__globals__.get(name) is sugar for name in code.co_names):
            return True
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return False


def _behaves_like_relu(module: nn.Module) -> bool:
    """Whether a leaf without weights is close to ReLU far from 0 on both sides."""
    own = [*module.children(), *module.parameters(), *module.buffers()]
    if isinstance(module, nn.Hardtanh):
        return module.min_val == 0  # as ReLU6
    if isinstance(module, nn.Threshold):
        return module.threshold == module.value == 0
    known = type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, nn.Softplus)
    if own or known or isinstance(module, torch.fx.GraphModule):  # in which nodes are looked for
        return False
    try:
        probe = torch.tensor([[-20.0, -15.0, 15.0, 20.0]])
        with torch.no_grad():
            y = copy.deepcopy(module).eval()(probe.clone())
        return bool(y.shape == probe.shape and (y - F.relu(probe)).abs().max() < 0.2 and not y.isnan().any())
    except Exception:  # whatever it takes, it is no elementwise activation
        return False
