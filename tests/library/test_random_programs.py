"""Random programs of some 40 operations against FGI in float64, in four ways of going backward.

`make test` runs 300 of them and `make test-all` 2,000; `TIMM_SUGAR_PROGRAMS=50000 make test-all` runs so many.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fgi import SETTINGS as ALL
from fgi import injected
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from timm_sugar import _saved_tensors, sugar

FEW, MANY = 300, int(os.environ.get("TIMM_SUGAR_PROGRAMS", "2000"))
LENGTH = 40
# Not those with a jump or a kink: near it the two differ by rounding.
SETTINGS = {name: ALL[name] for name in ("bsilu", "gelu", "silu", "mish")}
Activation = Callable[[Tensor, str], Tensor]
Operation = Callable[[list[Tensor], random.Random, Activation, list[Tensor]], Tensor]


def ours(x: Tensor, name: str) -> Tensor:
    return sugar(x, name, save_memory=True, **SETTINGS[name])


def theirs(x: Tensor, name: str) -> Tensor:
    return injected(x, name, **SETTINGS[name])


def activate(values: list[Tensor], dice: random.Random, act: Activation, weights: list[Tensor]) -> Tensor:
    return act(dice.choice(values), dice.choice(sorted(SETTINGS)))


def activate_twice(values: list[Tensor], dice: random.Random, act: Activation, weights: list[Tensor]) -> Tensor:
    name = dice.choice(sorted(SETTINGS))
    return act(act(values[-1], name) @ dice.choice(weights), name)


def recompute(values: list[Tensor], dice: random.Random, act: Activation, weights: list[Tensor]) -> Tensor:
    weight, name = dice.choice(weights), dice.choice(sorted(SETTINGS))
    inner = checkpoint(lambda x: act(x @ weight, name), dice.choice(values), use_reentrant=False)
    assert isinstance(inner, Tensor)
    return inner


def overwrite(values: list[Tensor], dice: random.Random, act: Activation, weights: list[Tensor]) -> Tensor:
    y = act(dice.choice(values) * 1, dice.choice(sorted(SETTINGS)))
    return dice.choice([y.add_, y.mul_])(0.5) @ dice.choice(weights)


def overwrite_a_part(values: list[Tensor], dice: random.Random, act: Activation, weights: list[Tensor]) -> Tensor:
    y = act(dice.choice(values) * 1, dice.choice(sorted(SETTINGS)))
    y[1:].mul_(0.5)
    return y @ dice.choice(weights)


# What an operation draws at random must not depend on what it computes: both activations run the same program.
OPERATIONS: list[Operation] = [
    *[activate] * 6,
    *[activate_twice] * 3,
    recompute,
    overwrite,
    overwrite_a_part,
    lambda v, d, a, w: d.choice(v) @ d.choice(w),
    lambda v, d, a, w: v[-1] @ d.choice(w),
    lambda v, d, a, w: F.linear(v[-1], d.choice(w), d.choice(w)[0]),
    lambda v, d, a, w: d.choice(v) + d.choice(v),
    lambda v, d, a, w: torch.tanh(d.choice(v)) * d.choice(v),
    lambda v, d, a, w: F.layer_norm(d.choice(v), (4,)),
    lambda v, d, a, w: d.choice(v).t().contiguous().t(),
    lambda v, d, a, w: d.choice(v).flip(0),
    lambda v, d, a, w: d.choice(v).view(2, 2, 4).transpose(0, 1).reshape(4, 4),
    lambda v, d, a, w: torch.cat([d.choice(v)[:2], d.choice(v)[2:]]),
    lambda v, d, a, w: d.choice(v).detach() + d.choice(v),
    lambda v, d, a, w: d.choice(v).softmax(-1) @ d.choice(v),
    lambda v, d, a, w: d.choice(v).mean(0, keepdim=True).expand(4, 4),
]


def execute(seed: int, act: Activation, x: Tensor, weights: list[Tensor]) -> Tensor:
    dice = random.Random(seed)
    values = [x]
    for _ in range(LENGTH):
        values.append(torch.tanh(dice.choice(OPERATIONS)(values, dice, act, weights)) + 0.1 * x)
    return torch.stack(values[-5:]).square().sum()


def backward(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    loss.backward()
    return [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]


def grad(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def twice(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    return grad(loss, leaves)


def second(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    options = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(loss, leaves, create_graph=True, **options)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves, **options))


MODES = [backward, grad, twice, second]


def leaves(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(4)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seeds", [range(FEW), pytest.param(range(FEW, MANY), marks=pytest.mark.slow)], ids=len)
def test_random_programs_have_the_gradients_of_forward_gradient_injection(
    seeds: range, mode: Callable[[Tensor, list[Tensor]], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_saved_tensors, "_LEAST", 0)
    for seed in seeds[MODES.index(mode) :: len(MODES)]:
        results = []
        for act in (ours, theirs):
            inputs = leaves(seed)
            loss = execute(seed, act, inputs[0], inputs[1:])
            results.append([loss.detach(), *mode(loss, inputs)])
        torch.testing.assert_close(
            *results, rtol=1e-6, atol=1e-8, msg=lambda text, seed=seed: f"program {seed}: {text}"
        )
