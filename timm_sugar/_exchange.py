"""Exchanging activations in a model, all of a plan or none, and undoing it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from timm_sugar import _torch
from timm_sugar._places import NAMED_BY_CONFIGS, Place, activation_of, find_places, is_in_place
from timm_sugar.activation import SUGAR
from timm_sugar.surrogate import get_surrogate, list_surrogates

New = nn.Module | Callable[..., Any]


def one_new_for_each_old(
    places: list[Place], make: Callable[[Place], New], setting: Callable[[Place], Any] = lambda place: None
) -> dict[Place, New]:
    """What `make` returns for each place: one instance where an old one is shared and its setting is the same."""
    made: dict[Any, New] = {}
    plan = {}
    for place in places:
        old = place.activation if isinstance(place.activation, nn.Module) else place, setting(place)
        if old not in made:
            made[old] = make(place)
        plan[place] = made[old]
    return plan


def exchange(plan: Mapping[Place, New]) -> list[Change]:
    """Put all new activations, or, if one place refuses, none; return the changes. Raises ValueError with its name."""
    for place in plan:
        if isinstance(place.activation, nn.Module) and "forward" in vars(place.activation):
            raise ValueError(
                f"{place.name}: its forward was replaced on the instance, as hooks of accelerate do; sugarize the "
                "model before that, or remove the hook first"
            )
    done: list[Change] = []
    try:
        for place, new in plan.items():
            done.append(Change(place))
            done[-1].put(new)
    except Exception as error:
        undo_all(done)
        raise ValueError(f"{done[-1].place.name} can't be replaced ({error}); the model is unchanged") from error
    return done


class Undoable(Protocol):
    """A change of a model that can be undone."""

    def undo(self) -> None:
        """Put back what was there before."""


def undo_all(changes: Sequence[Undoable]) -> None:
    """Undo changes, the last one first."""
    for change in reversed(changes):
        change.undo()


class Change:
    """One exchange at a place, and what is needed to undo it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.fused = getattr(place.owner, "activation_relu_or_gelu", None)
        node = place.key
        self.node = (node.op, node.target, node.args, node.kwargs) if isinstance(node, torch.fx.Node) else None
        self.meta = dict(node.meta) if isinstance(node, torch.fx.Node) else {}
        self.redirected: list[torch.fx.Node] = []

    def put(self, new: New) -> None:
        """Exchange the activation; a module inherits train mode, hooks and attributes of the module before it."""
        owner, key, old = self.place.owner, self.place.key, self.place.activation
        if isinstance(key, torch.fx.Node):
            if is_in_place(self.place):
                self.redirected = _redirect(key)
            _rewrite(owner, key, new)
            return
        if isinstance(new, nn.Module) and isinstance(old, nn.Module):
            new.train(old.training)
            settings = {
                *dir(new),  # an attribute would hide a method
                *("inplace", "_compiled_call_impl"),  # the latter calls the old module
                *getattr(old, "__constants__", ()),
                *(vars(SUGAR()) if isinstance(old, SUGAR) else ()),
                # A type of one's own may call its parameter alpha, too; as an attribute it would hide SUGAR's.
                *(key for name in list_surrogates() for key in get_surrogate(name).parameters),
                *(activation_of(new).parameters if isinstance(new, SUGAR) else ()),  # no longer in that list, perhaps
            }
            carried = {k: v for k, v in vars(old).items() if "hook" in k or k not in settings}
            vars(new).update(carried)
        _set(owner, key, new)
        if isinstance(owner, nn.TransformerEncoderLayer) and key == "activation":
            is_relu = isinstance(new, (SUGAR, nn.ReLU)) or new is F.relu
            owner.activation_relu_or_gelu = int(is_relu)  # which function the fused inference path computes
        if isinstance(owner, nn.TransformerDecoderLayer) and key == "activation" and isinstance(new, nn.Module):
            vars(owner)[key] = new  # its __setstate__ takes F.relu for a copy if nothing is here

    def undo(self) -> None:
        """Put the old activation back."""
        owner, key = self.place.owner, self.place.key
        if isinstance(key, torch.fx.Node):
            assert isinstance(owner, torch.fx.GraphModule)
            if self.node and self.node != (key.op, key.target, key.args, key.kwargs):
                if key.op == "call_module":
                    owner.delete_submodule(str(key.target))
                key.op, key.target, key.args, key.kwargs = self.node
                key.meta.update(self.meta)
                for user in self.redirected:
                    user.replace_input_with(key, _input_of(key))
                owner.recompile()
        elif getattr(owner, key, None) is not self.place.activation:
            _set(owner, key, self.place.activation)
        if self.fused is not None:
            owner.activation_relu_or_gelu = self.fused


class Renamed:
    """An activation that a config of transformers names, set to ReLU, and what is needed to undo it."""

    def __init__(self, config: Any, key: str, old: str) -> None:
        self.config, self.key, self.old = config, key, old
        setattr(config, key, "gated-relu" if old.startswith("gated-") else "relu")

    def undo(self) -> None:
        """Put the old name back."""
        setattr(self.config, self.key, self.old)


def has_config(module: nn.Module) -> bool:
    """Whether a module holds a config of transformers."""
    return hasattr(type(vars(module).get("config")), "save_pretrained")


def rename_in_configs(model: nn.Module, left: Collection[str], types: Collection[Any] = ()) -> list[Renamed]:
    """Let configs of transformers name ReLU, so that `from_pretrained` returns what `save_pretrained` saved.

    A config stays as it is where an activation below the modules that hold it isn't SUGAR; `left` names those that
    `sugarize` can't replace. So does one that only a part of a model holds, which can't be saved by itself.
    """
    held = [(name, vars(module)["config"]) for name, module in model.named_modules() if has_config(module)]
    if not held:
        return []
    kept = [*left, *(place.name for place in find_places(model, types) if place.settings() is None)]
    partial = {
        id(config) for prefix, config in held if any(not prefix or f"{name}.".startswith(f"{prefix}.") for name in kept)
    }
    whole = [f"{name}." if name else "" for name, module in model.named_modules() if hasattr(module, "save_pretrained")]
    return [
        Renamed(config, key, value)
        for config in {id(config): config for name, config in held if f"{name}.".startswith(tuple(whole))}.values()
        if id(config) not in partial
        for key, value in list(vars(config).items())
        if ("act" in key or key in ("feed_forward_proj", "nonlinearity"))
        and isinstance(value, str)
        and value.removeprefix("gated-") in NAMED_BY_CONFIGS
    ]


def _set(owner: nn.Module, key: str, new: Any) -> None:
    if not isinstance(new, nn.Module) and key in owner._modules:
        delattr(owner, key)  # a function can't be assigned over a module
    setattr(owner, key, new)
    _torch.rebind_compiled(owner)


def _input_of(node: torch.fx.Node) -> torch.fx.Node:
    x = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(x, torch.fx.Node)
    return x


def _redirect(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Let what reads an input after it was overwritten read the new value; return the nodes that do."""
    order = {other: i for i, other in enumerate(node.graph.nodes)}
    x = _input_of(node)
    later = [user for user in x.users if order[user] > order[node]]
    for user in later:
        user.replace_input_with(x, node)
    return later


def _rewrite(graph_module: nn.Module, node: torch.fx.Node, new: New) -> None:
    """Let a node of a graph call a new module or function on the input of the old one."""
    assert isinstance(graph_module, torch.fx.GraphModule)
    node.args, node.kwargs = (_input_of(node),), {}
    node.meta.pop("is_wrapped", None)  # of a function that torch.fx.wrap names, which the new one isn't
    if isinstance(new, nn.Module):
        node.op, node.target = "call_module", f"{node.name}_sugar"
        graph_module.add_submodule(node.target, new.train(graph_module.training))
    else:
        node.op, node.target = "call_function", new
    graph_module.recompile()
