"""The model and the labelled images that a command line names: what evaluation, diagnosis and landscapes share."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
import yaml
from timm.data import create_loader, resolve_data_config
from timm.models import clean_state_dict, create_model, resolve_model_input_args
from torch import nn

from lab.cli import KeyValues, Parser, UserError, as_options, choose_device, explained, import_modules
from lab.training.data import RandomPart, check_classes, check_same_classes, open_dataset
from lab.training.groups import add_images, n
from lab.training.options import check_channels
from lab.training.runs import DAMAGE, check_numbers, load_file
from lab.training.setup import check_outputs

# What a training run says about its model and data, and its user needs to know.
INHERITED = (
    *("model", "model_kwargs", "num_classes", "gp", "in_chans", "input_size", "img_size", "crop_pct", "mean", "std"),
    *("interpolation", "data_dir", "dataset", "val_split", "class_map", "input_key", "target_key", "device_modules"),
)
_OPTION = {"val_split": "split"}  # what evaluation calls it


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that name model and data; names and meanings are those of timm's validate script."""
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
    add(
        "--skip-broken-images",
        action="store_true",
        help="take the next image for one that can't be read, as wds/ always does",
    )
    add("--num-classes", **n(1))
    add("--gp", metavar="POOL", help="global pooling")
    add_images(add)
    add("-b", "--batch-size", **n(1, default=256), help="(default: %(default)s)")
    add("-j", "--workers", **n(0, 256, default=4), help="loader processes (default: %(default)s)")
    add("--device", metavar="NAME", help="(default: the first of cuda, mps, cpu)")
    add("--device-modules", nargs="+", metavar="MODULE", help="modules to import first (default: those of the run)")
    parser.set_defaults(classes=None)  # those of a checkpoint, which `load_model` finds


def add_compare(parser: argparse.ArgumentParser, images: int | None) -> None:
    """The options that name two models at once, and how many images, for `each_model`."""
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar="PATH",
        help="two checkpoints or folders, instead of --model and --checkpoint",
    )
    default = f"default: {images}" if images else "default: all"
    parser.add_argument("--images", **n(1, default=images), help=f"a random part ({default})")


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
    with explained(f"{path} is not a whole checkpoint", *DAMAGE):
        state: Any = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else load_file(path)
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    averaged = ema and state.get("state_dict_ema") is not None
    weights = state["state_dict_ema"] if averaged else state.get("state_dict", state)
    named = isinstance(weights, dict) and all(isinstance(name, str) for name in weights)
    if not named or not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise UserError(f"{path} holds something else than weights by their names")
    return weights, f"{path} (EMA)" if averaged else str(path), settings_of(state, path.parent / "args.yaml")


def settings_of(state: dict[str, Any], file: Path) -> dict[str, Any]:
    """The options of the training run, as its checkpoint or the file beside that has them; else none."""
    if isinstance(state.get("args"), argparse.Namespace):
        settings: Any = dict(vars(state["args"]))
    elif not file.exists():
        return {}
    else:
        with explained(f"can't read {file}"):
            settings = yaml.safe_load(file.read_text()) or {}
        if not isinstance(settings, dict):
            raise UserError(f"can't read {file}: expected 'option: value' lines")
    for name, kind in {"model_kwargs": dict, "classes": list}.items():
        if not isinstance(settings.get(name) or kind(), kind):
            raise UserError(f"settings of the checkpoint: {name} is {settings[name]!r}, not a {kind.__name__}")
    return settings


class _Settings(Parser):
    """The options of evaluation, read from a checkpoint."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"settings of the checkpoint: {message}; give the option here")


def inherit(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Let options that aren't given be those of the training run. Raises UserError for values out of range."""
    missing = {name for name in INHERITED if getattr(args, name) in (None, "")}
    taken = {name: settings[name] for name in missing if settings.get(name) not in (None, "", {})}
    parser = _Settings("")
    add_options(parser)
    words = [word for name, value in taken.items() for word in as_options(_OPTION.get(name, name), value)]
    checked = parser.parse_args(words)
    for name, value in taken.items():
        setattr(args, name, value if name == "model_kwargs" else getattr(checked, name))


def load_model(args: argparse.Namespace) -> tuple[nn.Module, str]:
    """The model with its weights, and a description of these; options that a checkpoint knows go into `args`.

    So do the names of its classes, as `classes`, unless a --class-map says which the data has. Raises UserError if
    there is no such model or checkpoint, or they don't fit each other.
    """
    weights, mapped = None, bool(args.class_map)
    if args.checkpoint and (Path(args.checkpoint) / "config.json").exists():
        args.model = f"local-dir:{args.checkpoint}"
    elif args.checkpoint:
        weights, source, settings = load_weights(find_file(Path(args.checkpoint)), not args.no_ema)
        inherit(args, settings)
        args.classes = None if mapped else settings.get("classes")
    check_channels(args)
    if not args.model:
        raise UserError("which model? Give --model NAME, or --checkpoint with a file or folder of scripts/train.py")
    import_modules(args.device_modules)
    options = {"num_classes": args.num_classes, "global_pool": args.gp, **(args.model_kwargs or {})}
    with explained(f"can't create model {args.model}", *DAMAGE):
        kwargs = resolve_model_input_args(args.model, vars(args), **options)
        model = create_model(pretrained=weights is None, **kwargs)
    if weights is None:
        known: Any = model.pretrained_cfg
        labels = known.get("label_names") if args.checkpoint and not mapped else None
        args.classes = [*labels] if isinstance(labels, (list, tuple)) else None
        return model, f"published weights of {args.model}"
    with explained(f"{source} doesn't fit model {args.model}", *DAMAGE):
        weights = clean_state_dict(weights)
        check_numbers(weights, model)
        model.load_state_dict(weights)
    return model, source


def open_loader(
    args: argparse.Namespace, model: Any, device: torch.device, images: int | None = None
) -> tuple[Any, dict[str, Any]]:
    """A loader of the images, preprocessed as the model needs them, and that preprocessing.

    `images` asks for a random part of so many, always the same. Raises DataError.
    """
    with explained(f"can't prepare images for model {args.model}"):
        config = resolve_data_config(vars(args), model=model, use_test_size=not args.checkpoint)
    check_outputs(model, config["input_size"], device)
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
    check_classes(dataset, dataset, model.num_classes)
    advice = "is this the data? If so, name its classes in the order of the model's with --class-map FILE"
    check_same_classes(args.classes, dataset, str(args.checkpoint), advice)
    if images:
        dataset = RandomPart(dataset, images)
    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    preprocessing = {name: config[name] for name in names}
    workers = {"batch_size": args.batch_size, "num_workers": args.workers}
    with explained(f"can't prepare images for model {args.model}"):
        return create_loader(dataset, device=device, **workers, **preprocessing), config


def each_model(args: argparse.Namespace) -> Iterator[tuple[str, nn.Module, Any]]:
    """Name, model on its device, and loader for each model that the options name; prints which it is.

    Raises UserError as `load_model` and `open_loader` do, and for options that contradict each other.
    """
    if args.compare and (args.model or args.checkpoint):
        raise UserError("--compare names the models: leave out --model and --checkpoint")
    device = torch.device(choose_device(args.device))
    paths = args.compare or [args.checkpoint]
    names = [Path(path).resolve().name if path else "" for path in paths]
    if len({*names}) < len(names):  # two folders of one name, in different places
        if len({Path(path).resolve() for path in paths}) < len(paths):
            raise UserError(f"--compare {' '.join(paths)}: that is one model, not two")
        names = [str(path) for path in paths]
    for name, path in zip(names, paths, strict=True):
        one = copy.copy(args)
        one.checkpoint = path
        model, source = load_model(one)
        loader, config = open_loader(one, model, device, args.images)
        print(f"{one.model}: {source}, {' x '.join(map(str, config['input_size'][1:]))} pixels, {device}", flush=True)
        yield name or one.model, model.to(device), loader
