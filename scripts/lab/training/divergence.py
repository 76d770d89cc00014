"""A run whose loss is not finite: it ends with an exit status of its own, so that a table can count it and go on."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

STATUS = 3  # exit status of scripts/train.py and scripts/train_tabular.py


class Diverged(Exception):
    """Training can't go on; the message is one line that says when that happened and what to try."""


def diverged(loss: float, when: str) -> Diverged:
    """The error for a loss that is not finite."""
    return Diverged(f"the loss is {loss} {when}: try a lower --lr, a longer warm-up or --clip-grad 1")


def all_finite(losses: Iterable[float], weights: Iterable[Tensor]) -> bool:
    """Whether losses and weights are finite: after the last update of an epoch no loss tells of the weights."""
    return all(map(math.isfinite, losses)) and all(bool(weight.isfinite().all()) for weight in weights)
