"""The command line of training: options of a run that is resumed, of a YAML file, and its own, in that order."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from lab.cli import Parser, UserError, as_option, choose_device, yaml_options
from lab.training.groups import CHANNELS, add_groups

_logger = logging.getLogger(__name__)
_NEEDS: dict[str, str | tuple[str, ...]] = {  # an option by the one, or one of those, without which it has no effect
    **dict.fromkeys(("model_ema_decay", "model_ema_warmup"), "model_ema"),
    **dict.fromkeys(("remode", "recount"), "reprob"),
    **{"pretrained_path": "pretrained", "clip_mode": "clip_grad"},
    **{"bce_target_thresh": "bce_loss", "layer_decay_min_scale": "layer_decay"},
    **dict.fromkeys(("mixup_prob", "mixup_switch_prob", "mixup_mode", "mixup_off_epoch"), ("mixup", "cutmix")),
    **{"validation_batch_size": "val_split", "dataset_download": "dataset"},
    **{"blend_order": "blend_epochs", "temperature": "distill"},  # of scripts/convert.py
}
_AUGMENTATION = (  # what --no-aug turns off
    *("train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter", "aa", "train_interpolation"),
    *("reprob", "remode", "recount"),
)


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


def parse_args(argv: Sequence[str], parser: Parser | None = None) -> tuple[argparse.Namespace, Path | None]:
    """Options and the checkpoint or run folder to resume; later wins: defaults, args.yaml of the run, YAML, options."""
    parser = parser or build_parser()
    first = parser.parse_args(argv)
    resume = find_resumed(first)
    own = yaml_options(first.config, parser) if first.config else []
    saved = folder_of(resume) / "args.yaml" if resume else None
    before = yaml_options(saved, parser) if saved and saved.exists() else []
    args = parser.parse_args([*before, *own, *argv])
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
    """Raises UserError for an option that has no effect without another; warns of what --no-aug turns off.

    `asked` are the options but for those that a resumed run was begun with.
    """
    given = [name for name, value in vars(asked).items() if (value or None) != (parser.get_default(name) or None)]
    for name in given:
        needed = _NEEDS.get(name, ())
        needed = (needed,) if isinstance(needed, str) else needed
        if needed and not any(getattr(args, other) for other in needed):
            raise UserError(f"{as_option(name)} has no effect without {' or '.join(map(as_option, needed))}")
    unused = [as_option(name) for name in given if name in _AUGMENTATION]
    if args.no_aug and unused:
        _logger.warning("--no-aug: no effect of %s", ", ".join(unused))


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
    if "in_chans" in args.model_kwargs:
        raise UserError("--model-kwargs in_chans: the images have to know it too, use --in-chans")
    options = {"drop_rate": "drop", "drop_path_rate": "drop-path", "drop_block_rate": "drop-block"}
    given = {name: args.model_kwargs[name] for name in options if args.model_kwargs.get(name) is not None}
    build_parser().parse_args([f"--{options[name]}={value}" for name, value in given.items()])


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
