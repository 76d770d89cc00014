"""The options of training in groups, each with its range; names and defaults are those of timm's train script."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.transforms import str_to_interp_mode
from torchvision.transforms import InterpolationMode

from lab.cli import KeyValues, Parser, real, whole

Add = Callable[..., Any]
FLAG: dict[str, Any] = {"action": "store_true"}
PAIRS: dict[str, Any] = {"nargs": "*", "default": {}, "action": KeyValues, "metavar": "K=V"}
CHANNELS = (1, 3)  # images are read as grey or as RGB
SEED = whole(0, 2**32 - 1)  # what numpy takes
_SECTIONS = {  # of a policy of timm, which takes others without a word
    "rand": r"m\d+|mmax\d+|mstd[\d.]+|n[1-9]\d*|inc[01]|p(0?\.\d+|1(\.0*)?)|t(weights|3aw?)",
    "augmix": r"m\d+|mstd[\d.]+|[wd][1-9]\d*|b[01]|a[\d.]+",
}


def n(least: int, most: int | None = None, **more: Any) -> dict[str, Any]:
    """A whole number in a range."""
    return {"type": whole(least, most), "metavar": "N", **more}


def x(least: float | None = None, most: float | None = None, **more: Any) -> dict[str, Any]:
    """A finite number in a range; `above` and `below` leave the bound itself out."""
    bounds = {"least": least, "most": most, "above": more.pop("above", None), "below": more.pop("below", None)}
    return {"type": real(**{k: v for k, v in bounds.items() if v is not None}), "metavar": "X", **more}


def interpolation(text: str) -> str:
    """The type of an option that names an interpolation; empty for the model's own."""

    def is_known(name: str) -> bool:
        with suppress(KeyError):
            return bool(str_to_interp_mode(name))
        return False

    if text and not is_known(text):
        names = [mode.value for mode in InterpolationMode if is_known(mode.value)]
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, not {text!r}")
    return text


def random_interpolation(text: str) -> str:
    """The same for training, where one can be drawn for each image."""
    return text if text == "random" else interpolation(text)


def policy(text: str) -> str:
    """The type of an option that names an augmentation policy of timm; empty for none."""
    name, *sections = text.split("-")
    makers = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    try:
        if text:
            transform: Any = makers.get(name, auto_augment_transform)(text)
            transform(Image.new("RGB", (8, 8)))
        if not all(re.fullmatch(_SECTIONS.get(name, r"mstd[\d.]+"), section) for section in sections):
            raise ValueError
    except (AssertionError, ValueError, KeyError):
        example = "a policy of timm such as rand-m9-mstd0.5-inc1, augmix-m5, v0, original or 3a"
        raise argparse.ArgumentTypeError(f"expected {example}, not {text!r}") from None
    return text


def add_data(add: Add) -> None:
    """Where the images are."""
    add("--data-dir", metavar="DIR", help="data folder with one folder per split and class")
    add("--dataset", default="", metavar="NAME", help="type/name: torch/cifar10, hfds/..., wds/... (default: folder)")
    add("--train-split", default="train", metavar="NAME")
    add("--val-split", default="validation", metavar="NAME")
    add("--dataset-download", **FLAG, help="let torch/, tfds/ data sets download themselves")
    add("--class-map", default="", metavar="FILE", help="class names in the order of their indices")
    add("--input-key", metavar="KEY", help="name of the image column (hfds, wds)")
    add("--target-key", metavar="KEY", help="name of the label column (hfds, wds)")
    add("--train-num-samples", **n(1), help="size of an iterable data set (wds, hfids)")
    add("--val-num-samples", **n(1), help="size of an iterable data set (wds, hfids)")
    skip = "take the next image for one that can't be read, as timm and wds/ always do; else the run stops and names it"
    add("--skip-broken-images", **FLAG, help=skip)
    add("-j", "--workers", **n(0, 256, default=4), help="loader processes (default: %(default)s)")
    add("--pin-mem", **FLAG)


def add_model(add: Add) -> None:
    """Which model, and where its weights start."""
    add("--model", default="resnet50", metavar="NAME", help="any timm model, or any with _sugar after its name")
    add("--model-kwargs", **PAIRS, help="e.g. surrogate=nelu alpha=0.05")
    changing = (
        "a parameter of the surrogate from one value to another over the run, e.g. alpha=cosine:1.67:0.1, or linear"
    )
    add("--surrogate-schedule", **PAIRS, help=changing)
    add("--pretrained", **FLAG, help="start from published weights")
    add("--pretrained-path", metavar="FILE", help="take this file for the published weights (needs --pretrained)")
    add("--initial-checkpoint", default="", metavar="FILE", help="start from this checkpoint, head included")
    add("--head-init-scale", **x(), help="multiply the initial weights of the classifier, e.g. 0.01 for fine-tuning")
    add("--head-init-bias", **x(), help="the initial biases of the classifier")
    add("--num-classes", **n(1), help="outputs (default: those of the model)")
    add("--gp", metavar="POOL", help="global pooling")
    add("--drop", **x(0, below=1, default=0.0), help="dropout")
    add("--drop-path", **x(0, below=1), help="stochastic depth")
    add("--drop-block", **x(0, below=1))
    add("--model-ema", **FLAG, help="keep a moving average of the weights; it is validated and saved too")
    add("--model-ema-decay", **x(0, 1, default=0.9998), help="(default: %(default)s)")
    add("--model-ema-warmup", **FLAG)


def add_images(add: Add) -> None:
    """How images are prepared for the model, in training and validation."""
    add("--img-size", **n(1), help="image size in pixels (default: the model's)")
    add("--in-chans", type=int, choices=CHANNELS, help="image channels (default: 3)")
    add("--input-size", **n(1), nargs=3, help="channels height width, instead of the two above")
    add("--crop-pct", **x(above=0, most=1), help="centre crop in validation, 0..1")
    add("--mean", **x(), nargs="+", help="of all channels, or of each")
    add("--std", **x(above=0), nargs="+", help="of all channels, or of each")
    add("--interpolation", default="", type=interpolation, metavar="NAME")


def add_device(add: Add) -> None:
    """What computes, and how."""
    add("--device", metavar="NAME", help="cuda, cuda:1, mps, cpu (default: the first of cuda, mps, cpu; timm: cuda)")
    add("--amp", **FLAG, help="mixed precision")
    add("--amp-dtype", default="float16", choices=("float16", "bfloat16"), help="(default: %(default)s)")
    add("--channels-last", **FLAG)
    add("--grad-checkpointing", **FLAG, help="recompute activations in the backward pass to save memory")
    add("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile the training step")
    add("--torchcompile-mode", metavar="MODE", help="of inductor: reduce-overhead, max-autotune, ...")
    add("--device-modules", nargs="+", metavar="MODULE", help="modules to import first; timm_sugar always is")


def add_optimizer(add: Add) -> None:
    """What an update is."""
    add("-b", "--batch-size", **n(1, default=128), help="images per step and process (default: %(default)s)")
    add("-vb", "--validation-batch-size", **n(1), help="(default: batch size)")
    add("--grad-accum-steps", **n(1, default=1), help="steps per update")
    add("--epochs", **n(1, default=300), help="(default: %(default)s)")
    add("--opt", default="sgd", metavar="NAME", help="any optimizer of timm (default: %(default)s)")
    add("--opt-eps", **x(0))
    add("--opt-betas", **x(0, below=1), nargs="+")
    add("--opt-kwargs", **PAIRS)
    add("--momentum", **x(0, below=1, default=0.9))
    add("--weight-decay", **x(0, default=2e-5), help="(default: %(default)s)")
    add("--clip-grad", **x(above=0), help="clip gradients at this size")
    add("--clip-mode", default="norm", choices=("norm", "value", "agc"))
    add("--layer-decay", **x(above=0, most=1), help="learning rate factor from each layer to the one before it")
    add("--layer-decay-min-scale", **x(0, 1, default=0))


def add_schedule(add: Add) -> None:
    """The learning rate over time."""
    add("--lr", **x(0), help="learning rate (default: from --lr-base)")
    add("--lr-base", **x(0, default=0.1), help="learning rate at a batch of --lr-base-size (default: %(default)s)")
    add("--lr-base-size", **n(1, default=256))
    add("--lr-base-scale", default="", choices=("", "linear", "sqrt"), help="(default: sqrt for ada*, lamb)")
    names = ("cosine", "tanh", "poly", "step", "multistep", "wsd", "constant", "none")
    left = "(default: %(default)s); timm's plateau can't be resumed exactly and is left out"
    add("--sched", default="cosine", choices=names, help=left)
    add("--sched-on-updates", **FLAG, help="change the learning rate at each update, not each epoch")
    add("--warmup-epochs", **n(0, default=5), help="(default: %(default)s)")
    add("--warmup-lr", **x(0, default=1e-5), help="(default: %(default)s)")
    add("--warmup-prefix", **FLAG, help="add the warmup to --epochs")
    add("--cooldown-epochs", **n(0, default=0))
    add("--min-lr", **x(0, default=0), help="(default: %(default)s)")
    add("--decay-epochs", **x(above=0, default=90))
    add("--decay-rate", **x(above=0, most=1, default=0.1))
    add("--decay-milestones", **n(0, default=[90, 180, 270]), nargs="+")


def add_augmentation(add: Add) -> None:
    """What changes an image in training."""
    add("--no-aug", **FLAG, help="none at all")
    add("--train-crop-mode", choices=("rrc", "rkrc", "rkrr"), help="(default: rrc)")
    add("--scale", **x(above=0), nargs=2, default=[0.08, 1.0], help="share of the image's area in random crops")
    add("--ratio", **x(above=0), nargs=2, default=[3 / 4, 4 / 3], help="aspect ratio of random crops")
    add("--hflip", **x(0, 1, default=0.5))
    add("--vflip", **x(0, 1, default=0.0))
    add("--color-jitter", **x(0, default=0.4))
    add("--aa", type=policy, metavar="POLICY", help="policy of timm: rand-m9-mstd0.5-inc1, augmix-m5, v0, ...")
    add("--aug-repeats", **x(0, default=0), help="repeated augmentation (torchrun only)")
    add("--train-interpolation", default="random", type=random_interpolation, metavar="NAME")
    add("--reprob", **x(0, 1, default=0.0), help="random erasing")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"))
    add("--recount", **n(1, default=1))


def add_targets(add: Add) -> None:
    """What the loss compares with."""
    add("--mixup", **x(0, default=0.0), help="alpha, 0 turns it off")
    add("--cutmix", **x(0, default=0.0), help="alpha, 0 turns it off")
    add("--mixup-prob", **x(0, 1, default=1.0))
    add("--mixup-switch-prob", **x(0, 1, default=0.5))
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"))
    add("--mixup-off-epoch", **n(0, default=0))
    add("--smoothing", **x(0, below=1, default=0.1), help="label smoothing (default: %(default)s)")
    add("--bce-loss", **FLAG, help="binary cross-entropy")
    add("--bce-target-thresh", **x(0, 1))


def add_run(add: Add) -> None:
    """The folder of the run, and what it keeps."""
    add("--seed", type=SEED, default=42, metavar="N", help="(default: %(default)s)")
    add("--output", default="./output/train", metavar="DIR", help="folder of runs (default: %(default)s)")
    add("--experiment", default="", metavar="NAME", help="name of the run (default: time, model and image size)")
    metrics = ("top1", "top5", "loss")
    add("--eval-metric", default="top1", choices=metrics, help="what the best checkpoint is best at")
    add("--eval-first", **FLAG, help="validate before the first epoch too; the numbers go to start.csv")
    add("--checkpoint-hist", **n(1, default=10), help="checkpoints to keep (default: %(default)s)")
    every = "updates between lines where no terminal shows a progress bar"
    add("--log-interval", **n(1, default=50), help=every)


GROUPS = {
    "data": add_data,
    "model": add_model,
    "images": add_images,
    "device": add_device,
    "optimizer": add_optimizer,
    "learning rate": add_schedule,
    "augmentation": add_augmentation,
    "targets": add_targets,
    "run": add_run,
}


def add_groups(parser: Parser) -> None:
    """All options of training but those that name other files of options."""
    for title, add_options in GROUPS.items():
        add_options(parser.add_argument_group(title).add_argument)
