"""The loss of a model around its weights, along random directions (Li et al. 2018, arXiv 1712.09913)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def direction(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """A random direction in the space of the weights, each of its filters as long as the filter of the model.

    A filter is a slice w[i] of a weight of two or more dimensions; biases and the weights of normalisation stay.
    """
    result = {}
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            rest = list(range(1, weight.ndim))
            lengths = weight.detach().square().sum(rest, keepdim=True).sqrt()
            result[name] = noise * lengths / noise.square().sum(rest, keepdim=True).sqrt()
    return result


@torch.no_grad()
def landscape(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: Sequence[float],
    *,
    seed: int = 0,
    criterion: Callable[[Any, Any], Tensor] = F.cross_entropy,
    progress: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Mean loss over `batches` at weights + steps[i] * d1 + steps[j] * d2, shape (len(steps), len(steps)).

    d1 and d2 are two `direction`s drawn with the seed, so that models of one architecture are moved alike. The model is
    in eval mode meanwhile, and left as it was. `batches` is gone through for each point; `criterion` gives the mean of
    a batch. `progress` is told how many points are done. Raises ValueError if there are no batches.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = direction(model, generator), direction(model, generator)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters() if name in first}
    modes = [(module, module.training) for module in model.modules()]
    losses = torch.zeros(len(steps), len(steps), dtype=torch.float64)
    try:
        model.eval()
        for point in range(losses.numel()):
            i, j = divmod(point, len(steps))
            for name, weight in model.named_parameters():
                if name in start:
                    weight.copy_(start[name] + steps[i] * first[name] + steps[j] * second[name])
            losses[i, j] = _mean_loss(model, batches, criterion)
            progress(point + 1)
    finally:
        for name, weight in model.named_parameters():
            if name in start:
                weight.copy_(start[name])
        for module, mode in modes:
            module.training = mode
    return losses


def _mean_loss(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], criterion: Any) -> float:
    total, count = 0.0, 0
    for x, target in batches:
        total += criterion(model(x), target).item() * len(x)
        count += len(x)
    if not count:
        raise ValueError("no batches to compute a loss on")
    return total / count
