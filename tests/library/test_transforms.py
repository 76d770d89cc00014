"""Derivatives of every order and mode, under every transform that PyTorch has, against FGI in float64."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from fgi import SETTINGS, injected, slope
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from timm_sugar import SUGAR, _compiled, _torch, sugar

func = torch.func
NAMES = sorted(SETTINGS)
X = torch.tensor([1.0, -0.5, 0.3, -2.0], dtype=torch.float64)
WEIGHT = torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4)
# What PyTorch's own transforms and compilers bring about.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning",
    "ignore:.*torch.jit:DeprecationWarning",  # torch 2.10
    "ignore:.*torch._prims_common.check:FutureWarning",
    "ignore:Attempted to insert a get_attr Node:UserWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)

Activation = Callable[..., Tensor]
Case = Callable[[Callable[[Tensor], Tensor], Tensor], Any]


def same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


# --- functions of a vector whose higher derivatives need the activation's value, its slope and the slope's slope


FUNCTIONS: dict[str, Callable[[Activation], Callable[[Tensor], Tensor]]] = {
    "square": lambda a: lambda t: a(t).square().sum(),
    "two_layers": lambda a: lambda t: (a(a(t @ WEIGHT) * t - 0.3) * t).sum(),
}


def directional(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return func.jvp(f, (x,), (torch.ones_like(x),))[1]


def hessian_vector(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    _, pull = func.vjp(func.grad(f), x)
    return pull(torch.linspace(1, 2, len(x), dtype=x.dtype))[0]


def backward_through_grad(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    func.grad(f)(leaf).square().sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def grad_of_grad_by_autograd(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf, create_graph=True)
    return torch.autograd.grad(second.square().sum(), leaf)[0]


def dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    assert tangent is not None
    return tangent


def forward_over_reverse(f: Callable[[Tensor], Tensor], x: Tensor, create_graph: bool = True) -> Tensor:
    with forward_ad.dual_level():
        leaf = forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x))
        (grad,) = torch.autograd.grad(f(leaf), leaf, create_graph=create_graph)
        tangent = forward_ad.unpack_dual(grad).tangent
    assert tangent is not None
    return tangent.detach()


def forward_over_the_backward_pass(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """As forward_over_reverse, but the level is opened after the forward pass, and gradients aren't recorded."""
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    with forward_ad.dual_level():
        (grad,) = torch.autograd.grad(y, leaf, forward_ad.make_dual(torch.ones_like(y), 3 * torch.ones_like(y)))
        tangent = forward_ad.unpack_dual(grad).tangent
    assert tangent is not None
    return tangent


def reverse_over_forward(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(dual(f, leaf), leaf)[0]


def func_grad_of_a_dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return dual(func.grad(f), x)


TRANSFORMS: dict[str, Case] = {
    "grad": lambda f, x: func.grad(f)(x),
    "func_grad_through_a_dual": lambda f, x: func.grad(lambda t: dual(f, t))(x),
    "jacrev_of_vmap_through_a_dual": lambda f, x: func.jacrev(lambda t: dual(func.vmap(f), torch.stack([t, 2 * t])))(x),
    "grad_of_grad_through_a_dual": lambda f, x: func.grad(func.grad(lambda s: dual(f, s * x)))(x[0]),
    "hessian": lambda f, x: func.hessian(f)(x),
    "jacrev_of_grad": lambda f, x: func.jacrev(func.grad(f))(x),
    "jacfwd_of_grad": lambda f, x: func.jacfwd(func.grad(f))(x),
    "jacrev_of_jacrev": lambda f, x: func.jacrev(func.jacrev(f))(x),
    "jacrev_of_jacfwd": lambda f, x: func.jacrev(func.jacfwd(f))(x),
    "jacfwd_of_jacfwd": lambda f, x: func.jacfwd(func.jacfwd(f))(x),
    "grad_of_grad": lambda f, x: func.grad(lambda t: func.grad(f)(t).square().sum())(x),
    "jvp_of_grad": lambda f, x: directional(func.grad(f), x),
    "hessian_vector": hessian_vector,
    "grad_of_jvp": lambda f, x: func.grad(lambda t: directional(f, t))(x),
    "jvp_of_jvp": lambda f, x: directional(lambda t: directional(f, t), x),
    "third_forward": lambda f, x: func.jacfwd(func.jacfwd(func.jacfwd(f)))(x),
    "third_reverse": lambda f, x: func.jacrev(func.jacrev(func.jacrev(f)))(x),
    "third_mixed": lambda f, x: func.jacfwd(func.jacrev(func.jacfwd(f)))(x),
    "vmap_of_hessian": lambda f, x: func.vmap(func.hessian(f))(torch.stack([x, 2 * x])),
    "hessian_of_vmap": lambda f, x: func.hessian(lambda t: func.vmap(f)(torch.stack([t, 2 * t])).sum())(x),
    "linearize": lambda f, x: func.linearize(f, x)[1](torch.ones_like(x)),
    "functionalize": lambda f, x: func.functionalize(func.grad(f))(x),
    "backward_through_grad": backward_through_grad,
    "grad_of_grad_by_autograd": grad_of_grad_by_autograd,
    "autograd_hessian": lambda f, x: torch.autograd.functional.hessian(f, x),
    "dual": dual,
    "forward_over_reverse": forward_over_reverse,
    "forward_over_reverse_alone": lambda f, x: forward_over_reverse(f, x, create_graph=False),
    "forward_over_the_backward_pass": forward_over_the_backward_pass,
    "reverse_over_forward": reverse_over_forward,
    "func_grad_of_a_dual": func_grad_of_a_dual,
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_nested_transforms_have_the_derivatives_of_forward_gradient_injection(transform: str, function: str) -> None:
    take, make = TRANSFORMS[transform], FUNCTIONS[function]
    expected = take(make(injected), X)
    same(take(make(sugar), X), expected)
    same(take(make(torch.fx.symbolic_trace(SUGAR())), X), expected)  # the operator


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_activations_that_are_large_enough_to_be_compiled(
    transform: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_compiled, "_CHUNK", 1)
    monkeypatch.setattr(_compiled, "_WORTHWHILE", 1)
    take, make = TRANSFORMS[transform], FUNCTIONS[function]
    same(take(make(sugar), X), take(make(injected), X))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transform", ["hessian", "jacfwd_of_jacfwd", "jacrev_of_jacrev"])
def test_second_derivatives_are_those_of_every_primitive(transform: str, name: str) -> None:
    results = []
    for activation in (sugar, injected):
        f = FUNCTIONS["two_layers"](lambda t, a=activation: a(t, name, **SETTINGS[name]))
        results.append(TRANSFORMS[transform](f, X))
    same(*results)


def test_hessian_of_a_square_by_hand() -> None:
    """d²(y²)/dx² = 2 (d² + y d'), with d the slope: the first term is lost if the levels below don't record."""
    h = 1e-6
    d, d2 = slope(X), (slope(X + h) - slope(X - h)) / (2 * h)
    got = func.hessian(lambda t: sugar(t).square().sum())(X)
    torch.testing.assert_close(got, torch.diag(2 * (d.square() + F.relu(X) * d2)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("of", ["weights", "data", "batches"])
def test_functional_inner_loop_of_meta_learning(of: str) -> None:
    def outer(activation: Activation, weight: Tensor, x: Tensor) -> Tensor:
        def inner(w: Tensor, shift: float) -> Tensor:
            return activation((x + shift) @ w).square().sum()

        for _ in range(3):
            weight = weight - 0.1 * func.grad(inner)(weight, 0.0)
        return inner(weight, 1.0)

    results = []
    for activation in (sugar, injected):
        gradient = func.grad(lambda w, x, a=activation: outer(a, w, x), argnums=int(of != "weights"))
        many = func.vmap(gradient, in_dims=(None, 0))
        results.append(many(WEIGHT, torch.stack([X, 2 * X])) if of == "batches" else gradient(WEIGHT, X))
    same(*results)


# --- gradients off, where forward mode and torch.func are not


FORWARD = ["jvp_of_jvp", "jacfwd_of_jacfwd", "third_forward"]
MODES = [(torch.no_grad, transform) for transform in ("dual", "linearize", *FORWARD)]
MODES += [  # in which PyTorch itself has no others
    pytest.param(torch.inference_mode, transform, marks=pytest.mark.needs_forward_mode_in_inference_mode)
    for transform in FORWARD
]


@pytest.mark.parametrize(("mode", "transform"), MODES)
def test_forward_mode_does_not_end_where_gradients_are_off(transform: str, mode: type[torch.no_grad]) -> None:
    f, expected = FUNCTIONS["square"], TRANSFORMS[transform](FUNCTIONS["square"](injected), X)
    with mode():
        same(TRANSFORMS[transform](f(sugar), X), expected)
        same(TRANSFORMS[transform](f(torch.fx.symbolic_trace(SUGAR())), X), expected)


def test_gradients_switched_off_inside_a_transform_are_off() -> None:
    @torch.no_grad()
    def f(x: Tensor) -> Tensor:
        return sugar(x).square().sum()

    assert func.grad(f)(X).eq(0).all()
    assert func.grad(lambda t: func.grad(lambda u: f(u) + (u * t).sum())(t).sum())(X).eq(1).all()


def test_a_vmap_without_gradients_is_relu() -> None:
    with torch.no_grad():
        assert torch.equal(func.vmap(sugar)(X), F.relu(X))


# --- compilers and tracers


COMPILED: dict[str, Case] = {
    "grad": lambda f, x: func.grad(f)(x),
    "jacrev": lambda f, x: func.jacrev(f)(x),
    "vmap_of_grad": lambda f, x: func.vmap(func.grad(f))(torch.stack([x, 2 * x])),
    "hessian": lambda f, x: func.hessian(f)(x),
    "jvp": directional,
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "vmap": lambda f, x: func.vmap(f)(torch.stack([x, 2 * x])),
}


@pytest.fixture
def compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor", marks=pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no g++")
        ),
    ],
)
@pytest.mark.parametrize("transform", COMPILED)
def test_transforms_inside_of_a_compiled_function(transform: str, backend: str, compiler: None) -> None:
    take, make = COMPILED[transform], FUNCTIONS["square"]
    compiled = torch.compile(lambda x: take(make(sugar), x), backend=backend, fullgraph=True)
    same(compiled(X), take(make(injected), X))


@pytest.mark.parametrize("transform", ["jvp", "jacfwd"])
@pytest.mark.parametrize("inside", [True, False])
def test_forward_mode_inside_of_a_compiled_function_without_gradients(
    transform: str, inside: bool, compiler: None
) -> None:
    def call(x: Tensor) -> Any:
        with torch.set_grad_enabled(not inside):
            return COMPILED[transform](FUNCTIONS["square"](sugar), x)

    with torch.set_grad_enabled(inside):
        got = torch.compile(call, backend="aot_eager", fullgraph=True)(X)
    same(got, COMPILED[transform](FUNCTIONS["square"](injected), X))


def test_a_compiled_function_under_a_transform_and_backward_through_one_inside(compiler: None) -> None:
    f = FUNCTIONS["square"]
    same(func.grad(torch.compile(f(sugar), backend="aot_eager"))(X), func.grad(f(injected))(X))
    gradient = torch.compile(lambda t: func.grad(f(sugar))(t), backend="aot_eager", fullgraph=True)
    leaf = X.clone().requires_grad_()
    same(torch.autograd.grad(gradient(leaf).square().sum(), leaf)[0], backward_through_grad(f(injected), X))


GRAPH = torch.fx.symbolic_trace(SUGAR())
ACTIVATIONS: dict[str, Activation] = {"function": sugar, "module": SUGAR(), "graph": GRAPH}


@pytest.mark.parametrize("of", ACTIVATIONS)
@pytest.mark.parametrize("gradients_on", [True, False])
def test_a_compiled_function_of_a_dual_tensor_has_the_surrogates_tangent_or_raises(
    gradients_on: bool, of: str, compiler: None
) -> None:
    """Dynamo leaves dual numbers to eager mode in torch 2.14; in 2.6 to 2.10 it would compile ReLU's tangent."""
    compiled = torch.compile(lambda t: ACTIVATIONS[of](t) * t, backend="aot_eager")
    expected = dual(lambda t: injected(t) * t, X)
    with torch.set_grad_enabled(gradients_on):
        compiled(X)  # and not what was compiled without a tangent
        if _torch._refuses_duals():
            same(dual(compiled, X), expected)
        else:
            with pytest.raises(RuntimeError, match="compiles no dual numbers"):
                dual(compiled, X)


IN_TRANSFORM = """
import sys, torch
import torch.autograd.forward_ad as forward_ad
from fgi import injected
from timm_sugar import sugar
X = torch.tensor([1.0, -0.5, 0.3, -2.0], dtype=torch.float64)
def dual(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(X, torch.ones_like(X)))).tangent
make = {
    "grad": lambda a: lambda t: torch.func.grad(lambda u: (a(u) * u).sum())(t),
    "vmap": lambda a: lambda t: torch.func.vmap(a)(t) * t,
}[sys.argv[1]]
expected = dual(make(injected))
try:
    tangent = dual(torch.compile(make(sugar), backend="aot_eager"))
except RuntimeError as error:
    print("raises", error)
else:
    torch.testing.assert_close(tangent, expected)
"""


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transforms_of_a_dual_tensor_in_a_compiled_function_have_its_tangent_or_raise(transform: str) -> None:
    """In a process of its own: PyTorch doesn't leave its transforms when a compiler raises in them."""
    command = [sys.executable, "-W", "ignore", "-c", IN_TRANSFORM, transform]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("gradients_on", [True, False])
def test_forward_mode_that_begins_inside_of_a_compiled_function(gradients_on: bool, compiler: None) -> None:
    def inside(x: Tensor) -> Tensor:
        return dual(lambda t: sugar(t) * t, x)

    with torch.set_grad_enabled(gradients_on):
        got = torch.compile(inside, backend="aot_eager")(X)
    same(got, dual(lambda t: injected(t) * t, X))


@pytest.mark.parametrize("kind", ["eager", "operator"])
def test_compiled_autograd_over_an_eager_forward_pass(kind: str, compiler: None) -> None:
    activation = sugar if kind == "eager" else torch.fx.symbolic_trace(SUGAR())
    leaf = X.clone().requires_grad_()
    loss = FUNCTIONS["two_layers"](activation)(leaf)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward()
    same(leaf.grad, func.grad(FUNCTIONS["two_layers"](injected))(X))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [True, False])
def test_make_fx_of_a_forward_pass_keeps_the_surrogates_gradient(mode: str, pre_dispatch: bool) -> None:
    f = FUNCTIONS["square"]
    graph = make_fx(f(sugar), tracing_mode=mode, pre_dispatch=pre_dispatch)(X)
    same(func.hessian(graph)(X), func.hessian(f(injected))(X))


@pytest.mark.parametrize("of", ["func", "autograd"])
def test_make_fx_of_a_gradient_is_the_gradient_and_can_be_differentiated(of: str) -> None:
    def by_autograd(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(FUNCTIONS["two_layers"](sugar)(leaf), leaf)[0]

    traced = make_fx(by_autograd if of == "autograd" else func.grad(FUNCTIONS["two_layers"](sugar)))(X)
    same(traced(X), func.grad(FUNCTIONS["two_layers"](injected))(X))
    if of == "func":
        same(func.jacrev(traced)(X), func.hessian(FUNCTIONS["two_layers"](injected))(X))


@pytest.mark.parametrize("strict", [True, False])
def test_a_decomposed_program_that_was_exported_with_gradients_keeps_the_surrogates(
    strict: bool, compiler: None
) -> None:
    module = nn.Sequential(nn.Linear(4, 4), SUGAR(surrogate="nelu", alpha=0.3), nn.Linear(4, 4), SUGAR()).double()
    program = torch.export.export(module, (X,), strict=strict).run_decompositions()
    a, b = module[0], module[2]
    expected = func.grad(lambda t: injected(b(injected(a(t), "nelu", alpha=0.3))).square().sum())(X)
    same(func.grad(lambda t: program.module()(t).square().sum())(X), expected)


def test_make_fx_without_gradients_holds_relu_only() -> None:
    with torch.no_grad():
        graph = make_fx(SUGAR())(X)
    assert {node.target for node in graph.graph.nodes if node.op == "call_function"} == {torch.ops.aten.relu.default}


# --- tensors that are no dense matrix of numbers


def jagged() -> Tensor:
    parts = [torch.randn(3, 4), torch.randn(5, 4)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


@pytest.mark.filterwarnings("ignore:.*prototype.*", "ignore:.*beta state.*")
@pytest.mark.parametrize(
    "make",
    [
        jagged,
        lambda: torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], requires_grad=True),
        lambda: torch.eye(3).to_sparse().requires_grad_(),
        lambda: torch.eye(3).to_sparse_csr().requires_grad_(),
    ],
)
def test_layouts_without_a_gradient_are_refused_in_the_forward_pass_if_one_is_asked_for(make: Any) -> None:
    x = make()
    with pytest.raises(TypeError, match=r"no gradient for a tensor of layout .*: call it on the values inside"):
        sugar(x)
    with torch.no_grad():
        assert type(sugar(x)) is type(F.relu(x))
    sugar(x.detach())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_input_is_told_of_to_relu() -> None:
    with pytest.raises(TypeError, match="to_relu"):
        sugar(torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8))


@pytest.mark.parametrize("save_memory", [True, False])
def test_a_network_on_an_empty_batch_has_the_gradients_of_relu(save_memory: bool) -> None:
    torch.manual_seed(0)
    conv, head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def run(activation: Activation) -> list[Tensor]:
        y = F.max_pool2d(activation(conv(torch.empty(0, 3, 8, 8))), 2)
        y = activation(head(activation(y).mean((2, 3))))
        return list(torch.autograd.grad(y.sum(), [*conv.parameters(), *head.parameters()]))

    same(run(lambda x: sugar(x, save_memory=save_memory)), run(F.relu))


# --- threads


@pytest.mark.needs_compiled_gradient
def test_threads_that_meet_their_first_large_activation_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them compiles, or waits for the one that does; the compiler is not made for two at a time."""
    running, most, made = 0, 0, []

    def compile_graph(graph: Any, examples: list[Tensor]) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        threading.Event().wait(0.05)
        running -= 1
        made.append(examples[0].dtype)
        return graph

    monkeypatch.setattr(_torch, "compile_graph", compile_graph)
    monkeypatch.setattr(_compiled, "_kernels", {})
    monkeypatch.setattr(_compiled, "_CHUNK", 7)
    monkeypatch.setattr(_compiled, "_WORTHWHILE", 7)
    start, grads = threading.Barrier(8), {}

    def work(index: int) -> None:
        x = torch.linspace(-3, 3, 64, requires_grad=True)
        start.wait()
        (grads[index],) = torch.autograd.grad(sugar(x).sum(), x)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, made) == (1, [torch.float32])
    for grad in grads.values():
        torch.testing.assert_close(grad, slope(torch.linspace(-3, 3, 64)).float())
    assert len(grads) == 8
