#!/usr/bin/env python3
"""Export a trained model as a ReLU network: ONNX, ONNX in int8, OpenVINO, or torch.export. Checks what it wrote.

    python scripts/export.py --checkpoint output/train/RUN --format onnx
    python scripts/export.py --checkpoint output/train/RUN --format onnx-int8 --calibration DATA/train --data-dir DATA
    python scripts/export.py --model resnet18_sugar.bsilu_cifar10 --format openvino --output resnet18.xml
    python scripts/export.py --checkpoint output/train/CONVERTED --original output/train/RUN --data-dir DATA

SUGAR becomes ReLU first. The outputs of the file are compared with PyTorch's on random images; with --data-dir, so is
top-1. int8 needs images to calibrate with (--calibration; not those that --data-dir is scored on). Latency is measured
beside the same network with the activations that timm gives it, where they are others: in turns, in one process.
--original names a trained network to compare with instead, whose top-1 is shown, too.
Needs `pip install -e ".[deploy]"`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab.bench.timing import interleave, quartiles, ratios, stopwatch
from lab.cli import Parser, UserError, explained
from lab.deploy.formats import SUFFIXES, export
from lab.deploy.int8 import METHODS, quantize
from lab.deploy.runtimes import Images, Network, open_file
from lab.files import write_atomically
from lab.training.data import split_folder
from lab.training.groups import n
from lab.training.loading import add_options, find_file, load_model, load_weights, open_loader
from timm.data import resolve_data_config
from timm.models import create_model
from torch import nn
from tqdm import tqdm

import timm_sugar
from timm_sugar.models import ALIASES, SUFFIX
from timm_sugar.surgery import other_than_relu

CPU = torch.device("cpu")
LEAST_IMAGES = 8  # for calibration: some give ranges, others choose the method


def build_parser() -> Parser:
    """All options; those that name model and data are scripts/evaluate.py's."""
    parser = Parser("export.py", description=__doc__)
    add_options(parser)
    add = parser.add_argument
    add("--format", default="onnx", choices=SUFFIXES, help="(default: %(default)s)")
    add("--output", metavar="FILE", type=Path, help="(default: named after the run or the model)")
    add("--calibration", metavar="DIR", help="int8: a folder of training images, CLASS/*.png or train/CLASS/*.png")
    add("--calibration-images", **n(LEAST_IMAGES, default=128), help="a random part of them (default: %(default)s)")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=[],
        help="int8: how ranges are found (default: the best)",
    )
    add("--images", **n(1, default=1000), help="a random part of --data-dir to score (default: %(default)s)")
    add("--threads", **n(1, default=1), help="of latency (default: %(default)s)")
    add("--repeats", **n(1, default=30), help="of latency (default: %(default)s)")
    add("--original", metavar="PATH", help="compare with this checkpoint or run, e.g. the one that was converted")
    add("--results-file", metavar="FILE", type=Path, help="what was measured, as JSON")
    return parser


def name_of(checkpoint: Path) -> str:
    """What a run or its checkpoint is called, as in lr0.1 or lr0.1-last: no two runs of a folder share it."""
    whole = checkpoint.resolve()
    return whole.name if whole.is_dir() else f"{whole.parent.name}-{Path(whole.name.removesuffix('.tar')).stem}"


def output_of(args: argparse.Namespace) -> Path:
    """Where the file goes. Raises UserError for another suffix, or a folder that isn't there."""
    suffix = SUFFIXES[args.format]
    name = name_of(Path(args.checkpoint)) if args.checkpoint else args.model.replace("/", "_").replace(":", "_")
    path = args.output or Path(f"{name}{'-int8' if args.format == 'onnx-int8' else ''}{suffix}")
    if path.suffix != suffix:
        raise UserError(f"--output {path}: a file of --format {args.format} ends in {suffix}")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: no such folder")
    return path


def calibration_batches(args: argparse.Namespace, model: nn.Module) -> list[Images]:
    """Calibration images, preprocessed, in 4 batches or more. Raises UserError if they would be scored, too."""
    if args.data_dir and not args.dataset:
        scored = split_folder(Path(args.data_dir), args.val_split or "validation").resolve()
        if split_folder(Path(args.calibration), "train").resolve() == scored:
            raise UserError(f"--calibration: {scored} is scored, and ranges taken from its images flatter the score")
    options = copy.copy(args)
    options.data_dir, options.dataset, options.val_split = args.calibration, "", "train"
    options.classes = None  # no labels are needed
    loader, _ = open_loader(options, model, CPU, args.calibration_images)
    images = np.concatenate([images.numpy() for images, _ in loader])
    if len(images) < LEAST_IMAGES:
        raise UserError(f"--calibration {args.calibration} has {len(images)} images: {LEAST_IMAGES} are needed")
    return np.array_split(images, max(4, len(images) // 8))


def architecture_of(model: Any) -> str:
    """timm's name of a network, without _sugar; empty if it has none."""
    name = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")).removesuffix(SUFFIX)
    return ALIASES.get(name, name)


def with_own_activations(args: argparse.Namespace, model: Any) -> nn.Module | None:
    """The same network and weights with the activations that timm gives it, if these aren't ReLU and it is at hand."""
    name = architecture_of(model)
    settings = {key: value for key, value in (args.model_kwargs or {}).items() if key in ("act_layer", "img_size")}
    try:
        own = create_model(name, num_classes=model.num_classes, **settings).eval()
        own.load_state_dict(model.state_dict())
    except (RuntimeError, TypeError):
        return None
    return own if other_than_relu(own) else None


def write(
    args: argparse.Namespace, model: nn.Module, example: torch.Tensor, path: Path, batches: list[Images]
) -> dict[str, float]:
    """Write a model as the options say; returns the errors of int8 by method, the chosen one first."""
    with explained(f"can't export to {path}", Exception):  # whatever an exporter raises
        if args.format != "onnx-int8":
            export(model, example, path, args.format)
            return {}
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="tmp-float-") as folder:
            float_file = Path(folder) / "float.onnx"
            export(model, example, float_file, "onnx")
            return quantize(float_file, path, batches, args.methods)


def count_right(runs: dict[str, Network], loader: Any) -> dict[str, float]:
    """Top-1 (percent) of each of several networks on the same images."""
    right, count = dict.fromkeys(runs, 0), 0
    for images, labels in tqdm(loader, leave=False, disable=not sys.stderr.isatty()):
        for name, run in runs.items():
            right[name] += int((run(images.numpy()).argmax(1) == labels.numpy()).sum())
        count += len(labels)
    return {name: 100 * number / count for name, number in right.items()}


def as_network(model: nn.Module) -> Network:
    """A network of PyTorch's as a function of arrays."""

    @torch.inference_mode()
    def run(images: Images) -> Images:
        return model(torch.from_numpy(images)).numpy()

    return run


def run(args: argparse.Namespace) -> None:
    """Export, check, measure."""
    if args.format == "onnx-int8" and not args.calibration:
        raise UserError("--format onnx-int8 needs --calibration DIR, a folder of training images to take ranges from")
    asked = copy.copy(args)
    if args.results_file and (args.results_file.is_dir() or not args.results_file.parent.is_dir()):
        raise UserError(f"--results-file {args.results_file}: a folder, or in none")
    model, source = load_model(args)
    path = output_of(args)
    model = model.cpu().eval()
    loader, config = open_loader(args, model, CPU, args.images) if args.data_dir else (None, None)
    batches = calibration_batches(args, model) if args.calibration else []
    own = load_original(asked, args.model) if args.original else with_own_activations(args, model)
    if own is not None and architecture_of(own) != architecture_of(model):
        raise UserError(f"--original is {architecture_of(own)}, not {architecture_of(model)}")
    if any(isinstance(module, timm_sugar.SUGAR) for module in model.modules()):
        model = timm_sugar.to_relu(model)
    else:
        print(f"there is no SUGAR in {args.model}: it is exported as it is")
    size = tuple(config["input_size"]) if config else image_size(args, model)
    example = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    print(f"{args.model}: {source}, {size[-1]} pixels", flush=True)
    errors = write(args, model, example, path, batches)
    files = [path, *([path.with_suffix(".bin")] if path.suffix == ".xml" else [])]
    print(f"{path}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")
    if errors:
        chosen = next(iter(errors))
        print(f"int8 by {chosen}; error of the outputs: " + ", ".join(f"{k} {v:.4f}" for k, v in errors.items()))
        args.methods = [chosen]
    networks = {"PyTorch": as_network(model), path.name: open_file(path, args.threads)}
    measured = report(args, networks, example.numpy(), loader)
    if own is not None:
        measured |= compare(args, own, example, path, batches, loader if args.original else None)
    if args.results_file:
        write_atomically(args.results_file, json.dumps(measured, indent=2) + "\n")


def load_original(asked: argparse.Namespace, name: str) -> nn.Module:
    """The network of --original; where that doesn't say which it is, the one that was made the ReLU network `name`."""
    options = copy.copy(asked)
    options.checkpoint, options.model_kwargs = asked.original, None
    if not (Path(asked.original) / "config.json").exists():
        base = name.partition(".")[0].removesuffix(SUFFIX)
        _, _, settings = load_weights(find_file(Path(asked.original)), not asked.no_ema)
        options.model = settings.get("model") or ALIASES.get(base, base)
    return load_model(options)[0].cpu().eval()


def image_size(args: argparse.Namespace, model: nn.Module) -> tuple[int, ...]:
    """Channels, height and width of an image, where no data set is opened."""
    return tuple(resolve_data_config(vars(args), model=model)["input_size"])


def report(
    args: argparse.Namespace, runs: dict[str, Network], example: Images, loader: Any
) -> dict[str, dict[str, float]]:
    """Print how far the file's outputs are from PyTorch's, and both top-1, and return these.

    Raises UserError for other outputs.
    """
    if args.format != "onnx-int8":  # which is judged by real images
        expected, found = (run(example) for run in runs.values())
        scale, distance = float(np.abs(expected).max()), float(np.abs(found - expected).max())
        print(f"outputs for random images: {distance:.2g} apart, the largest being {scale:.2g}")
        if not distance <= 1e-3 * max(scale, 1):
            raise UserError("the file computes something else than PyTorch does: don't use it")
    return {"top1": score(runs, loader, "")} if loader is not None else {}


def score(runs: dict[str, Network], loader: Any, of: str) -> dict[str, float]:
    """Print and return top-1 (percent) of PyTorch's network and of the file."""
    shares = count_right(runs, loader)
    print(f"top-1{of} of {len(loader.dataset)} images: " + ", ".join(f"{k} {v:.2f} %" for k, v in shares.items()))
    return {**dict(zip(("pytorch", "file"), shares.values(), strict=True)), "images": len(loader.dataset)}


def compare(
    args: argparse.Namespace, own: nn.Module, example: torch.Tensor, path: Path, batches: list[Images], loader: Any
) -> dict[str, dict[str, float]]:
    """Print and return the latency of the file, and of the network with its own activations in the same format.

    Also the top-1 of the latter, with a loader.
    """
    measured = {}
    names = sorted({*timm_sugar.list_activations(own).values()})
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / path.name
        write(args, own, example, other, batches)
        image = example[:1].numpy()
        files = {"ReLU": open_file(path, args.threads), "own": open_file(other, args.threads)}
        if loader is not None:
            networks = {"PyTorch": as_network(own), f"as {path.suffix}": files["own"]}
            measured["original"] = score(networks, loader, " of the original")
        watches = {name: stopwatch(lambda run=run: run(image), calls=3) for name, run in files.items()}  # type: ignore[misc]
        for watch in watches.values():
            watch()
        samples = interleave(watches, args.repeats)
    ratio = quartiles(ratios(samples["own"], samples["ReLU"]))
    relu, other_ms = (1e3 * quartiles(samples[name]).median for name in files)
    times = f"ReLU {relu:.2f} ms, with {', '.join(names)} {other_ms:.2f} ms"
    print(f"one image, {args.threads} threads: {times}, {ratio.median:.2f} times ({ratio.q1:.2f} to {ratio.q3:.2f})")
    latency = {"threads": args.threads, "relu_ms": relu, "own_ms": other_ms}
    return {**measured, "latency": {**latency, "own_to_relu": ratio.median, "q1": ratio.q1, "q3": ratio.q3}}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 130 after Ctrl-C. A user's mistake exits with status 2 and one line on stderr."""
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
