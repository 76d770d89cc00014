#!/usr/bin/env python3
"""Check that every `<name>_sugar` architecture is a SUGAR network through and through.

    python scripts/sweep.py                          # all of them; about ten minutes on two cores
    python scripts/sweep.py --filter 'convnext*' --jobs 1

Each architecture is built on the meta device, which holds shapes and no numbers, and run forward in train mode and
through forward_intermediates(). It must build as its base does, keep the base's state_dict, and compute no hidden
activation but SUGAR: neither in a module nor in a function call nor as a product x * g(x). Architectures that
timm_sugar leaves out must fail in the way that is written down for them. One line per failure; exit status 1 if there
are any.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_sugar import SUGAR, sugarize
from timm_sugar._places import is_activation, is_activation_function
from timm_sugar.activation import FunctionalSUGAR
from timm_sugar.models import sugar as models

# forward_intermediates() of these reads numbers from tensors, which meta has none of, unless it is asked like this.
INTERMEDIATES_ON_META = {"gemma4_vit*": {"output_fmt": "NLC"}}
# An LSTM is slow on the meta device, a step of Python for each position: these get images of this many pixels a side.
IMAGE_SIZE = {"sequencer2d_*": 32}

aten = torch.ops.aten
_ALWAYS = {
    *(aten.relu_, aten.relu6, aten.gelu, aten.gelu_, aten.silu, aten.silu_, aten.hardswish, aten.hardswish_),
    *(aten.mish, aten.mish_, aten.elu, aten.elu_, aten.leaky_relu, aten.leaky_relu_, aten.rrelu_with_noise),
    *(aten.threshold, aten.threshold_, aten.maximum),
}
_CLAMPS = {aten.clamp, aten.clamp_, aten.clamp_min, aten.clamp_min_, aten.hardtanh, aten.hardtanh_}
_CURVES = {
    aten.sigmoid,
    aten.sigmoid_,
    aten.tanh,
    aten.hardsigmoid,
    aten.hardsigmoid_,
    aten.softplus,
    aten.erf,
} | _CLAMPS
_LINEAR = {aten.mul, aten.mul_, aten.div, aten.div_, aten.add, aten.add_, aten.neg, aten._to_copy}
_SUGAR_CODE = {SUGAR.forward.__code__, FunctionalSUGAR.forward.__code__}


class ActivationFinder(TorchDispatchMode):
    """Collects the hidden activations that a forward pass computes outside SUGAR, as `found`: {operator: source line}.

    A product x * g(x), where g is a curve such as the sigmoid and is applied element by element, is found too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.origins: dict[int, tuple[Tensor, set[int], bool]] = {}  # by id: tensor, what it is made of, is it curved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        result = func(*args, **(kwargs or {}))
        if packet in (aten.mul, aten.mul_) and self._is_self_gate(*args[:2]):
            self._report("x * g(x)")
        if packet is aten.relu or packet in _ALWAYS or (packet in _CLAMPS and _starts_at_zero(*args, **(kwargs or {}))):
            self._report(packet.__name__)
        elif (packet in _CURVES or packet in _LINEAR) and isinstance(result, Tensor):
            self._follow(packet, args, result)
        return result

    def _report(self, what: str) -> None:
        frames = [(frame.f_code, line) for frame, line in traceback.walk_stack(None)]
        if any(code in _SUGAR_CODE for code, _ in frames):
            return
        where = next((f"{code.co_filename}:{line}" for code, line in frames if "/timm/" in code.co_filename), "?")
        self.found.setdefault(what, "timm/" + where.partition("/timm/")[2])

    def _made_of(self, x: Any) -> tuple[set[int], bool]:
        _, origin, curved = self.origins.get(id(x), (x, {id(x)}, False))
        return (origin, curved) if isinstance(x, Tensor) else (set(), False)

    def _is_self_gate(self, a: Any, b: Any) -> bool:
        (of_a, curved_a), (of_b, curved_b) = self._made_of(a), self._made_of(b)
        return bool(of_a & of_b) and (curved_a or curved_b)

    def _follow(self, packet: Any, args: Any, result: Tensor) -> None:
        """Remember which tensors of the same shape a result was computed from, element by element."""
        made_of, curved = {id(result)}, packet in _CURVES
        for x in args:
            if isinstance(x, Tensor) and x.shape == result.shape:
                made_of, curved = made_of | self._made_of(x)[0], curved or self._made_of(x)[1]
                self.origins.setdefault(id(x), (x, {id(x)}, False))  # kept alive, so that its id stays its own
        self.origins[id(result)] = (result, made_of, curved)


def _starts_at_zero(x: Tensor, low: Any = None, *_: Any, **kwargs: Any) -> bool:
    low = kwargs.get("min", kwargs.get("min_val", low))
    return x.is_floating_point() and isinstance(low, (int, float)) and low == 0


def _activations_left(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if is_activation(module) and not isinstance(module, SUGAR):
            yield f"{name} is still a {type(module).__name__}"
        for key, value in vars(module).items():
            if is_activation_function(value):
                yield f"{name}.{key} is still the function {getattr(value, '__name__', value)}"


def _passes(model: Any, base: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Run the model; for each way to run it, what ActivationFinder found."""
    channels, *size = model.pretrained_cfg["input_size"]
    size = next(([side, side] for glob, side in IMAGE_SIZE.items() if fnmatch.fnmatchcase(base, glob)), size)
    images = torch.empty(2, channels, *size, device="meta")  # two, as batch normalisation trains on no fewer
    with ActivationFinder() as finder:
        model.train()(images)
    yield "forward", finder.found
    if hasattr(model, "forward_intermediates"):
        with ActivationFinder() as finder, torch.no_grad():
            model.eval().forward_intermediates(images, **_intermediates_arguments(base))
        yield "forward_intermediates", finder.found


def _intermediates_arguments(base: str) -> dict[str, str]:
    return next((args for glob, args in INTERMEDIATES_ON_META.items() if fnmatch.fnmatchcase(base, glob)), {})


def _forward_problems(model: nn.Module, base: str) -> Iterator[str]:
    try:
        for way, found in _passes(model, base):
            for operator, where in found.items():
                yield f"{way} computes {operator} outside SUGAR, at {where}"
    except Exception as error:
        yield f"does not run: {type(error).__name__}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def check(base: str, name: str) -> list[str]:
    """Build an architecture and its base, compare them, and run it; what is wrong with it, one line for each thing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = timm.create_model(name, device="meta")
        except Exception as error:
            return [f"does not build: {type(error).__name__}: {_one_line(error)}"]
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    expected = {key: value.shape for key, value in timm.create_model(base, device="meta").state_dict().items()}
    problems = list(_activations_left(model))
    problems += [str(warning.message) for warning in caught if "sugarize() left" in str(warning.message)]
    if not any(isinstance(module, SUGAR) for module in model.modules()):
        problems.append("has no SUGAR activation")
    if shapes != expected:
        differing = sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))
        problems.append(f"state_dict differs from that of {base}: {', '.join(differing[:5])}")
    return problems + list(_forward_problems(model, base))


def check_left_out(base: str, reason: str) -> list[str]:
    """Whether a left-out architecture really has a fault, and in the place that the reason names."""
    model = timm.create_model(base, device="meta")
    with contextlib.suppress(ValueError):  # nothing to replace: its activations are elsewhere, as the pass has to show
        sugarize(model)
    found = [problem for problem in _forward_problems(model, base) if "outside SUGAR" in problem]
    if not found:
        return [f"LEFT_OUT is stale: no activation outside SUGAR in {base} ({reason})"]
    late = all(problem.startswith("forward_intermediates") for problem in found)
    if late != ("forward_intermediates" in reason):
        return [f"LEFT_OUT gives another reason ({reason}) than {found[0]}"]
    return []


def _check_one(task: tuple[str, str, str]) -> tuple[str, float, list[str]]:
    base, name, reason = task
    start = time.perf_counter()
    problems = check_left_out(base, reason) if reason else check(base, name)
    return name, time.perf_counter() - start, problems


def _start_worker() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the base models, about themselves


def registry_problems(bases: list[str]) -> Iterator[str]:
    """Whether exactly the architectures of timm that aren't left out are registered, and every exception is needed."""
    registered = {name for name in timm.list_models() if name.endswith(models.SUFFIX)}
    wanted = {base + models.SUFFIX for base in bases if not models.is_left_out(base)}
    wanted |= {alias + models.SUFFIX for alias in models.ALIASES}
    for name in sorted(wanted - registered):
        yield f"{name}: not registered"
    for name in sorted(registered - wanted):
        yield f"{name}: registered, though it is left out or has no base"
    for table, patterns in (
        ("LEFT_OUT", models.LEFT_OUT),
        ("IMAGE_SIZE", IMAGE_SIZE),
        ("INTERMEDIATES_ON_META", INTERMEDIATES_ON_META),
    ):
        for pattern in patterns:
            if not fnmatch.filter(bases, pattern):
                yield f"{pattern}: {table} is stale, as timm has no such architecture"


def _tasks(bases: list[str], pattern: str) -> list[tuple[str, str, str]]:
    """(base, name, reason why it is left out or '') of everything to check."""
    reasons = {base: why for glob, why in models.LEFT_OUT.items() for base in fnmatch.filter(bases, glob)}
    tasks = [(base, base + models.SUFFIX, reasons.get(base, "")) for base in bases]
    tasks += [(base, alias + models.SUFFIX, "") for alias, base in models.ALIASES.items()]
    return [task for task in tasks if fnmatch.fnmatchcase(task[1], pattern) or fnmatch.fnmatchcase(task[0], pattern)]


def _run(tasks: list[tuple[str, str, str]], jobs: int) -> tuple[int, dict[str, float]]:
    """Check everything, printing as it goes; the number of failures and the seconds that each took."""
    failures, seconds, start = 0, {}, time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_start_worker) as pool:
        for done, (name, took, problems) in enumerate(pool.map(_check_one, tasks, chunksize=4), start=1):
            seconds[name] = took
            failures += bool(problems)
            for problem in problems:
                print(f"FAILED {name}: {problem}", flush=True)
            if done % 100 == 0 or done == len(tasks):
                print(f"{done}/{len(tasks)} in {time.perf_counter() - start:.0f} s, {failures} failed", flush=True)
    return failures, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="*", metavar="GLOB", help="only these, by base name or full name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: cores)")
    args = parser.parse_args()
    bases = [base for base in timm.list_models() if not base.endswith(models.SUFFIX)]
    tasks = _tasks(bases, args.filter)
    if not tasks:
        parser.error(f"no architecture matches --filter {args.filter!r}")
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, not {args.jobs}")
    registry = list(registry_problems(bases))
    for problem in registry:
        print(f"FAILED {problem}", flush=True)
    failures, seconds = _run(tasks, args.jobs)
    slowest = sorted(seconds, key=lambda name: -seconds[name])[:5]
    print("slowest: " + ", ".join(f"{name} {seconds[name]:.1f} s" for name in slowest))
    print(f"{len(tasks)} architectures, {failures + len(registry)} failures")
    return 1 if failures or registry else 0


if __name__ == "__main__":
    sys.exit(main())
