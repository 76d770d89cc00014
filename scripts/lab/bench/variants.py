"""What benchmarks compare: a network or an activation with SUGAR, with ReLU, as it is, and with the alternatives.

The alternatives are the ways in which surrogate gradients are usually written, each in a line or two.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_sugar.activation import SUGAR
from timm_sugar.models import SUFFIX
from timm_sugar.surgery import replace_activations, sugarize, to_relu
from timm_sugar.surrogate import get_surrogate, surrogate_derivative

OWN = "own"  # the network as timm makes it
INSTALLED = importlib.util.find_spec("x_mlps_pytorch") is not None


class _Function(torch.autograd.Function):
    """Without setup_context, which would make each call twice as slow."""

    @staticmethod
    def forward(ctx, x: Tensor, surrogate: str, values: list[float]) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.surrogate, ctx.values = surrogate, values
        ctx.save_for_backward(x)
        return F.relu(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return (grad * surrogate_derivative(x, ctx.surrogate, ctx.values)).to(x.dtype), None, None


def _function(x: Tensor, surrogate: str, values: list[float]) -> Tensor:
    """An autograd.Function with the formula in torch operations."""
    return _Function.apply(x, surrogate, values)


def _fgi(x: Tensor, surrogate: str, values: list[float]) -> Tensor:
    """Forward gradient injection, the direct form: m = x * sg(f'(x)), y = m - sg(m) + sg(relu(x))."""
    m = x * surrogate_derivative(x.detach(), surrogate, values).to(x.dtype)
    return m - m.detach() + F.relu(x).detach()


def _detach(x: Tensor, surrogate: str, values: list[float]) -> Tensor:
    """y = sg(relu(x)) + f(x) - sg(f(x)), the derivative being autograd's; FGI's indirect form."""
    f = get_surrogate(surrogate, **dict(zip(get_surrogate(surrogate).parameters, values, strict=True))).evaluate(x)
    return F.relu(x).detach() + f - f.detach()


ALTERNATIVES: dict[str, Callable[[Tensor, str, list[float]], Tensor]] = {
    "fgi": _fgi,
    "function": _function,
    "detach": _detach,
}
BUILT_IN: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class Alternative(nn.Module):
    """One of the ALTERNATIVES as a module, with the surrogate and the values of a SUGAR module."""

    def __init__(self, name: str, sugar: SUGAR) -> None:
        super().__init__()
        self.formulation, self.surrogate, self.values = ALTERNATIVES[name], sugar.surrogate, sugar.values

    def forward(self, x: Tensor) -> Tensor:
        """relu(x), any shape."""
        return self.formulation(x, self.surrogate, self.values)


def _x_mlps(sugar: SUGAR) -> nn.Module:
    """SUGAR of PyPI's x-mlps-pytorch, which takes the surrogate's derivative for x <= 0 only."""
    from x_mlps_pytorch import activations

    backward = {"bsilu": activations.BSiLU, "nelu": activations.NeLU}.get(sugar.surrogate)
    if backward is None:
        raise ValueError(f"x-mlps-pytorch has no surrogate {sugar.surrogate!r}")
    return activations.Sugar(nn.ReLU(), backward(*sugar.values))


def parse(variant: str) -> tuple[str, dict[str, Any]]:
    """A variant's name and its settings, which JSON scalars may follow: "sugar:surrogate=nelu,alpha=0.05".

    Raises ValueError for a name that there is not, and settings of another form.
    """
    name, _, text = variant.partition(":")
    known = (OWN, "sugar", *BUILT_IN, *ALTERNATIVES, "x-mlps")
    if name not in known:
        raise ValueError(f"no variant {name!r} (there are {', '.join(known)})")
    settings = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"settings of a variant are key=value, not {item!r}")
        try:
            settings[key] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            settings[key] = value
    return name, settings


def make_activation(variant: str, settings: dict[str, Any]) -> nn.Module:
    """A variant as an activation. `settings`: those of SUGAR, which the variant's own come before.

    Raises ValueError for an unknown variant, one that only networks have, or one that isn't installed; and what SUGAR
    raises.
    """
    name, own = parse(variant)
    sugar = SUGAR(False, **(settings | own))
    if name == OWN:
        raise ValueError("only a network has activations of its own")
    if name == "x-mlps" and not INSTALLED:
        raise ValueError("x-mlps needs the package x-mlps-pytorch")
    if name == "sugar":
        return sugar
    if name in BUILT_IN:
        return BUILT_IN[name]()
    return Alternative(name, sugar) if name in ALTERNATIVES else _x_mlps(sugar)


def make_model(base: str, variant: str, settings: dict[str, Any], **arguments: Any) -> nn.Module:
    """timm's model `base` with the activations of a variant, the weights random but the same for all variants.

    `arguments` are create_model's. Raises as make_activation, sugarize and create_model do.
    """
    name, own = parse(variant)
    torch.manual_seed(0)
    if name == "sugar":  # by name, which shares memory
        return timm.create_model(f"{base}{SUFFIX}", **(settings | own), **arguments)
    model = timm.create_model(base, **arguments)
    if name == OWN:
        return model
    sugarize(model, **(settings | own))
    if name == "relu":
        to_relu(model)
    else:
        replace_activations(model, functools.partial(make_activation, variant, settings))
    return model


def describe(variant: str, settings: dict[str, Any]) -> str:
    """The surrogate of a variant and its parameters, as SUGAR's repr has them; nothing for one without a surrogate."""
    name, own = parse(variant)
    return "" if name == OWN or name in BUILT_IN else SUGAR(False, **(settings | own)).extra_repr()
