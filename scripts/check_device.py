#!/usr/bin/env python3
"""Check SUGAR on this machine's accelerator: gradients, kernels, time and memory; the report can go into an issue.

    python scripts/check_device.py                 # the first of cuda, mps and cpu; some minutes
    python scripts/check_device.py --quick         # small networks: one or two minutes
    python scripts/check_device.py --csv FILE      # the rows as well

Without a GPU it runs what it can on the CPU, and says so. The status is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lab.bench.device_checks import CHECKS, Skipped
from lab.bench.timing import interleave, most_bytes, quartiles, ratios, stopwatches
from lab.bench.variants import make_activation
from lab.bench.workloads import Workload, activation_pass
from lab.cli import Parser, choose_device, explained, whole
from lab.files import environment, markdown_table, write_rows

import timm_sugar

VARIANTS = ("relu", "gelu", "sugar")
NETWORKS = {False: ("resnet50", "convnext_tiny"), True: ("test_resnet", "test_convnext")}  # by --quick
COLUMNS = ("subject", "dtype", "size", "variant", "seconds", "to_relu", "bytes", "bytes_to_relu")
Row = dict[str, Any]


def run_checks(device: torch.device) -> list[Row]:
    """The outcome of each check."""
    rows = []
    for name, check in CHECKS.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            outcome, detail = "passed", check(device)
        except Skipped as reason:
            outcome, detail = "not run", str(reason)
        except Exception as error:  # whatever it is, the report says it, and the other checks run
            lines = str(error).strip().splitlines() or [""]
            outcome, detail = "FAILED", f"{type(error).__name__}: {' '.join(lines)[:300]}"
        rows.append({"check": name, "outcome": outcome, "detail": detail})
    return rows


def measure(works: dict[str, Callable[[], Any]], device: str, repeats: int, setting: Row) -> Iterator[Row]:
    """Time and memory of variants, each over ReLU's of the same repeat."""
    watches = stopwatches(works, device, 0.05)
    samples = interleave(watches, repeats)
    has_memory = torch.device(device).type != "mps"  # which doesn't tell its peak
    memory = {name: most_bytes(work, device) if has_memory else 0 for name, work in works.items()}
    for name, seconds in samples.items():
        yield setting | {
            "variant": name,
            "seconds": f"{quartiles(seconds).median:.3g}",
            "to_relu": f"{quartiles(ratios(seconds, samples['relu'])).median:.2f}",
            "bytes": memory[name] or "",
            "bytes_to_relu": f"{memory[name] / memory['relu']:.2f}" if memory["relu"] else "",
        }


def measure_activations(device: str, quick: bool, repeats: int) -> Iterator[Row]:
    """Forward and backward pass of an activation alone."""
    size = 2**20 if quick else 2**24
    for dtype in ("float32", "bfloat16"):
        x, upstream = torch.randn(2, size, device=device).to(getattr(torch, dtype))
        works = {name: activation_pass(make_activation(name, {}), x, upstream) for name in VARIANTS}
        yield from measure(works, device, repeats, {"subject": "activation", "dtype": dtype, "size": size})


def measure_steps(device: str, quick: bool, repeats: int, batch_size: int) -> Iterator[Row]:
    """Training steps of networks under autocast."""
    for base in NETWORKS[quick]:
        work = Workload(base, {}, batch_size, 64 if quick else None, "bfloat16", device)
        works: dict[str, Callable[[], Any]] = {name: work.training_step(name) for name in VARIANTS}
        yield from measure(works, device, repeats, {"subject": base, "dtype": "bfloat16", "size": batch_size})


def report(device: str, checks: list[Row], rows: list[Row]) -> str:
    """All of it as Markdown, the verdict last."""
    machine = environment(device)
    about = [f"- {key}: {value}" for key, value in machine.items() if value]
    about.append(f"- CUDA {torch.version.cuda}, HIP {torch.version.hip}")
    failed = [row["check"] for row in checks if row["outcome"] == "FAILED"]
    left = [row["check"] for row in checks if row["outcome"] == "not run"]
    verdict = f"FAILED: {', '.join(failed)}" if failed else "all checks that ran passed"
    if torch.device(device).type == "cpu":
        verdict += "; on a CPU: nothing here was run on a GPU"
    if left:
        verdict += f"; not run: {', '.join(left)}"
    parts = [
        f"### timm_sugar {timm_sugar.__version__} on {device}",
        "\n".join(about),
        markdown_table(["check", "outcome", "detail"], [list(map(str, row.values())) for row in checks]),
        markdown_table(list(COLUMNS), [[str(row[key]) for key in COLUMNS] for row in rows]),
        f"**Verdict**: {verdict}.",
    ]
    return "\n\n".join(part.strip() for part in parts if part)


def check(args: argparse.Namespace) -> int:
    """Run everything; returns 1 if a check failed."""
    name = choose_device(args.device)
    device = torch.device(name)
    if device.type == "cpu":
        print("no GPU is used: what needs one is left out", file=sys.stderr)
    checks = run_checks(device)
    rows: list[Row] = []
    if not args.no_time:
        rows += measure_activations(name, args.quick, args.repeats)
        rows += measure_steps(name, args.quick, args.repeats, args.batch_size)
    print(report(name, checks, rows))
    if args.csv:
        with explained(f"can't write to {args.csv}"):
            machine = environment(name)
            write_rows(args.csv, [row | machine for row in rows], [*COLUMNS, *machine])
    return int(any(row["outcome"] == "FAILED" for row in checks))


def main(argv: Sequence[str] | None = None) -> int:
    """Check; returns 0, 1 if a check failed, or 130 after Ctrl-C."""
    parser = Parser("check_device.py", description=__doc__)
    parser.add_argument("--device", metavar="NAME", help="cuda, cuda:1, xpu, mps, cpu (default: what there is)")
    parser.add_argument("--quick", action="store_true", help="small networks and tensors")
    parser.add_argument("--no-time", action="store_true", help="correctness alone")
    parser.add_argument("--repeats", type=whole(1), default=7, metavar="N", help="of each measurement (default: 7)")
    parser.add_argument("-b", "--batch-size", type=whole(1), default=32, metavar="N", help="(default: 32)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the measurements there as well")
    status: list[int] = []
    return parser.run(lambda args: status.append(check(args)), argv) or (status[0] if status else 0)


if __name__ == "__main__":
    sys.exit(main())
