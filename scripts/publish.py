#!/usr/bin/env python3
"""Make the folder of a trained model, write its card, and put it on the Hugging Face Hub.

    python scripts/publish.py stage output/train/RUN --tag bsilu_cifar10 --dataset cifar10   # a run -> model_cards/
    python scripts/publish.py twin resnet18_sugar.bsilu_cifar10 RUN      # compare with plain ReLU
    python scripts/publish.py int8 NAME RUN            # a conversion: int8 of it and of its original
    python scripts/publish.py cards                                 # write all cards, and the library's weights.json
    python scripts/publish.py push --dry-run                             # what would change
    python scripts/publish.py push resnet18_sugar.bsilu_cifar10
    python scripts/publish.py stage RUN --tag TAG --dataset NAME --models DIR --org ME     # a model of your own
    python scripts/publish.py push --models DIR --org ME --private

A model is named ARCHITECTURE.TAG. The token is the one that `hf auth login` stored, or HF_TOKEN. A push that was cut
off completes when it is run again; run twice, it changes nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from lab.cli import Parser, UserError, as_options, explained, whole
from lab.files import environment, write_atomically
from lab.release.card import CARD, CONFIG, ODD, card
from lab.release.checks import LARGEST_IMAGE, check
from lab.release.hub import check_token, plan, push
from lab.release.stage import TrainedRun, add_int8, add_twin, check_is_of, check_original, stage
from lab.training.data import check_same_classes, class_names, open_dataset

from timm_sugar import __version__
from timm_sugar.models._weights import MODEL_CARDS, ORG, WEIGHTS, WEIGHTS_FILE, describe

EVALUATE, EXPORT = (Path(__file__).with_name(name) for name in ("evaluate.py", "export.py"))


def evaluate(data: str | None, *options: str) -> dict[str, Any]:
    """A row of results: what scripts/evaluate.py measures in float32 on the CPU, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.json")
        command = [sys.executable, str(EVALUATE), *options, "--activations", "--device", "cpu", "--workers", "1"]
        command += [f"--data-dir={data}"] if data else []
        done = subprocess.run([*command, "--results-file", str(results), "--results-format", "json"], check=False)
        if done.returncode:
            raise UserError("the evaluation failed, see above")
        row = json.loads(results.read_text())
    numbers = {key: row[key] for key in ("top1", "top5", "loss", "dead_units", "sparsity", "images")}
    return numbers | environment("CPU")


def labels_of(run: TrainedRun, data: str | None) -> list[str]:
    """Names of the classes of a run's data, in the order of its outputs.

    Raises UserError if these have none, or are others than those that the run was trained on.
    """
    dataset = open_split(run, data)
    if not (labels := class_names(dataset)):
        raise UserError("the data set doesn't name its classes: give --data-dir and a folder of images")
    check_same_classes(run.classes, dataset, str(run.folder), "give the --data-dir that it was trained on")
    return labels


def open_split(run: TrainedRun, data: str | None) -> Any:
    """The images that a run is scored on. Raises DataError."""
    options = {name: run.settings[name] for name in ("class_map", "input_key", "target_key")}
    return open_dataset(run.settings["dataset"], data, run.settings["val_split"] or "validation", **options)


def options_of(run: TrainedRun) -> list[str]:
    """The same images as options of scripts/evaluate.py and export.py, but for where they lie."""
    settings = run.settings
    split = settings["val_split"]
    named = {"split": "" if split == "validation" else split}
    named |= {name: settings[name] for name in ("dataset", "class_map", "input_key", "target_key")}
    return [word for name, value in named.items() if value for word in as_options(name, value)]


def stage_run(args: argparse.Namespace) -> None:
    """The `stage` command."""
    run = TrainedRun(args.run, args.img_size)
    name = f"{run.settings['model'].partition('.')[0]}.{args.tag}"
    data = args.data_dir or run.settings["data_dir"]
    labels = labels_of(run, data)
    source = name if args.org == ORG else f"hf-hub:{args.org}/{name}"  # only the project's tags are registered
    options = options_of(run)
    words = [f"--class-map={Path(word).name}" if word.startswith("--class-map=") else word for word in options]
    again = " ".join(["python scripts/evaluate.py", "--model", source, "--data-dir DATA --activations", *words])
    stage(
        run,
        args.models / name,
        licence=args.license,
        labels=labels,
        about={"org": args.org, "dataset": args.dataset, "notes": args.note},
        measure=lambda folder: {**evaluate(data, "--checkpoint", str(folder), *options), "command": again},
    )
    print(f"{args.models / name} is ready: look at its {CARD}, then put it on the Hub with scripts/publish.py push")
    write_cards(args)


def measure_twin(args: argparse.Namespace) -> None:
    """The `twin` command."""
    (folder,) = folders(args)
    run = TrainedRun(args.run)
    data = args.data_dir or run.settings["data_dir"]
    with explained(f"can't read {folder / CONFIG}", *ODD):
        config = json.loads((folder / CONFIG).read_text())
        names, size = config["label_names"], config["pretrained_cfg"]["input_size"]
        option = as_options("img_size", size[-1]) if run.settings["img_size"] else as_options("input_size", size)
    if (labels := labels_of(run, data)) != names:
        raise UserError(f"{data} has other classes than {folder.name}: {', '.join(labels[:5])} ...")
    add_twin(folder, run, lambda: evaluate(data, "--checkpoint", str(args.run / "last.pth.tar"), *option))


def measure_int8(args: argparse.Namespace) -> None:
    """The `int8` command."""
    (folder,) = folders(args)
    run = TrainedRun(args.run)
    settings = run.settings
    if not settings.get("checkpoint"):
        raise UserError(f"{args.run} is no conversion of a checkpoint: make one with scripts/convert.py --checkpoint")
    check_is_of(folder, run)
    check_original(run, Path(settings["checkpoint"]))
    data = Path(args.data_dir or settings["data_dir"])
    if not (data / "train").is_dir():
        raise UserError(f"{data} needs train/ to calibrate on, and a split to score on: give --data-dir")
    images = len(open_split(run, str(data)))
    with tempfile.TemporaryDirectory() as temporary:
        net, results = Path(temporary, "net.onnx"), Path(temporary, "results.json")
        command = [sys.executable, str(EXPORT), "--format", "onnx-int8", "--images", str(images), "--output", str(net)]
        command += ["--checkpoint", str(folder), "--original", settings["checkpoint"], "--calibration", str(data)]
        command += ["--data-dir", str(data), "--results-file", str(results), *options_of(run)]
        if subprocess.run(command, check=False).returncode:
            raise UserError("the export failed, see above")
        measured = json.loads(results.read_text())
    again = f"python scripts/publish.py int8 {folder.name} RUN --data-dir DATA"
    add_int8(folder, measured, environment("CPU") | {"command": again})


def folders(args: argparse.Namespace) -> list[Path]:
    """The folders that were asked for, or all. Raises UserError if there are none."""
    found = sorted(path.parent for path in args.models.glob(f"*/{CONFIG}"))
    named = [args.models / name for name in args.names] or found
    if not named:
        raise UserError(f"no models in {args.models}: make one with scripts/publish.py stage")
    for name in args.names:
        if args.models / name not in found:
            listed = ", ".join(path.name for path in found) or "none"
            raise UserError(f"no model {name} in {args.models} (there: {listed})")
    return named


def write_cards(args: argparse.Namespace) -> None:
    """The `cards` command: every card, and timm_sugar/models/weights.json if the models are the project's own."""
    named = folders(args)
    for folder in named:
        write_atomically(folder / CARD, card(folder))
    if args.models.resolve() == MODEL_CARDS and not args.names:
        configs = {folder: json.loads((folder / CONFIG).read_text()) for folder in named}
        tags = {folder.name: describe(config, folder / WEIGHTS) for folder, config in configs.items()}
        write_atomically(WEIGHTS_FILE, json.dumps(tags, indent=2) + "\n")


def push_all(args: argparse.Namespace) -> None:
    """The `push` command: all folders are checked before the first is pushed."""
    named = folders(args)
    for folder in named:
        check(folder)
        if (org := json.loads((folder / CONFIG).read_text())["sugar"]["org"]) != args.org:
            raise UserError(f"{folder.name} was staged for {org}: push it with --org {org}, or stage it for {args.org}")
    api = HfApi(library_name="timm_sugar", library_version=__version__)
    if not args.dry_run:
        check_token(api, args.org)
    for folder in named:
        repo_id = f"{args.org}/{folder.name}"
        done = plan(api, repo_id, folder, args.private) if args.dry_run else push(api, repo_id, folder, args.private)
        print(f"{repo_id}: {'; '.join(done) if done else 'up to date'}", flush=True)


def tag(text: str) -> str:
    """A tag as an option: it becomes a part of the name of a folder and of a repository."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", text):
        raise argparse.ArgumentTypeError(f"a tag has letters, digits, _ and - only, not {text!r}")
    return text


def word(text: str) -> str:
    """A licence or the name of an organisation as an option, as the Hub would take it."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"expected letters, digits, _, . and - only, not {text!r}")
    return text


def line(text: str) -> str:
    """An option that becomes a part of a line of the card."""
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"expected some words on one line, not {text!r}")
    return text


def build_parser() -> Parser:
    """All commands and their options."""
    parser = Parser("publish.py", description=__doc__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, do: Callable[[argparse.Namespace], None], text: str) -> Any:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--models", type=Path, default=MODEL_CARDS, metavar="DIR", help="(default: model_cards/)")
        added.set_defaults(do=do, names=[])
        return added.add_argument

    names: dict[str, Any] = {"nargs": "*", "metavar": "NAME", "help": "ARCHITECTURE.TAG (default: all)"}

    add = command("stage", stage_run, "make a model's folder from a training run")
    add("run", type=Path, metavar="RUN", help="folder of a finished run of scripts/train.py")
    add("--tag", required=True, type=tag, metavar="TAG", help="tells these weights from others, e.g. bsilu_cifar10")
    add("--dataset", required=True, type=line, metavar="NAME", help="cifar10, tin200, or a name of your own")
    add("--data-dir", metavar="DIR", help="data to evaluate on (default: that of the run)")
    add(
        "--img-size",
        type=whole(1, LARGEST_IMAGE),
        metavar="N",
        help="pixels to publish and evaluate it at (default: as trained)",
    )
    add("--license", default="apache-2.0", type=word, metavar="ID", help="of the weights (default: %(default)s)")
    add(
        "--note", action="append", default=[], type=line, metavar="TEXT", help="a sentence on the training for the card"
    )
    add(
        "--org",
        default=ORG,
        type=word,
        metavar="ORG",
        help="organisation or user that the card names (default: %(default)s)",
    )

    add = command("twin", measure_twin, "add the numbers of the same run with the base model")
    add("names", nargs=1, metavar="NAME", help="ARCHITECTURE.TAG")
    add("run", type=Path, metavar="RUN", help="folder of the finished run of the base model")
    add("--data-dir", metavar="DIR", help="data to evaluate on (default: that of the run)")

    add = command("int8", measure_int8, "add what a conversion and its original do in int8, in onnxruntime")
    add("names", nargs=1, metavar="NAME", help="ARCHITECTURE.TAG")
    add("run", type=Path, metavar="RUN", help="folder of the run of scripts/convert.py")
    add("--data-dir", metavar="DIR", help="a folder with train/ and validation/ (default: that of the run)")

    add = command("cards", write_cards, "write the cards again")
    add("names", **names)

    add = command("push", push_all, "put models on the Hub")
    add("names", **names)
    add("--org", default=ORG, type=word, metavar="ORG", help="organisation or user on the Hub (default: %(default)s)")
    add("--private", action="store_true", help="nobody else sees the repositories")
    add("--dry-run", action="store_true", help="only say what would change")
    return parser


def run(args: argparse.Namespace) -> None:
    """The command that was asked for."""
    with explained(f"can't write to {args.models}"):
        args.do(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 130 after Ctrl-C. A user's mistake exits with status 2 and one line on stderr."""
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
