#!/usr/bin/env python3
"""Accuracy of a model on labelled images: published weights, a checkpoint, or a folder with a trained model.

    python scripts/evaluate.py --data-dir DATA --model resnet18_sugar.a1_in1k
    python scripts/evaluate.py --data-dir DATA --checkpoint output/train/RUN
    python scripts/evaluate.py --data-dir DATA --checkpoint model.safetensors --model resnet18_sugar --num-classes 10

DATA is one split (CLASS/*.png) or holds splits (validation/CLASS/*.png). A checkpoint of scripts/train.py or of timm's
train.py knows its model, data and preprocessing; options given here win.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lab.cli import Parser, UserError, choose_device, explained
from lab.files import write_atomically
from lab.training.loading import add_options, load_model, open_loader
from timm.task import ClassificationEvaluator
from torch import nn
from tqdm import tqdm

import timm_sugar  # noqa: F401  registers the models
from timm_sugar.diagnostics import track_activations


def build_parser() -> Parser:
    """All options; names and meanings are those of timm's validate script and of scripts/train.py."""
    parser = Parser("evaluate.py", description=__doc__)
    add_options(parser)
    add = parser.add_argument
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", default="float16", choices=("float16", "bfloat16"), help="(default: %(default)s)")
    add("--channels-last", action="store_true")
    add("--activations", action="store_true", help="count dead units and zeros of hidden activations too")
    add("--results-file", metavar="FILE", help="write the results here too")
    add("--results-format", default="csv", choices=("csv", "json"), help="(default: %(default)s)")
    return parser


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Any, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Top-1 and top-5 (percent), loss, images per second with loading, and with --activations the shares of dead units
    and zeros (0..1)."""
    model = model.to(device).eval()
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    autocast: Any = (
        partial(torch.autocast, device.type, dtype=getattr(torch, args.amp_dtype)) if args.amp else nullcontext
    )
    evaluator = ClassificationEvaluator(device)
    start = time.perf_counter()
    with track_activations(model) if args.activations else nullcontext() as activations:
        for x, y in tqdm(loader, leave=False, disable=not sys.stderr.isatty()):
            x = x.contiguous(memory_format=torch.channels_last) if args.channels_last else x
            with autocast():
                output = model(x)
            evaluator.update(output, y)
    if not evaluator.num_samples:
        raise UserError("the data gave no image")
    metrics = evaluator.compute()  # waits for the device
    if not math.isfinite(metrics["loss"]):
        raise UserError(f"the loss is {metrics['loss']}, so this model's outputs or weights are not finite")
    speed = evaluator.num_samples / (time.perf_counter() - start)
    shares = {"dead_units": activations.dead, "sparsity": activations.sparsity} if activations else {}
    return {**metrics, "images": evaluator.num_samples, "images_per_second": speed, **shares}


def run(args: argparse.Namespace) -> None:
    """Evaluate as the options say; print the results, and write them where the options ask for it."""
    device = torch.device(choose_device(args.device))
    if args.results_file and not Path(args.results_file).parent.is_dir():
        raise UserError(f"--results-file {args.results_file}: no such folder")
    model, source = load_model(args)
    loader, config = open_loader(args, model, device)
    print(f"{args.model}: {source}, {' x '.join(map(str, config['input_size'][1:]))} pixels, {device}", flush=True)
    metrics = evaluate(model, loader, args, device)
    print(
        f"top-1 {metrics['top1']:.2f} %, top-5 {metrics['top5']:.2f} %, loss {metrics['loss']:.4f}, "
        f"{metrics['images_per_second']:.0f} images/s (with loading)"
    )
    shares: dict[str, Any] = {name: round(metrics[name], 6) for name in ("dead_units", "sparsity") if name in metrics}
    if shares:
        print(f"dead units {shares['dead_units']:.2%}, zeros {shares['sparsity']:.2%}")
    row = {
        "model": args.model,
        "top1": round(metrics["top1"], 4),
        "top1_err": round(100 - metrics["top1"], 4),
        "top5": round(metrics["top5"], 4),
        "top5_err": round(100 - metrics["top5"], 4),
        "param_count": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "img_size": config["input_size"][-1],
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
        "loss": round(metrics["loss"], 6),
        "images_per_second": round(metrics["images_per_second"], 1),
        "weights": source,
        "images": metrics["images"],
        **shares,
    }
    if args.results_file:
        write_results(Path(args.results_file), row, args.results_format)


def write_results(path: Path, row: dict[str, Any], form: str) -> None:
    """One row, with the columns of timm's validate script first."""
    text = io.StringIO()
    if form == "json":
        json.dump(row, text, indent=2)
    else:
        writer = csv.DictWriter(text, fieldnames=list(row))
        writer.writeheader()
        writer.writerow(row)
    with explained(f"can't write {path}"):
        write_atomically(path, text.getvalue())


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 130 after Ctrl-C. A user's mistake exits with status 2 and one line on stderr."""
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
