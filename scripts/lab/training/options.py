"""The command line of training: options of a run that is resumed, of a YAML file, and its own, in that order."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from timm.optim import get_optimizer_info

from lab.cli import Parser, UserError, as_option, choose_device, yaml_options
from lab.training.groups import CHANNELS, add_groups

_logger = logging.getLogger(__name__)
_NEEDS: dict[str, str | tuple[str, ...]] = {  # an option by the one, or one of those, without which it has no effect
    **dict.fromkeys(("model_ema_decay", "model_ema_warmup"), "model_ema"),
    **dict.fromkeys(("remode", "recount"), "reprob"),
    **{"pretrained_path": "pretrained", "clip_mode": "clip_grad"},
    **{"bce_target_thresh": "bce_loss", "layer_decay_min_scale": "layer_decay"},
    **dict.fromkeys(("mixup_prob", "mixup_switch_prob", "mixup_mode", "mixup_off_epoch"), ("mixup", "cutmix")),
    **{"validation_batch_size": "val_split"},
    **dict.fromkeys(("dataset_download", "input_key", "target_key"), "dataset"),
    **{"blend_order": "blend_epochs", "temperature": "distill"},  # of scripts/convert.py
}
_AUGMENTATION = (  # what --no-aug turns off
    *("train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter", "aa", "train_interpolation"),
    *("reprob", "remode", "recount"),
)
_BASE = ("lr_base", "lr_base_size", "lr_base_scale")  # what --lr stands for
_CYCLES = ("cosine", "tanh", "poly")
_WARM = (*_CYCLES, "step", "multistep", "wsd", "constant")
_SCHEDULES = {  # an option by the schedules of timm that read it
    **{
        "decay_epochs": ("step", "wsd"),
        "decay_milestones": ("multistep",),
        "decay_rate": ("step", "multistep", "poly"),
    },
    **dict.fromkeys(("min_lr", "cooldown_epochs"), (*_CYCLES, "wsd")),
    **dict.fromkeys(("warmup_lr", "sched_on_updates"), _WARM),
}
_OPTIMIZERS = {"opt_eps": "has_eps", "opt_betas": "has_betas", "momentum": "has_momentum"}  # timm's OptimInfo


def build_parser(description: str = "", prog: str = "train.py") -> Parser:
    """All options; names, meanings and defaults are those of timm's train script unless the help says otherwise."""
    epilog = "Options have the names and defaults of timm's train.py; '(timm: ...)' marks what differs."
    parser = Parser(prog, description=description, epilog=epilog)
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML with option names as keys; options given here win")
    resume = (
        "continue a run in its folder, which may have moved: the folder, a checkpoint in it, or 'auto' to continue "
        "OUTPUT/EXPERIMENT if it exists; options come from its args.yaml unless given; with another --experiment "
        "the run goes on in that folder, and the old one stays as it is"
    )
    parser.add_argument("--resume", metavar="PATH", help=resume)
    add_groups(parser)
    return parser


def parse_args(
    argv: Sequence[str], parser: Parser | None = None, known: Sequence[str] = ()
) -> tuple[argparse.Namespace, Path | None]:
    """Options and the checkpoint or run folder to resume.

    Later wins: defaults, `known` options, args.yaml of the run, YAML, `argv`.
    """
    parser = parser or build_parser()
    first = parser.parse_args(argv)
    resume = find_resumed(first)
    own = yaml_options(first.config, parser) if first.config else []
    saved = folder_of(resume) / "args.yaml" if resume else None
    before = yaml_options(saved, parser) if saved and saved.exists() else []
    args = parser.parse_args([*known, *before, *own, *argv])
    check_effects(parser, parser.parse_args([*own, *argv]), args)
    if resume:
        parser.set_defaults(output="", experiment="")
        name_folder(args, parser.parse_args([*own, *argv]), resume)
    args.given = {k: v for k, v in vars(args).items() if k not in ("config", "resume")}  # for args.yaml
    check_options(args)
    return args, resume


def folder_of(resume: Path) -> Path:
    """The folder of the run that --resume names, or a checkpoint in it."""
    return resume if resume.is_dir() else resume.parent


def find_resumed(args: argparse.Namespace) -> Path | None:
    """What to resume, None to begin a run. Raises UserError if it isn't there."""
    if not args.resume:
        return None
    if args.resume == "auto":
        if not args.experiment:
            raise UserError("--resume auto needs --experiment, the name of the run")
        folder = Path(args.output, args.experiment)
        return folder if (folder / "args.yaml").exists() else None
    resume = Path(args.resume)
    if not resume.exists():
        raise UserError(f"--resume {resume}: no such file or folder")
    if resume.is_dir() and not (resume / "args.yaml").exists():
        raise UserError(f"--resume {resume}: no run in this folder (no args.yaml)")
    return resume


def name_folder(args: argparse.Namespace, asked: argparse.Namespace, resume: Path) -> None:
    """Let a resumed run stay where it is, whatever its args.yaml says, unless another --experiment is asked for."""
    folder = Path(os.path.abspath(folder_of(resume)))
    if asked.output and not asked.experiment and Path(asked.output).resolve() != folder.parent.resolve():
        raise UserError(f"--output {asked.output}: add --experiment to continue {folder.name} in another folder")
    args.output, args.experiment = asked.output or str(folder.parent), asked.experiment or folder.name


def check_effects(parser: Parser, asked: argparse.Namespace, args: argparse.Namespace) -> None:
    """Raises UserError for an option that has no effect without another; warns of those that another one turns off.

    `asked` are the options but for those that a resumed run was begun with.
    """
    given = [name for name, value in vars(asked).items() if (value or None) != (parser.get_default(name) or None)]
    for name in given:
        needed = _NEEDS.get(name, ())
        needed = (needed,) if isinstance(needed, str) else needed
        if needed and not any(getattr(args, other) for other in needed):
            raise UserError(f"{as_option(name)} has no effect without {' or '.join(map(as_option, needed))}")
    for cause, names in find_unused(given, args).items():
        _logger.warning("%s: no effect of %s", cause, ", ".join(map(as_option, names)))


def find_unused(given: Sequence[str], args: argparse.Namespace) -> dict[str, list[str]]:
    """Which of the options `given` another one turns off, by that one."""
    off: dict[str, Sequence[str]] = {
        "--no-aug": _AUGMENTATION if args.no_aug else (),
        "without --amp": () if args.amp else ("amp_dtype",),
        "--lr": _BASE if args.lr else (),
        f"--sched {args.sched}": [name for name, kinds in _SCHEDULES.items() if args.sched not in kinds],
        "--warmup-epochs 0": () if args.warmup_epochs else ("warmup_lr", "warmup_prefix"),
    }
    with contextlib.suppress(ValueError):  # an unknown --opt is refused where it is built
        optimizer = get_optimizer_info(args.opt.lower().split("_")[-1])
        off[f"--opt {args.opt}"] = [name for name, has in _OPTIMIZERS.items() if not getattr(optimizer, has)]
    unused = {cause: [name for name in given if name in names] for cause, names in off.items()}
    return {cause: names for cause, names in unused.items() if names}


def check_options(args: argparse.Namespace) -> None:
    """Raises UserError for options that contradict each other or the machine; chooses the device."""
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise UserError(f"--mixup and --cutmix need an even --batch-size, not {args.batch_size}")
    if args.torchcompile_mode and args.torchcompile != "inductor":
        raise UserError("--torchcompile-mode is one of inductor: it needs --torchcompile")
    check_model_kwargs(args)
    check_channels(args)
    check_crops(args)
    args.device = choose_device(args.device)


def check_model_kwargs(args: argparse.Namespace) -> None:
    """Raises UserError for an argument of the model that is an option, and outside its range."""
    for name, option in {"in_chans": "in_chans", "num_classes": "num_classes", "global_pool": "gp"}.items():
        if name in args.model_kwargs:
            raise UserError(f"--model-kwargs {name}: use {as_option(option)}")
    options = {"drop_rate": "drop", "drop_path_rate": "drop_path", "drop_block_rate": "drop_block"}
    given = {option: args.model_kwargs[name] for name, option in options.items() if name in args.model_kwargs}
    for option in given:
        if getattr(args, option):
            raise UserError(f"{as_option(option)} stands in --model-kwargs, too: give it once")
    build_parser().parse_args([f"{as_option(k)}={value}" for k, value in given.items() if value is not None])


def check_channels(args: argparse.Namespace) -> None:
    """Raises UserError for channels that no image has, and for a mean or spread of another number of them."""
    channels = args.in_chans or (args.input_size or CHANNELS[-1:])[0]
    if channels not in CHANNELS:
        raise UserError(f"--input-size: images have {' or '.join(map(str, CHANNELS))} channels, not {channels}")
    for name in ("mean", "std"):
        given = getattr(args, name)
        if given and len(given) not in (1, channels):
            raise UserError(f"--{name} takes one number, or one for each of {channels} channels, not {len(given)}")


def check_crops(args: argparse.Namespace) -> None:
    """Raises UserError for random crops and turns that can't be drawn."""
    for name in ("scale", "ratio"):
        low, high = getattr(args, name)
        if low > high:
            raise UserError(f"--{name}: the smaller number comes first, not {low:g} {high:g}")
    if args.train_crop_mode in (None, "rrc") and args.scale[1] > 1:
        raise UserError(f"--scale: a crop has at most all of the image, 1, not {args.scale[1]:g}")
    if args.aa and args.train_interpolation in ("box", "hamming", "lanczos"):
        raise UserError(f"--aa can't turn images with --train-interpolation {args.train_interpolation}: use bicubic")
