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
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from timm.data import create_loader, resolve_data_config
from timm.models import clean_state_dict, create_model, resolve_model_input_args
from timm.task import ClassificationEvaluator
from torch import nn
from tqdm import tqdm

import timm_sugar  # noqa: F401  registers the models
from timm_sugar.cli import KeyValues, Parser, UserError, choose_device, explained
from timm_sugar.data import check_classes, open_dataset
from timm_sugar.diagnose import watch
from timm_sugar.runs import load_file, write_atomically

# What a training run says about its model and data, and evaluation needs to know.
_INHERITED = (
    *("model", "model_kwargs", "num_classes", "gp", "in_chans", "input_size", "img_size", "crop_pct", "mean", "std"),
    *("interpolation", "data_dir", "dataset", "val_split", "class_map", "input_key", "target_key"),
)


def build_parser() -> Parser:
    """All options; names and meanings are those of timm's validate script and of scripts/train.py."""
    parser = Parser("evaluate.py", description=__doc__)
    add = parser.add_argument
    add(
        "--model",
        "-m",
        metavar="NAME",
        help="model, with a tag for its published weights; hf-hub:... and local-dir:... too",
    )
    add(
        "--checkpoint",
        metavar="PATH",
        help="a checkpoint, a run's folder (its best checkpoint), or a folder with config.json",
    )
    add("--no-ema", action="store_true", help="not the moving average, where a checkpoint has one (timm: --use-ema)")
    add("--model-kwargs", nargs="*", action=KeyValues, metavar="K=V", help="e.g. patch_size=2")
    add("--data-dir", metavar="DIR", help="data folder")
    add("--dataset", metavar="NAME", help="type/name: torch/cifar10, hfds/..., wds/... (default: folder)")
    add("--split", dest="val_split", metavar="NAME", help="(default: validation)")
    add("--dataset-download", action="store_true")
    add("--class-map", metavar="FILE")
    add("--input-key", metavar="KEY")
    add("--target-key", metavar="KEY")
    add("--skip-broken-images", action="store_true", help="take the next image for one that can't be read")
    add("--num-classes", type=int, metavar="N")
    add("--gp", metavar="POOL", help="global pooling")
    add("--img-size", type=int, metavar="N")
    add("--in-chans", type=int, metavar="N")
    add("--input-size", type=int, nargs=3, metavar="N")
    add("--crop-pct", type=float, metavar="X")
    add("--mean", type=float, nargs="+", metavar="X")
    add("--std", type=float, nargs="+", metavar="X")
    add("--interpolation", metavar="NAME")
    add("-b", "--batch-size", type=int, default=256, metavar="N", help="(default: %(default)s)")
    add("-j", "--workers", type=int, default=4, metavar="N", help="loader processes (default: %(default)s)")
    add("--device", metavar="NAME", help="(default: the first of cuda, mps, cpu)")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", default="float16", choices=("float16", "bfloat16"), help="(default: %(default)s)")
    add("--channels-last", action="store_true")
    add("--activations", action="store_true", help="count dead units and zeros of hidden activations too")
    add("--results-file", metavar="FILE", help="write the results here too")
    add("--results-format", default="csv", choices=("csv", "json"), help="(default: %(default)s)")
    return parser


def find_file(path: Path) -> Path:
    """The checkpoint file that a path stands for: itself, or the best or else the last one of a run's folder."""
    if not path.exists():
        raise UserError(f"--checkpoint {path}: no such file or folder")
    if path.is_file():
        return path
    for name in ("model_best.pth.tar", "last.pth.tar"):
        if (path / name).exists():
            return path / name
    raise UserError(f"--checkpoint {path}: neither a run's folder (no last.pth.tar) nor a model's (no config.json)")


def load_weights(path: Path, ema: bool) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """State dict, which weights these are, and the options of the training run as far as they are known."""
    with explained(f"{path} is not a whole checkpoint"):
        state: Any = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else load_file(path)
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    settings = dict(vars(state["args"])) if isinstance(state.get("args"), argparse.Namespace) else {}
    if not settings and (path.parent / "args.yaml").exists():
        with explained(f"can't read {path.parent / 'args.yaml'}"):
            settings = yaml.safe_load((path.parent / "args.yaml").read_text())
    if ema and state.get("state_dict_ema") is not None:
        return state["state_dict_ema"], f"{path} (EMA)", settings
    return state.get("state_dict", state), str(path), settings


def build_model(args: argparse.Namespace) -> tuple[nn.Module, str]:
    """The model with its weights, and a description of these; options that a checkpoint knows go into `args`."""
    weights = None
    if args.checkpoint and (Path(args.checkpoint) / "config.json").exists():
        args.model = f"local-dir:{args.checkpoint}"
    elif args.checkpoint:
        weights, source, settings = load_weights(find_file(Path(args.checkpoint)), not args.no_ema)
        for name in _INHERITED:
            if getattr(args, name) in (None, "") and settings.get(name) not in (None, "", {}):
                setattr(args, name, settings[name])
    if not args.model:
        raise UserError("which model? Give --model NAME, or --checkpoint with a file or folder of scripts/train.py")
    options = {"num_classes": args.num_classes, "global_pool": args.gp, **(args.model_kwargs or {})}
    with explained(f"can't create model {args.model}"):
        kwargs = resolve_model_input_args(args.model, vars(args), **options)
        model = create_model(pretrained=weights is None, **kwargs)
    if weights is None:
        return model, f"published weights of {args.model}"
    with explained(f"{source} doesn't fit model {args.model}"):
        model.load_state_dict(clean_state_dict(weights))
    return model, source


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
    with watch(model) if args.activations else nullcontext() as activations:
        for x, y in tqdm(loader, leave=False, disable=not sys.stderr.isatty()):
            x = x.contiguous(memory_format=torch.channels_last) if args.channels_last else x
            with autocast():
                output = model(x)
            evaluator.update(output, y)
    metrics = evaluator.compute()  # waits for the device
    speed = evaluator.num_samples / (time.perf_counter() - start)
    shares = {"dead_units": activations.dead, "sparsity": activations.sparsity} if activations else {}
    return {**metrics, "images": evaluator.num_samples, "images_per_second": speed, **shares}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate as the options say; returns the row of results."""
    device = torch.device(choose_device(args.device))
    if args.results_file and not Path(args.results_file).parent.is_dir():
        raise UserError(f"--results-file {args.results_file}: no such folder")
    model, source = build_model(args)
    config = resolve_data_config(vars(args), model=model, use_test_size=not args.checkpoint)
    dataset: Any = open_dataset(
        args.dataset or "",
        args.data_dir,
        args.val_split or "validation",
        skip_broken=args.skip_broken_images,
        download=args.dataset_download,
        class_map=args.class_map,
        input_key=args.input_key,
        target_key=args.target_key,
        input_img_mode="RGB" if config["input_size"][0] == 3 else "L",
    )
    check_classes(dataset, dataset, model.num_classes)  # type: ignore[arg-type]
    preprocessing = {
        name: config[name] for name in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    }
    loader = create_loader(
        dataset, batch_size=args.batch_size, num_workers=args.workers, device=device, **preprocessing
    )
    print(f"{args.model}: {source}, {config['input_size'][-1]} pixels, {device}", flush=True)
    metrics = evaluate(model, loader, args, device)
    print(
        f"top-1 {metrics['top1']:.2f} %, top-5 {metrics['top5']:.2f} %, loss {metrics['loss']:.4f}, "
        f"{metrics['images_per_second']:.0f} images/s (with loading)"
    )
    shares: dict[str, Any] = {name: round(metrics[name], 6) for name in ("dead_units", "sparsity") if name in metrics}
    if shares:
        print(f"dead units {shares['dead_units']:.2%}, zeros {shares['sparsity']:.2%}")
    return {
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
    """Evaluate and print; returns 0. A user's mistake exits with status 2 and one line on stderr."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        row = run(args)
        if args.results_file:
            write_results(Path(args.results_file), row, args.results_format)
    except UserError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
