#!/usr/bin/env python3
"""What SUGAR costs, against ReLU, the base's own activation, and other ways to write a surrogate gradient.

    python scripts/benchmark.py all                         # everything; some 40 minutes on two cores
    python scripts/benchmark.py all --start 4               # go on with its fourth part
    python scripts/benchmark.py all --device cuda           # on a GPU
    python scripts/benchmark.py activation --variants relu gelu sugar fgi
    python scripts/benchmark.py backward                    # its backward loop alone, beside what it is made of
    python scripts/benchmark.py model --model resnet50 --compile --model-kwargs surrogate=nelu alpha=0.05
    python scripts/benchmark.py inference --model mobilenetv3_small_100
    python scripts/benchmark.py memory --model swin_tiny_patch4_window7_224 --variants relu sugar:surrogate=nelu
    python scripts/benchmark.py growth --axes batch depth
    python scripts/benchmark.py deploy                      # in onnxruntime and OpenVINO, int8, too

Variants are measured in turns in one process and compared within it. Rows go to --output, benchmark_COMMAND.csv, each
in the place of the one with the same settings; `scripts/tables.py` and `scripts/figures.py` make the tables
and picture from those in results/. Close what else is running, and don't touch the machine meanwhile.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch is imported, whose profiler talks

import torch
from lab.bench.cost import COUNT, provenance, record, summarize
from lab.bench.timing import count_compilation, in_new_process, interleave, stopwatch, stopwatches
from lab.bench.variants import ALTERNATIVES, INSTALLED, OWN, describe, make_activation
from lab.bench.workloads import ACTIVATION_PASSES, Workload, backward_loops
from lab.cli import KeyValues, Parser, UserError, choose_device, explained
from lab.deploy.runtimes import open_file

from timm_sugar._places import is_activation

RESULTS = Path(__file__).resolve().parents[1] / "results"
MODELS = ("resnet18", "convnext_tiny", "swin_tiny_patch4_window7_224")
DEPTHS = ("resnet18", "resnet50", "resnet101")
OF_ACTIVATIONS = ("relu", "gelu", "sugar", *ALTERNATIVES, *(["x-mlps"] if INSTALLED else []))
OF_MODELS = (OWN, "relu", "sugar")
# Networks of the smooth families: SiLU, Hardswish, GELU.
DEPLOYED = (
    *("efficientnet_b0", "mobilenetv3_large_100", "mobilenetv3_small_100", "rexnet_100"),
    *("convnext_atto", "edgenext_xx_small", "levit_128", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"),
)
AXES = ("batch", "pixels", "depth", "processes")
MMAP_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"  # glibc's: from how many bytes on freed memory goes back at once
DTYPES = ("float32", "bfloat16", "float16")
PARTS = (
    ("activation",),
    ("backward",),
    ("model",),
    ("inference",),
    ("memory",),
    ("memory", "--batch-size", "32"),  # what is the same for any batch counts less
    ("growth",),
    ("model", "--compile", "--repeats", "8", "--variants", OWN, "relu", "sugar"),  # compiling takes minutes each
    ("inference", "--compile", "--model", "resnet18"),
)


def mode(args: argparse.Namespace) -> str:
    """How the code runs: compiled as a whole, or eagerly, with or without a compiler for SUGAR's own gradient;
    and how the C library was told to give memory back, if it was.
    """
    eager = "eager, no compiler" if torch._dynamo.config.disable else "eager"
    threshold = os.environ.get(MMAP_THRESHOLD)
    return ("compile" if args.compile else eager) + (f", {MMAP_THRESHOLD}={threshold}" if threshold else "")


def report(
    args: argparse.Namespace,
    setting: Mapping[str, object],
    metric: str,
    unit: str,
    samples: dict[str, list[float]],
    surrogates: Mapping[str, str] | None = None,
) -> None:
    """Record one measurement of all variants, and print it. `surrogates`: what to say of each, if not describe()'s."""
    surrogates = surrogates or {variant: describe(variant, args.model_kwargs) for variant in samples}
    whole = {"mode": mode(args)} | dict(setting)
    rows = summarize(whole, metric, unit, samples, surrogates, provenance(args.device, args.line))
    what = ", ".join(str(value) for value in whole.values() if value != "")
    for row in rows:
        ratio = f"{row['to_relu']} of ReLU ({row['to_relu_q1']} to {row['to_relu_q3']})" if row["to_relu"] else ""
        print(f"{what}, {metric}: {row['variant']:12} {row['median']:>11} {unit}  {ratio}", flush=True)
    with explained(f"can't write to {args.output}"):
        record(args.output / f"benchmark_{args.command}.csv", rows)


def measure_activation(args: argparse.Namespace) -> None:
    """The `activation` command; the variant without a compiler is another process, since torch asks only once."""
    with explained("--variants"):
        activations: dict[str, Any] = {
            variant: make_activation(variant, args.model_kwargs) for variant in args.variants
        }
    if args.compile:
        activations = {variant: torch.compile(module, dynamic=True) for variant, module in activations.items()}
    for dtype in args.dtypes:
        for exponent in args.exponents:
            x, upstream = torch.randn(2, 2**exponent, device=args.device).to(getattr(torch, dtype))
            setting = {"subject": "activation", "dtype": dtype, "processes": 1, "axis": "elements", "size": 2**exponent}
            for metric, make in ACTIVATION_PASSES.items():
                passes = {variant: make(module, x, upstream) for variant, module in activations.items()}
                watches = stopwatches(passes, args.device, args.least)
                report(args, setting, metric, "s", interleave(watches, args.repeats))
    if not args.compile and "TORCH_COMPILE_DISABLE" not in os.environ:
        command = [sys.executable, __file__, *args.argv]
        subprocess.run(command, env=os.environ | {"TORCH_COMPILE_DISABLE": "1"}, check=True)


def measure_backward(args: argparse.Namespace) -> None:
    """The `backward` command."""
    if torch.device(args.device).type != "cpu":
        print(f"no measurement of loops on {args.device}: they are compared on a CPU only")
        return
    if torch._dynamo.config.disable:
        raise UserError("the loops of the backward pass are compiled: unset TORCH_COMPILE_DISABLE")
    with explained("--model-kwargs"):
        sugar: Any = make_activation("sugar", args.model_kwargs)
    for dtype in args.dtypes:
        for exponent in args.exponents:
            x, upstream = torch.randn(2, 2**exponent).to(getattr(torch, dtype))
            try:
                loops = backward_loops(x, upstream, sugar)
            except Exception as error:  # whatever may be wrong with a compiler
                raise UserError(f"the loops can't be compiled: {type(error).__name__}: {error!s:.150}") from error
            watches = stopwatches(loops, "cpu", args.least)
            setting = {"subject": "backward loop", "dtype": dtype, "processes": 1, "size": 2**exponent}
            surrogates = dict.fromkeys(loops, "") | {"sugar": describe("sugar", args.model_kwargs)}
            report(args, setting, "pass", "s", interleave(watches, args.repeats), surrogates)


def workload(args: argparse.Namespace, base: str, **changes: Any) -> Workload:
    """A network as the options say. Raises UserError for one that timm or SUGAR doesn't know."""
    options = {key: getattr(args, key) for key in ("batch_size", "img_size", "device", "compile", "channels_last")}
    work = Workload(base, args.model_kwargs, dtype=args.amp_dtype, **(options | changes))
    with explained(f"--model {base}"):
        for variant in args.variants:
            with torch.device("meta"):
                replace(work, device="meta").model(variant)
    return work


def setting_of(work: Workload) -> dict[str, object]:
    """The columns that say what was run."""
    setting = {"subject": work.base, "dtype": work.dtype, "batch_size": work.batch_size, "img_size": work.pixels()}
    return setting | {"processes": 1}


def measure_steps(args: argparse.Namespace, work: Workload, **along: object) -> None:
    """Time of a training step; where it doesn't stand for growth, also bytes kept for backward, and compilations."""
    torch._dynamo.reset()
    steps = {variant: work.training_step(variant) for variant in args.variants}
    compilations = {variant: count_compilation(step) for variant, step in steps.items()}  # warms up as well
    samples = interleave({variant: stopwatch(step, args.device) for variant, step in steps.items()}, args.repeats)
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    setting = setting_of(work) | along
    report(args, setting, "step", "s", samples)
    if not along:
        kept = {variant: [float(step.kept_bytes())] for variant, step in steps.items()}
        report(args, setting, "kept", "byte", kept)
    if work.compile:
        for name in ("graph_breaks", "recompiles"):
            counts = {variant: [float(getattr(count, name))] for variant, count in compilations.items()}
            report(args, setting, name, COUNT, counts)


def measure_model(args: argparse.Namespace) -> None:
    """The `model` command."""
    for work in [workload(args, base) for base in args.model]:
        measure_steps(args, work)


def measure_inference(args: argparse.Namespace) -> None:
    """The `inference` command: time, and whether the exported graph is that of the network with ReLU."""
    for work in [workload(args, base) for base in args.model]:
        torch._dynamo.reset()
        passes = {variant: work.forward_pass(variant) for variant in args.variants}
        for _ in range(3):
            for run in passes.values():
                run()
        samples = interleave({variant: stopwatch(run, args.device) for variant, run in passes.items()}, args.repeats)
        report(args, setting_of(work), "forward", "s", samples)
        if not work.compile:
            relu = work.exported_graph("relu")
            same = {variant: [float(work.exported_graph(variant) == relu)] for variant in args.variants}
            report(args, setting_of(work), "same_graph", COUNT, same)


def measure_memory(args: argparse.Namespace) -> None:
    """The `memory` command: each repeat of a variant is a process of its own."""
    for work in [workload(args, base) for base in args.model]:
        measures = {
            variant: functools.partial(in_new_process, work.peak_memory, variant, args.steps)
            for variant in args.variants
        }
        samples = interleave(measures, args.repeats)
        for metric in next(iter(samples.values()))[0]:
            bytes_ = {variant: [found[metric] for found in runs] for variant, runs in samples.items()}
            report(args, setting_of(work), metric, "byte", bytes_)


def measure_growth(args: argparse.Namespace) -> None:
    """The `growth` command: the same step for batches, images, networks and groups of processes of growing size."""
    base = args.model[0]
    if "WORLD_SIZE" in os.environ:  # torchrun started this process
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
        size = torch.distributed.get_world_size()
        measure_steps(args, workload(args, base), axis="processes", size=size, processes=size)
        torch.distributed.destroy_process_group()
        return
    works = {"batch": [(size, workload(args, base, batch_size=size)) for size in args.batch_sizes]}
    works["pixels"] = [(size**2, workload(args, base, img_size=size)) for size in args.img_sizes]
    works["depth"] = [(count_activations(work), work) for work in (workload(args, name) for name in args.depths)]
    for axis in args.axes:
        for size, work in works.get(axis, []):
            measure_steps(args, work, axis=axis, size=size)
    if "processes" in args.axes:
        launch(args)


def launch(args: argparse.Namespace) -> None:
    """Run this command once more under torchrun, for each number of processes that the device has room for."""
    room = {"cpu": max(args.processes), "cuda": torch.cuda.device_count()}.get(args.device, 0)
    threads = str(args.threads or max(1, torch.get_num_threads() // max(args.processes)))  # of each process
    for count in args.processes:
        if count > room:
            print(f"no measurement with {count} processes: {args.device} has room for {room}")
            continue
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        command = [*launcher, __file__, *args.argv]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": threads}, check=True)


def count_activations(work: Workload) -> int:
    """How many hidden activations a network has."""
    with torch.device("meta"):
        return sum(map(is_activation, replace(work, device="meta").model(OWN).modules()))


def measure_deploy(args: argparse.Namespace) -> None:
    """The `deploy` command: latency in onnxruntime and OpenVINO, in float32 and int8, own activations against ReLU."""
    from lab.bench import deploy  # needs the extra `deploy`

    for base in args.model:
        with tempfile.TemporaryDirectory() as folder, explained(f"--model {base}"):
            own, pixels = deploy.own_activations(base), deploy.pixels_of(base)
            files = deploy.deployed_files(base, Path(folder))
            cases = itertools.product(deploy.RUNTIMES, files, args.threads_each, args.batch_sizes)
            for runtime, dtype, threads, batch in cases:
                torch.set_num_threads(threads)  # which rows take down
                images = deploy.random_images(batch, pixels)
                runs = {variant: open_file(path, threads, runtime) for variant, path in files[dtype].items()}
                works = {variant: functools.partial(run, images) for variant, run in runs.items()}
                watches = stopwatches(works, "cpu", args.least)
                setting = {"subject": base, "dtype": dtype, "batch_size": batch, "img_size": pixels, "processes": 1}
                setting |= {"mode": f"{runtime} {deploy.RUNTIMES[runtime]}"}
                surrogates = {OWN: own, "relu": ""}
                report(args, setting, "latency", "s", interleave(watches, args.repeats), surrogates)


def measure_all(args: argparse.Namespace) -> None:
    """The `all` command: each part is a process, and its rows are on disk when it ends."""
    passed = ["--output", str(args.output)]
    passed += ["--device", args.device, *(["--threads", str(args.threads)] if args.threads else [])]
    if args.model_kwargs:
        passed += ["--model-kwargs", *(f"{key}={value}" for key, value in args.model_kwargs.items())]
    for number, part in enumerate(PARTS[args.start - 1 :], args.start):
        print(f"== part {number} of {len(PARTS)}: {' '.join(part)}", flush=True)
        subprocess.run([sys.executable, __file__, *part, *passed], check=True)
    print("== now run scripts/tables.py and scripts/figures.py")


def positive(text: str) -> int:
    """A number of something, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, not {text!r}")
    return int(text)


def build_parser() -> Parser:
    """All commands and their options."""
    parser = Parser("benchmark.py", description=__doc__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True,
                                     parser_class=Parser)  # fmt: skip

    def command(name: str, do: Callable[[argparse.Namespace], None], text: str, **defaults: Any) -> Any:
        added = commands.add_parser(name, help=text, description=text)
        add = added.add_argument
        add("--device", help="cuda, mps or cpu (default: the first of these that is there)")
        add("--threads", type=positive, metavar="N", help="of a CPU (default: PyTorch's)")
        add("--output", type=Path, default=RESULTS, metavar="DIR", help="(default: results/)")
        add("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="SUGAR's: surrogate, alpha")
        added.set_defaults(do=do, **defaults)
        return add

    def of_variants(add: Any, variants: Sequence[str], repeats: int) -> None:
        add(
            "--variants",
            nargs="+",
            default=variants,
            metavar="V",
            help=f"with settings of its own: sugar:surrogate=nelu,alpha=0.05 (default: {' '.join(variants)})",
        )
        add("--repeats", type=positive, default=repeats, metavar="N", help="(default: %(default)s)")
        add("--compile", action="store_true", help="torch.compile, of the whole")

    def of_elements(add: Any, exponents: Sequence[int]) -> None:
        add("--dtypes", nargs="+", default=("float32", "bfloat16"), choices=DTYPES, help="(default: float32 bfloat16)")
        sizes = "2^K elements (default: " + " ".join(map(str, exponents)) + ")"
        add("--exponents", nargs="+", type=positive, default=exponents, metavar="K", help=sizes)
        add("--least", type=float, default=1e-2, metavar="S", help="seconds of one measurement (default: %(default)s)")

    def of_models(add: Any, models: Sequence[str], repeats: int, batch_size: int, img_size: int | None = None) -> None:
        of_variants(add, OF_MODELS, repeats)
        add("--model", nargs="+", default=models, metavar="NAME", help=f"timm's (default: {' '.join(models)})")
        add("--batch-size", type=positive, default=batch_size, metavar="N", help="(default: %(default)s)")
        size = img_size or "the model's"
        add("--img-size", type=positive, default=img_size, metavar="N", help=f"pixels a side (default: {size})")
        default = "(default: bfloat16; on a CPU, which may lack its instructions, float32)"
        add("--amp-dtype", choices=DTYPES, help=f"of autocast, float32: none {default}")
        add("--channels-last", action="store_true", help="memory format of images and weights")

    add = command("activation", measure_activation, "forward and backward pass of one activation")
    of_variants(add, OF_ACTIVATIONS, 15)
    of_elements(add, range(12, 25, 2))

    add = command("backward", measure_backward, "the loops that backward passes are, alone, in one thread", threads=1,
                  compile=False)  # fmt: skip
    add("--repeats", type=positive, default=15, metavar="N", help="(default: %(default)s)")
    of_elements(add, (16, 24))

    add = command(
        "model", measure_model, "a step of training: time, bytes kept for backward, graph breaks and recompiles"
    )
    of_models(add, MODELS, 10, 8)

    add = command("inference", measure_inference, "a forward pass with gradients off: time, and the exported graph")
    of_models(add, MODELS, 15, 8)

    add = command("memory", measure_memory, "peak memory of a process that trains")
    of_models(add, (MODELS[0], MODELS[2]), 3, 8)
    add("--steps", type=positive, default=3, metavar="N", help="of training (default: %(default)s)")

    networks = "timm's (default: nine of SiLU, Hardswish and GELU)"
    add = command("deploy", measure_deploy, "latency in onnxruntime and OpenVINO, own activations against ReLU",
                  compile=False, model_kwargs={})  # fmt: skip
    add("--model", nargs="+", default=DEPLOYED, metavar="NAME", help=networks)
    add("--threads-each", nargs="+", type=positive, default=(1, 2), metavar="N", help="(default: 1 2)")
    add("--batch-sizes", nargs="+", type=positive, default=(1, 8), metavar="N", help="(default: 1 8)")
    add("--repeats", type=positive, default=15, metavar="N", help="(default: %(default)s)")
    add("--least", type=float, default=5e-2, metavar="S", help="seconds of one measurement (default: %(default)s)")

    add = command("growth", measure_growth, "how the time of a step grows")
    of_models(add, MODELS[:1], 8, 16, 64)
    add("--axes", nargs="+", default=AXES, choices=AXES, help=f"(default: {' '.join(AXES)})")
    add("--batch-sizes", nargs="+", type=positive, default=(8, 16, 32, 64), metavar="N", help="(default: 8 16 32 64)")
    add(
        "--img-sizes",
        nargs="+",
        type=positive,
        default=(32, 64, 128, 224),
        metavar="N",
        help="(default: 32 64 128 224)",
    )
    add("--depths", nargs="+", default=DEPTHS, metavar="NAME", help=f"networks (default: {' '.join(DEPTHS)})")
    add("--processes", nargs="+", type=positive, default=(1, 2), metavar="N", help="(default: 1 2)")

    add = command("all", measure_all, "all of the above, one after the other")
    add("--start", type=positive, default=1, choices=range(1, len(PARTS) + 1), help="number of the part to begin with")
    return parser


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """The command that was asked for."""
    args.device = choose_device(args.device)
    if "amp_dtype" in args:
        args.amp_dtype = args.amp_dtype or ("float32" if args.device == "cpu" else "bfloat16")
    with explained(f"can't write to {args.output}"):  # before anything is measured
        args.output.mkdir(parents=True, exist_ok=True)
    args.argv, args.line = argv, "python scripts/benchmark.py " + shlex.join(without_output(argv))
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        args.do(args)
    except subprocess.CalledProcessError as error:
        raise UserError(f"{shlex.join(map(str, error.cmd[2:]))} failed (status {error.returncode})") from error


def without_output(argv: Sequence[str]) -> list[str]:
    """The arguments but for --output DIR, which says nothing about the numbers."""
    kept, skip = [], False
    for word in argv:
        if not skip and word != "--output" and not word.startswith("--output="):
            kept.append(word)
        skip = word == "--output"
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 130 after Ctrl-C. A user's mistake exits with status 2 and one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    return build_parser().run(functools.partial(run, argv=argv), argv)


if __name__ == "__main__":
    sys.exit(main())
