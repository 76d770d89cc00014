"""A surrogate that is registered anew under its name: what was made before keeps the formula that it was made with."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import timm_sugar
from timm_sugar import SUGAR, Surrogate, _compiled, get_surrogate, register_surrogate, sugar
from timm_sugar import surrogate as surrogate_module

X = torch.linspace(-3, 3, 24, dtype=torch.float64)


def old(x: Tensor, a: Any, b: Any) -> Tensor:
    return a * torch.sigmoid(b * x)


def new(x: Tensor, b: Any, a: Any) -> Tensor:
    """Another formula, with the parameters in another order."""
    return a * torch.tanh(b * x).square()


def register(formula: Callable[..., Tensor]) -> None:
    defaults = {"a": 2.0, "b": 0.5} if formula is old else {"b": 0.5, "a": 2.0}
    register_surrogate("mine", derivative=formula, overwrite=True, **defaults)


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(surrogate_module, "_surrogates", dict(surrogate_module._surrogates))
    monkeypatch.setattr(surrogate_module, "_known", dict(surrogate_module._known))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradient(call: Callable[[Tensor], Tensor], x: Tensor = X) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(call(leaf).sum(), leaf)[0]


def held(module: nn.Module) -> Callable[[Tensor], Tensor]:
    surrogate = get_surrogate("mine", a=2.0)
    return lambda x: sugar(x, surrogate)


ROUTES: dict[str, Callable[[SUGAR], Callable[[Tensor], Tensor]]] = {
    "module": lambda m: m,
    "copied": copy.deepcopy,
    "held": held,
    "shared": lambda m: SUGAR(surrogate="mine", save_memory=True),
    "fx": torch.fx.symbolic_trace,
    "export": lambda m: torch.export.export(m, (X.clone().requires_grad_(),)).module(),
    "func": lambda m: lambda x: torch.func.vmap(m)(x[None])[0],
    "compiled later": lambda m: torch.compile(m, backend="aot_eager", fullgraph=True),
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_what_was_made_before_keeps_its_formula(route: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(_compiled, "_CHUNK", 7)
        monkeypatch.setattr(_compiled, "_WORTHWHILE", 7)
    register(old)
    call = ROUTES[route](SUGAR(surrogate="mine"))
    register(new)
    torch.testing.assert_close(gradient(call), old(X, 2.0, 0.5))
    torch.testing.assert_close(gradient(SUGAR(surrogate="mine")), new(X, 0.5, 2.0))
    torch.testing.assert_close(gradient(lambda x: sugar(x, "mine")), new(X, 0.5, 2.0))


# Two formulas that are one at the defaults, and wherever all parameters are scaled alike; and what each is given.
ALIKE: dict[str, Any] = {
    "equal defaults": (
        lambda x, a, b: torch.sigmoid(a * x) + 0 * b,
        lambda x, a, b: torch.sigmoid(b * x) + 0 * a,
        ({"a": 1.0, "b": 1.0}, {"a": 3.0}),
        lambda x: torch.sigmoid(3 * x),
        lambda x: torch.sigmoid(x),
    ),
    "default of 0": (
        lambda x, leak: torch.sigmoid(x) + leak * torch.cos(x),
        lambda x, leak: torch.sigmoid(x) + leak * torch.sin(x),
        ({"leak": 0.0}, {"leak": 0.5}),
        lambda x: torch.sigmoid(x) + 0.5 * torch.cos(x),
        lambda x: torch.sigmoid(x) + 0.5 * torch.sin(x),
    ),
}


@pytest.mark.parametrize("what", ALIKE)
def test_formulas_that_are_alike_at_their_defaults_are_told_apart(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compiled, "_CHUNK", 7)
    monkeypatch.setattr(_compiled, "_WORTHWHILE", 7)
    one, other, (defaults, given), before, after = ALIKE[what]
    register_surrogate("mine", derivative=one, **defaults)
    module = SUGAR(surrogate="mine", **given)
    torch.testing.assert_close(gradient(module), before(X))
    with pytest.raises(ValueError, match="exists already"):
        register_surrogate("mine", derivative=other, **defaults)
    register_surrogate("mine", derivative=other, overwrite=True, **defaults)
    torch.testing.assert_close(gradient(SUGAR(surrogate="mine", **given)), after(X))
    torch.testing.assert_close(gradient(module), before(X))


def test_what_was_compiled_before_keeps_its_formula_too() -> None:
    register(old)
    module = SUGAR(surrogate="mine")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    gradient(compiled)
    register(new)
    for call in (module, compiled):
        torch.testing.assert_close(gradient(call), old(X, 2.0, 0.5))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_has_the_formula_of_its_original(copied: Callable[[SUGAR], SUGAR]) -> None:
    register(old)
    module = SUGAR(surrogate="mine", a=3.0)
    register(new)
    copy_of_it = copied(module)
    for _ in range(2):  # and a second time with a value that is set
        torch.testing.assert_close(gradient(copy_of_it), old(X, copy_of_it.a, 0.5))
        copy_of_it.a = 4.0


def test_a_backward_pass_has_the_formula_of_its_forward_pass() -> None:
    register(old)
    leaf = X.clone().requires_grad_()
    y = sugar(leaf, "mine")
    register(new)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), leaf)[0], old(X, 2.0, 0.5))


def test_a_module_keeps_the_order_of_its_parameters_and_takes_the_new_formula_when_it_is_asked_to() -> None:
    register(old)
    module = SUGAR(surrogate="mine", a=3.0)
    register(new)
    assert repr(module) == "SUGAR(surrogate='mine', a=3, b=0.5)"
    module.b = 0.25
    torch.testing.assert_close(gradient(module), old(X, 3.0, 0.25))
    module.surrogate = "mine"
    torch.testing.assert_close(gradient(module), new(X, 0.5, 2.0))
    model = nn.Sequential(nn.GELU())
    register(old)
    timm_sugar.sugarize(model, "mine")
    register(new)
    timm_sugar.sugarize(model, "mine")
    torch.testing.assert_close(gradient(model), new(X, 0.5, 2.0))


def test_a_surrogate_that_was_not_registered_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'bsilu' is not registered: register_surrogate\(\) does it"):
        sugar(X, Surrogate("bsilu", torch.sigmoid))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_pickle_of_a_process_with_another_order_of_the_parameters(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(old)
    module = SUGAR(surrogate="mine")
    module.set_surrogate(a=3.0, b=0.25)
    content = pickle.dumps(module)
    for name in ("_surrogates", "_known"):  # as in another process
        registry = {key: one for key, one in getattr(surrogate_module, name).items() if "mine" not in key}
        monkeypatch.setattr(surrogate_module, name, registry)
    register(new)
    loaded = pickle.loads(content)
    call = torch.compile(loaded, backend="aot_eager", fullgraph=True) if compiled else loaded
    torch.testing.assert_close(gradient(call), new(X, 0.25, 3.0))


def test_a_pickle_of_a_process_with_another_parameter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value would be dropped for the default of one that is called otherwise."""
    register(old)
    content = pickle.dumps(SUGAR(surrogate="mine"))
    for name in ("_surrogates", "_known"):  # as in another process
        registry = {key: one for key, one in getattr(surrogate_module, name).items() if "mine" not in key}
        monkeypatch.setattr(surrogate_module, name, registry)
    register_surrogate("mine", derivative=lambda x, c: torch.tanh(c * x).square(), c=1.0)
    with pytest.raises(ValueError, match=r"saved with another surrogate 'mine': .* has no a, b"):
        pickle.loads(content)


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = 5.0

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.a * x)


def test_a_parameter_that_only_the_old_formula_has_is_not_hidden_by_the_activation_before() -> None:
    register(old)
    held = get_surrogate("mine")
    register_surrogate("mine", derivative=lambda x, c: torch.tanh(c * x).square(), c=1.0, overwrite=True)
    model = timm_sugar.sugarize(nn.Sequential(nn.Identity(), Swish()), held, types=[Swish])
    assert model[1].a == 2.0
    model[1].a = 3.0
    torch.testing.assert_close(gradient(model), old(X, 3.0, 0.5))


PRECOMPILED = """
import sys, torch, timm_sugar
from torch import nn
torch._dynamo.config.caching_precompile = True
formulas = {"old": lambda x, a: torch.sigmoid(a * x), "new": lambda x, a: 3 * torch.sigmoid(-a * x)}
timm_sugar.register_surrogate("mine", derivative=formulas[sys.argv[1]], a=1.3)
model = nn.Sequential(nn.Identity(), timm_sugar.SUGAR(surrogate="mine"))
x = torch.linspace(-2, 2, 5, dtype=torch.float64, requires_grad=True)
print(*torch.autograd.grad(torch.compile(model)(x).sum(), x)[0].tolist())
torch.compiler.save_cache_artifacts()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch._dynamo.config, "caching_precompile"), reason="this torch keeps no such code")
def test_code_that_torch_kept_on_disk_is_not_that_of_another_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    runs = [
        subprocess.run([sys.executable, "-c", PRECOMPILED, name], capture_output=True, text=True, check=False)
        for name in ("old", "old", "new")
    ]
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    expected = [torch.sigmoid(1.3 * x)] * 2 + [3 * torch.sigmoid(-1.3 * x)]
    for run, slope in zip(runs, expected, strict=True):
        if run.returncode:  # PyTorch's own fault, which any module has whose guards differ from those on disk
            assert "already exists in scope" in run.stderr
            continue
        torch.testing.assert_close(torch.tensor([*map(float, run.stdout.split())], dtype=torch.float64), slope)
    assert runs[0].returncode == 0
