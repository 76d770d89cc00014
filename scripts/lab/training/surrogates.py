"""Parameters of surrogates that change over a training run: the option --surrogate-schedule."""

from __future__ import annotations

import argparse
from typing import Any

from torch import nn

from lab.cli import explained
from timm_sugar import SurrogateSchedule


def build_surrogate_schedules(args: argparse.Namespace, model: nn.Module, updates: int) -> list[SurrogateSchedule]:
    """One schedule for each parameter that --surrogate-schedule names; `updates` are those of the whole run."""
    schedules = []
    for name, text in args.surrogate_schedule.items():
        with explained(f"--surrogate-schedule {name}={text} (expected e.g. alpha=cosine:1.67:0.1)"):
            shape, first, last = str(text).split(":")
            pair: Any = {name: (float(first), float(last))}
            schedules.append(SurrogateSchedule(model, updates=updates, shape=shape, **pair))
    return schedules


def values_in_force(schedules: list[SurrogateSchedule]) -> dict[str, float]:
    """What the model would have to be created with to have the values that it has now."""
    return {name: value for schedule in schedules for name, value in schedule.values().items()}
