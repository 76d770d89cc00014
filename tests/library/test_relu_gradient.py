"""`relu_gradient()`: inside it SUGAR has ReLU's own derivative, for attributions and attacks."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from fgi import slope
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import timm_sugar
from timm_sugar import SUGAR, sugar
from timm_sugar.activation import relu_gradient

X = torch.tensor([-2.0, -0.0, 0.0, 0.5, 3.0], dtype=torch.float64)


def gradient(call: Callable[[Tensor], Tensor], x: Tensor = X) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(call(leaf).sum(), leaf)[0]


@pytest.mark.parametrize("upstream", [torch.inf, torch.nan])
def test_where_relu_has_no_gradient_none_comes_through_not_even_of_infinity(upstream: float) -> None:
    """As where the square root or the logarithm of an activation is taken."""
    leaf, direction = X.clone().requires_grad_(), torch.full_like(X, upstream)
    (expected,) = torch.autograd.grad(F.relu(leaf), leaf, direction)
    for call in (sugar, torch.fx.symbolic_trace(SUGAR())):
        with relu_gradient():
            (found,) = torch.autograd.grad(call(leaf), leaf, direction)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def compiler() -> None:
    torch.compiler.reset()


ROUTES: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "eager": lambda m: m,
    "shared": lambda m: lambda x: SUGAR(save_memory=True)(x * 1),
    "function": lambda m: sugar,
    "fx": torch.fx.symbolic_trace,
    "export": lambda m: torch.export.export(m, (X,)).module(),
    "func": lambda m: lambda x: torch.func.vmap(m)(x[None]),
    "compiled": lambda m: torch.compile(m, backend="aot_eager", fullgraph=True),
}


@pytest.mark.parametrize("route", ROUTES)
def test_inside_it_is_relus_gradient_and_outside_the_surrogates(route: str, compiler: None) -> None:
    call = ROUTES[route](SUGAR())
    torch.testing.assert_close(gradient(call), slope(X))
    with relu_gradient():
        torch.testing.assert_close(gradient(call), gradient(F.relu), rtol=0, atol=0)
    torch.testing.assert_close(gradient(call), slope(X))


def test_a_sparse_gradient_passes_inside_and_outside() -> None:
    """As that of an embedding whose weights went through an activation."""
    rows, weights = torch.tensor([0, 2]), torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3).requires_grad_()

    def of(function: Callable[[Tensor], Tensor]) -> Tensor:
        loss = F.embedding(rows, function(weights), sparse=True).pow(2).sum()
        return torch.autograd.grad(loss, weights)[0].to_dense()

    upstream = 2 * F.relu(weights) * torch.tensor([[1.0], [0.0], [1.0]])  # F.relu itself takes no sparse one
    with relu_gradient():
        torch.testing.assert_close(of(sugar), upstream * (weights > 0))
    torch.testing.assert_close(of(sugar), upstream * slope(weights))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")  # PyTorch's own forward mode
def test_is_relus_for_extremes_too_and_under_torch_func() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-300], dtype=torch.float64)
    with relu_gradient():
        assert torch.equal(gradient(sugar, x), gradient(F.relu, x))
        assert torch.equal(torch.func.grad(lambda t: sugar(t).sum())(X), gradient(F.relu))
        assert torch.func.hessian(lambda t: sugar(t).sum())(X).eq(0).all()
        assert torch.equal(torch.func.jvp(sugar, (X,), (torch.ones_like(X),))[1], gradient(F.relu))


@pytest.mark.slow
def test_integrated_gradients_add_up_to_the_difference_of_outputs() -> None:
    """Completeness (arXiv 1703.01365), which holds for the gradient of what the model computes and for no other."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet_sugar").double().eval()
    image, blank = torch.randn(1, 3, 32, 32).double(), torch.zeros(1, 3, 32, 32).double()

    def attributions() -> Tensor:
        total = torch.zeros_like(image)
        for step in range(256):
            point = (blank + (step + 0.5) / 256 * (image - blank)).requires_grad_()
            total += torch.autograd.grad(model(point)[0, 3], point)[0] / 256
        return (total * (image - blank)).sum()

    with torch.no_grad():
        difference = (model(image) - model(blank))[0, 3]
    with relu_gradient():
        torch.testing.assert_close(attributions(), difference, rtol=1e-2, atol=1e-4)
    assert not torch.isclose(attributions(), difference, rtol=0.1)


def test_gradients_are_those_of_the_deployed_model() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_convnext_sugar").double()
    deployed = timm_sugar.to_relu(copy.deepcopy(model))
    image = torch.randn(1, 3, 64, 64).double()
    with relu_gradient():
        torch.testing.assert_close(gradient(model, image), gradient(deployed, image))


@pytest.mark.parametrize("recomputed_inside", [True, False])
def test_what_is_recomputed_keeps_the_derivative_of_its_first_run(recomputed_inside: bool) -> None:
    leaf = X.clone().requires_grad_()

    def loss() -> Tensor:
        return checkpoint(sugar, leaf, use_reentrant=False).sum()

    if recomputed_inside:
        total = loss()
        with relu_gradient():
            total.backward()
        torch.testing.assert_close(leaf.grad, slope(X))
    else:
        with relu_gradient():
            total = loss()
        total.backward()
        torch.testing.assert_close(leaf.grad, gradient(F.relu))


def test_another_thread_and_another_task_are_not_inside() -> None:
    entered, done, found = threading.Event(), threading.Event(), []

    def outside() -> None:
        entered.wait(10)
        found.append(gradient(SUGAR()))
        done.set()

    thread = threading.Thread(target=outside)
    thread.start()
    with relu_gradient():
        entered.set()
        done.wait(10)
    thread.join()
    torch.testing.assert_close(found[0], slope(X))

    async def tasks() -> list[Tensor]:
        async def inside() -> Tensor:
            with relu_gradient():
                await asyncio.sleep(0.01)
                return gradient(sugar)

        async def beside() -> Tensor:
            await asyncio.sleep(0.005)
            return gradient(sugar)

        return await asyncio.gather(inside(), beside())

    inside, beside = asyncio.run(tasks())
    torch.testing.assert_close(inside, gradient(F.relu))
    torch.testing.assert_close(beside, slope(X))


def test_an_error_inside_ends_it() -> None:
    with pytest.raises(ZeroDivisionError), relu_gradient():
        _ = 1 / 0
    torch.testing.assert_close(gradient(sugar), slope(X))


def test_compiled_code_that_enters_it_is_refused(compiler: None) -> None:
    @torch.compile(backend="eager")
    def step(x: Tensor) -> Tensor:
        with relu_gradient():
            return sugar(x)

    with pytest.raises(RuntimeError, match="outside of the compiled function"):
        step(X.clone().requires_grad_())


def test_a_compiled_network_has_relus_gradient_inside_though_it_was_compiled_outside(compiler: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), SUGAR(), nn.Linear(7, 3), SUGAR()).double()
    compiled = torch.compile(model, backend="aot_eager")
    plain = timm_sugar.to_relu(copy.deepcopy(model))
    outside = gradient(compiled)
    with relu_gradient(), relu_gradient():
        torch.testing.assert_close(gradient(compiled), gradient(plain))
    torch.testing.assert_close(gradient(compiled), outside)


def slopes() -> Tensor:
    return slope(X.clamp(-60, 60))


def test_nothing_is_compiled_inside_so_that_no_cache_holds_relus_gradient(compiler: None) -> None:
    """The block is no part of the key of a cache, from which later processes would read, too."""
    compiled = torch.compile(lambda x: sugar(x), backend="aot_eager")
    with (
        relu_gradient(),
        torch.compiler.set_stance("default"),
        pytest.raises(RuntimeError, match=r"nothing is compiled inside of relu_gradient\(\)"),
    ):
        gradient(compiled)
    torch.testing.assert_close(gradient(compiled), slopes())
    torch.testing.assert_close(gradient(torch.compile(lambda x: sugar(x), backend="aot_eager")), slopes())


@pytest.mark.parametrize("compiles", [False, True])
def test_a_task_that_outlives_the_block_in_which_it_began_has_the_surrogates_gradient(
    compiles: bool, compiler: None
) -> None:
    call: Any = torch.compile(sugar, backend="aot_eager") if compiles else sugar
    found = {}

    async def wait(end: asyncio.Event) -> None:
        found["inside"] = gradient(sugar)
        await end.wait()
        found["after"] = gradient(call)

    async def begin() -> None:
        end = asyncio.Event()
        with relu_gradient():
            task = asyncio.create_task(wait(end))
            await asyncio.sleep(0)
        end.set()
        await task

    asyncio.run(begin())
    torch.testing.assert_close(found["inside"], (X > 0).double())
    torch.testing.assert_close(found["after"], slopes())


def test_a_context_that_was_copied_inside_is_outside_after_the_block() -> None:
    with relu_gradient():
        context = contextvars.copy_context()
        torch.testing.assert_close(context.run(gradient, sugar), (X > 0).double())
    torch.testing.assert_close(context.run(gradient, sugar), slopes())


def block() -> Iterator[None]:
    with relu_gradient():
        yield


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_blocks_of_generators_that_end_in_any_order_leave_nothing(order: tuple[int, int]) -> None:
    blocks: Any = (block(), block())
    for one in blocks:
        next(one)
    for index in order:
        blocks[index].close()
    torch.testing.assert_close(gradient(sugar), slopes())
    torch.testing.assert_close(gradient(torch.compile(sugar, backend="aot_eager")), slopes())


def test_a_generator_that_is_closed_in_another_context_ends_its_block() -> None:
    one: Any = block()
    context = contextvars.copy_context()
    context.run(next, one)
    one.close()
    torch.testing.assert_close(context.run(gradient, sugar), slopes())
    torch.testing.assert_close(gradient(torch.compile(sugar, backend="aot_eager")), slopes())
