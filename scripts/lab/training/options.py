"""The options of training, with the names, meanings and defaults of timm's train script."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.cli import KeyValues, Parser, UserError, choose_device, yaml_options


def build_parser(description: str = "") -> Parser:
    """All options; names, meanings and defaults are those of timm's train script unless the help says otherwise."""
    epilog = "Options have the names and defaults of timm's train.py; '(timm: ...)' marks what differs."
    parser = Parser("train.py", description=description, epilog=epilog)
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML with option names as keys; options given here win")
    parser.add_argument(
        "--resume",
        metavar="PATH",
        help="continue a run: its folder, a checkpoint in it, or 'auto' to "
        "continue OUTPUT/EXPERIMENT if it exists; options come from its args.yaml unless given",
    )
    flag: dict[str, Any] = {"action": "store_true"}
    whole: dict[str, Any] = {"type": int, "metavar": "N"}
    real: dict[str, Any] = {"type": float, "metavar": "X"}
    reals: dict[str, Any] = {"type": float, "nargs": "+", "metavar": "X"}

    add = parser.add_argument_group("data").add_argument
    add("--data-dir", metavar="DIR", help="data folder with one folder per split and class")
    add("--dataset", default="", metavar="NAME", help="type/name: torch/cifar10, hfds/..., wds/... (default: folder)")
    add("--train-split", default="train", metavar="NAME")
    add("--val-split", default="validation", metavar="NAME")
    add("--dataset-download", **flag, help="let torch/, tfds/ data sets download themselves")
    add("--class-map", default="", metavar="FILE", help="class names in the order of their indices")
    add("--input-key", metavar="KEY", help="name of the image column (hfds, wds)")
    add("--target-key", metavar="KEY", help="name of the label column (hfds, wds)")
    add("--train-num-samples", **whole, help="size of an iterable data set (wds, hfids)")
    add("--val-num-samples", **whole, help="size of an iterable data set (wds, hfids)")
    add(
        "--skip-broken-images",
        **flag,
        help="take the next image for one that can't be read (timm: always); "
        "without it the run stops and names the file",
    )
    add("-j", "--workers", **whole, default=4, help="loader processes (default: %(default)s)")
    add("--pin-mem", **flag)

    add = parser.add_argument_group("model").add_argument
    add("--model", default="resnet50", metavar="NAME", help="any timm model, or any with _sugar after its name")
    add("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="e.g. surrogate=nelu alpha=0.05")
    add("--pretrained", **flag, help="start from published weights")
    add("--pretrained-path", metavar="FILE", help="take this file for the published weights (needs --pretrained)")
    add("--initial-checkpoint", default="", metavar="FILE", help="start from this checkpoint, head included")
    add("--head-init-scale", **real, help="multiply the initial weights of the classifier, e.g. 0.01 for fine-tuning")
    add("--head-init-bias", **real, help="the initial biases of the classifier")
    add("--num-classes", **whole, help="outputs (default: those of the model)")
    add("--gp", metavar="POOL", help="global pooling")
    add("--img-size", **whole, help="image size in pixels (default: the model's)")
    add("--in-chans", **whole, help="image channels (default: 3)")
    add("--input-size", type=int, nargs=3, metavar="N", help="channels height width, instead of the two above")
    add("--crop-pct", **real, help="centre crop in validation, 0..1")
    add("--mean", **reals)
    add("--std", **reals)
    add("--interpolation", default="", metavar="NAME")
    add("--drop", **real, default=0.0, help="dropout")
    add("--drop-path", **real, help="stochastic depth")
    add("--drop-block", **real)
    add("--grad-checkpointing", **flag, help="recompute activations in the backward pass to save memory")
    add("--channels-last", **flag)
    add("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile the training step")
    add("--torchcompile-mode", metavar="MODE")
    add("--model-ema", **flag, help="keep a moving average of the weights; it is validated and saved too")
    add("--model-ema-decay", **real, default=0.9998, help="(default: %(default)s)")
    add("--model-ema-warmup", **flag)

    add = parser.add_argument_group("device").add_argument
    add("--device", metavar="NAME", help="cuda, cuda:1, mps, cpu (default: the first of cuda, mps, cpu; timm: cuda)")
    add("--amp", **flag, help="mixed precision")
    add("--amp-dtype", default="float16", choices=("float16", "bfloat16"), help="(default: %(default)s)")
    add("--device-modules", nargs="+", metavar="MODULE", help="modules to import first; timm_sugar always is")

    add = parser.add_argument_group("optimisation").add_argument
    add("-b", "--batch-size", **whole, default=128, help="images per step and process (default: %(default)s)")
    add("-vb", "--validation-batch-size", **whole, help="(default: batch size)")
    add("--grad-accum-steps", **whole, default=1, help="steps per update")
    add("--epochs", **whole, default=300, help="(default: %(default)s)")
    add("--opt", default="sgd", metavar="NAME", help="any optimizer of timm (default: %(default)s)")
    add("--opt-eps", **real)
    add("--opt-betas", **reals)
    add("--opt-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V")
    add("--momentum", **real, default=0.9)
    add("--weight-decay", **real, default=2e-5, help="(default: %(default)s)")
    add("--clip-grad", **real, help="clip gradients at this size")
    add("--clip-mode", default="norm", choices=("norm", "value", "agc"))
    add("--layer-decay", **real, help="learning rate factor from each layer to the one before it")
    add("--layer-decay-min-scale", **real, default=0)
    add("--lr", **real, help="learning rate (default: from --lr-base)")
    add("--lr-base", **real, default=0.1, help="learning rate at a batch of --lr-base-size (default: %(default)s)")
    add("--lr-base-size", **whole, default=256)
    add("--lr-base-scale", default="", choices=("", "linear", "sqrt"), help="(default: sqrt for ada*, lamb)")
    add(
        "--sched",
        default="cosine",
        choices=("cosine", "tanh", "poly", "step", "multistep", "wsd", "constant", "none"),
        help="(default: %(default)s); timm's plateau can't be resumed exactly and is left out",
    )
    add("--sched-on-updates", **flag, help="change the learning rate at each update, not each epoch")
    add("--warmup-epochs", **whole, default=5, help="(default: %(default)s)")
    add("--warmup-lr", **real, default=1e-5, help="(default: %(default)s)")
    add("--warmup-prefix", **flag, help="add the warmup to --epochs")
    add("--cooldown-epochs", **whole, default=0)
    add("--min-lr", **real, default=0, help="(default: %(default)s)")
    add("--decay-epochs", **real, default=90)
    add("--decay-rate", **real, default=0.1)
    add("--decay-milestones", type=int, nargs="+", default=[90, 180, 270], metavar="N")

    add = parser.add_argument_group("augmentation and regularisation").add_argument
    add("--no-aug", **flag, help="none at all")
    add("--train-crop-mode", metavar="MODE", help="rrc, rkrc or rkrr (default: rrc)")
    add("--scale", **reals, default=[0.08, 1.0], help="share of the image's area in random crops")
    add("--ratio", **reals, default=[3 / 4, 4 / 3], help="aspect ratio of random crops")
    add("--hflip", **real, default=0.5)
    add("--vflip", **real, default=0.0)
    add("--color-jitter", **real, default=0.4)
    add("--aa", metavar="POLICY", help="AutoAugment, RandAugment, ... policy of timm, e.g. rand-m9-mstd0.5-inc1")
    add("--aug-repeats", **real, default=0, help="repeated augmentation (torchrun only)")
    add("--train-interpolation", default="random", metavar="NAME")
    add("--reprob", **real, default=0.0, help="random erasing")
    add("--remode", default="pixel")
    add("--recount", **whole, default=1)
    add("--mixup", **real, default=0.0, help="alpha, 0 turns it off")
    add("--cutmix", **real, default=0.0, help="alpha, 0 turns it off")
    add("--mixup-prob", **real, default=1.0)
    add("--mixup-switch-prob", **real, default=0.5)
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"))
    add("--mixup-off-epoch", **whole, default=0)
    add("--smoothing", **real, default=0.1, help="label smoothing (default: %(default)s)")
    add("--bce-loss", **flag, help="binary cross-entropy")
    add("--bce-target-thresh", **real)

    add = parser.add_argument_group("run").add_argument
    add("--seed", **whole, default=42, help="(default: %(default)s)")
    add("--output", default="./output/train", metavar="DIR", help="folder of runs (default: %(default)s)")
    add("--experiment", default="", metavar="NAME", help="name of the run (default: time, model and image size)")
    add("--eval-metric", default="top1", choices=("top1", "top5", "loss"), help="what the best checkpoint is best at")
    add("--eval-first", **flag, help="validate before the first epoch too; the numbers go to start.csv")
    add("--checkpoint-hist", **whole, default=10, help="checkpoints to keep (default: %(default)s)")
    add("--log-interval", **whole, default=50, help="updates between lines where no terminal shows a progress bar")
    return parser


def parse_args(argv: Sequence[str], description: str = "") -> tuple[argparse.Namespace, Path | None]:
    """Options and the checkpoint or run folder to resume; later wins: defaults, args.yaml of the run, YAML, options."""
    parser = build_parser(description)
    first = parser.parse_args(argv)
    resume = Path(first.resume) if first.resume else None
    if first.resume == "auto":
        if not first.experiment:
            raise UserError("--resume auto needs --experiment, the name of the run")
        resume = Path(first.output, first.experiment)
        resume = resume if (resume / "args.yaml").exists() else None
    elif resume and not resume.exists():
        raise UserError(f"--resume {resume}: no such file or folder")
    options: list[str] = []
    if resume:
        saved = (resume if resume.is_dir() else resume.parent) / "args.yaml"
        if resume.is_dir() and not saved.exists():
            raise UserError(f"--resume {resume}: no run in this folder (no args.yaml)")
        options += yaml_options(str(saved), parser) if saved.exists() else []
    options += yaml_options(first.config, parser) if first.config else []
    args = parser.parse_args([*options, *argv])
    args.given = {k: v for k, v in vars(args).items() if k not in ("config", "resume")}  # for args.yaml
    check_options(args)
    return args, resume


def check_options(args: argparse.Namespace) -> None:
    """Raises UserError for options that contradict each other or the machine; chooses the device."""
    for name in ("batch_size", "epochs", "grad_accum_steps", "checkpoint_hist", "log_interval"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if args.pretrained_path and not args.pretrained:
        raise UserError("--pretrained-path has no effect without --pretrained")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise UserError(f"--mixup and --cutmix need an even --batch-size, not {args.batch_size}")
    args.device = choose_device(args.device)
