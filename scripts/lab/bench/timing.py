"""Measurements that noise does little to: interleaved repeats, medians and quartiles, ratios within one run.

Everything is a ratio of variants that were measured in turn in the same process, so that whatever else the machine
does meets all of them alike. (torch.utils.benchmark measures one variant after the other.)
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


class Quartiles(NamedTuple):
    """Quartiles of some measurements."""

    q1: float
    median: float
    q3: float


def rotations(names: Sequence[str], repeats: int) -> Iterator[list[str]]:
    """The order of each repeat: one place further each time, so that everything is first and last equally often."""
    for i in range(repeats):
        first = i % len(names)
        yield [*names[first:], *names[:first]]


def interleave(measures: Mapping[str, Callable[[], Result]], repeats: int) -> dict[str, list[Result]]:
    """What each measure returns in each repeat, all of them taking turns."""
    samples: dict[str, list[Result]] = {name: [] for name in measures}
    for order in rotations(list(measures), repeats):
        for name in order:
            samples[name].append(measures[name]())
    return samples


def quartiles(samples: Sequence[float]) -> Quartiles:
    """Median and quartiles, interpolated linearly; of a single sample that sample."""
    if len(samples) == 1:
        return Quartiles(samples[0], samples[0], samples[0])
    return Quartiles(*statistics.quantiles(samples, n=4, method="inclusive"))


def ratios(samples: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Each sample over the reference's of the same repeat."""
    return [sample / other for sample, other in zip(samples, reference, strict=True)]


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent p of the power law value = c * size**p that fits best on logarithmic axes (least squares).

    Raises statistics.StatisticsError for fewer than two different sizes.
    """
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(x) for x in values]).slope


def synchronize(device: str) -> None:
    """Wait for what a GPU was given to do."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def stopwatch(work: Callable[[], object], device: str = "cpu", calls: int = 1) -> Callable[[], float]:
    """A measure: the seconds that one call of `work` takes, on average over so many."""

    def measure() -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    return measure


def calls_for(work: Callable[[], object], device: str, least: float) -> int:
    """How many calls take at least so many seconds, going by the fastest of three. The first call is a warm-up."""
    stopwatch(work, device)()
    fastest = min(stopwatch(work, device)() for _ in range(3))
    return max(1, math.ceil(least / max(fastest, 1e-6)))


def stopwatches(works: Mapping[str, Callable[[], object]], device: str, least: float) -> dict[str, Callable[[], float]]:
    """A stopwatch for each of some works, with as many calls as take at least so many seconds."""
    return {name: stopwatch(work, device, calls_for(work, device, least)) for name, work in works.items()}


def kept_bytes(forward: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that `forward` allocates and that are still there when it has returned: its result, and what it keeps for
    the backward pass, in whatever way (saved tensors, hooks, compiled code). Warm up first.
    """
    kind = torch.device(device).type
    if kind != "cpu":
        allocated = torch.mps.current_allocated_memory if kind == "mps" else torch.accelerator.memory_allocated
        before = allocated()
        result = forward()
        return allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = forward()
    del result
    return sum(event.self_cpu_memory_usage for event in seen.events())


def most_bytes(work: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes in tensors at any moment of `work` that were not there before. Not on MPS, which doesn't tell."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


class Compilation(NamedTuple):
    """What torch.compile made of a function."""

    graph_breaks: int
    recompiles: int


def count_compilation(step: Callable[[], object], steps: int = 3) -> Compilation:
    """Graph breaks of the first call, and graphs that were compiled in the calls after it."""
    counters.clear()
    step()
    breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    for _ in range(steps - 1):
        step()
    return Compilation(breaks, counters["stats"]["unique_graphs"] - graphs)


def peak_bytes(device: str = "cpu") -> int:
    """The most memory that this process has held so far: on the GPU if the device is one, else in RAM."""
    kind = torch.device(device).type
    if kind == "mps":
        return torch.mps.driver_allocated_memory()  # never given back by itself, so this is the most
    if kind != "cpu":
        return torch.accelerator.max_memory_allocated(torch.device(device))
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss of a child starts at its parent's
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    import resource  # is missing on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """What an importable function returns in a process of its own, with as many threads as this one."""
    context = multiprocessing.get_context("spawn")
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=threads) as pool:
        return pool.submit(function, *arguments).result()
