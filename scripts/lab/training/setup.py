"""What a training run begins with: the model, its loaders, its optimizer and schedule, as the options say."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import FastCollateMixup, create_loader
from timm.models import create_model, load_checkpoint, load_state_dict, resolve_model_input_args
from timm.optim import create_optimizer_v2, get_optimizer_class, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import random_seed
from torch import nn

from lab.cli import UserError, explained
from lab.training.data import DataError, check_apart, check_classes, open_dataset
from lab.training.runs import DAMAGE, check_numbers, load_file

_OF_NUMPY = (".npz", ".npy")


def build_model(args: argparse.Namespace) -> nn.Module:
    """The model that the options name, on the CPU, its weights drawn from --seed."""
    random_seed(args.seed)
    kwargs: dict[str, Any] = {
        "num_classes": args.num_classes,
        "drop_rate": args.drop,
        "drop_path_rate": args.drop_path,
        "drop_block_rate": args.drop_block,
        "global_pool": args.gp,
        **args.model_kwargs,
    }
    if args.pretrained_path:  # num_classes=-1 makes timm fit the head to the data
        kwargs["pretrained_cfg_overlay"] = {"file": args.pretrained_path, "num_classes": -1}
    for option in ("initial_checkpoint", "pretrained_path"):
        check_file(f"--{option.replace('_', '-')}", getattr(args, option))
    with explained(f"can't create model {args.model}", *DAMAGE):
        kwargs = resolve_model_input_args(args.model, vars(args), **kwargs)
        model: Any = create_model(pretrained=args.pretrained, **kwargs)
        if args.initial_checkpoint:
            if not args.initial_checkpoint.endswith(_OF_NUMPY):
                check_numbers(load_state_dict(args.initial_checkpoint), model)
            load_checkpoint(model, args.initial_checkpoint)
        scale_head(model, args.head_init_scale, args.head_init_bias)
        if args.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
        args.num_classes = model.num_classes
    return model


def check_file(option: str, name: str | None) -> None:
    """Raises UserError for a file of weights that isn't there or isn't whole; timm doesn't compare the SHA-256."""
    if name and not Path(name).is_file():
        raise UserError(f"{option} {name}: no such file")
    if name and not name.endswith((".safetensors", *_OF_NUMPY)):
        with explained(f"{option} {name} is not a whole checkpoint", *DAMAGE):
            load_file(Path(name))


@torch.no_grad()
def check_outputs(model: Any, size: Sequence[int], device: torch.device) -> None:
    """Raises UserError for a model that doesn't give each class a number, for an image of `size`."""
    training = model.training
    with explained(f"this model can't classify images of size {' x '.join(map(str, size))}", *DAMAGE):
        output = model.to(device).eval()(torch.zeros(1, *size, device=device))
        if output.shape != (1, model.num_classes):
            raise ValueError(f"it has {model.num_classes} classes, but its output the shape {tuple(output.shape)}")
    model.train(training)


@torch.no_grad()
def scale_head(model: Any, scale: float | None, bias: float | None) -> None:
    """Scale the classifier's initial weights and biases, and set its biases, where these are asked for."""
    if scale is not None:
        for parameter in model.get_classifier().parameters():
            parameter.mul_(scale)
    if bias is not None:
        model.get_classifier().bias.fill_(bias)


def build_loaders(args: argparse.Namespace, config: dict[str, Any], device: torch.device) -> tuple[Any, Any]:
    """Training and validation loader for the preprocessing `config`; the latter is None without --val-split.

    Raises DataError.
    """
    if args.aug_repeats and not args.distributed:
        raise UserError("--aug-repeats needs several processes (torchrun)")
    mode = "RGB" if config["input_size"][0] == 3 else "L"
    if mode == "L" and args.aa and not args.no_aug and not args.aa.startswith("3a"):
        raise UserError(f"--aa {args.aa}: timm changes only colour images so; grey ones take 3a")
    train = open_split(args, args.train_split, mode, args.train_num_samples, is_training=True)
    validation = open_split(args, args.val_split, mode, args.val_num_samples) if args.val_split else None
    if validation is not None and args.val_split != args.train_split:
        check_apart(train, validation)
    check_classes(train, validation or train, args.num_classes)
    shared = {
        "input_size": config["input_size"], "mean": config["mean"], "std": config["std"],
        "num_workers": args.workers, "pin_memory": args.pin_mem, "device": device, "distributed": args.distributed,
    }  # fmt: skip
    train_loader = create_train_loader(args, train, config["interpolation"], shared)
    if not len(train_loader):
        raise DataError(f"the training split has {len(train)} images, fewer than one batch of {args.batch_size}")
    if validation is None:
        return train_loader, None
    batch_size = args.validation_batch_size or args.batch_size
    return train_loader, create_loader(
        validation, batch_size=batch_size, is_training=False, interpolation=config["interpolation"],
        crop_pct=config["crop_pct"], **shared,
    )  # fmt: skip


def open_split(args: argparse.Namespace, split: str, mode: str, samples: int | None, is_training: bool = False) -> Any:
    """One split of the data that the options name. Raises DataError."""
    return open_dataset(
        args.dataset, args.data_dir, split, skip_broken=args.skip_broken_images, is_training=is_training,
        download=args.dataset_download, class_map=args.class_map, batch_size=args.batch_size, seed=args.seed,
        num_samples=samples, input_img_mode=mode, input_key=args.input_key, target_key=args.target_key,
    )  # fmt: skip


def create_train_loader(args: argparse.Namespace, dataset: Any, interpolation: str, shared: dict[str, Any]) -> Any:
    """The loader of the training split, which augments its images."""
    mixup = None
    if args.mixup or args.cutmix:
        mixup = FastCollateMixup(
            mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
            num_classes=args.num_classes,
        )  # fmt: skip
    return create_loader(
        dataset, batch_size=args.batch_size, is_training=True, no_aug=args.no_aug, re_prob=args.reprob,
        re_mode=args.remode, re_count=args.recount, train_crop_mode=args.train_crop_mode, scale=args.scale,
        ratio=args.ratio, hflip=args.hflip, vflip=args.vflip, color_jitter=args.color_jitter, auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats, collate_fn=mixup,
        interpolation=interpolation if args.no_aug else args.train_interpolation,
        persistent_workers=False,  # new workers each epoch take their seed from it, old ones can't be resumed
        **shared,
    )  # fmt: skip


def choose_rate(args: argparse.Namespace) -> float:
    """The learning rate: --lr, or --lr-base scaled to the batch of an update."""
    if args.lr:
        return args.lr
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    adaptive = any(word in args.opt.lower() for word in ("ada", "lamb"))
    root = args.lr_base_scale == "sqrt" or (not args.lr_base_scale and adaptive)
    return args.lr_base * (ratio**0.5 if root else ratio)


def build_optimizer(args: argparse.Namespace, model: Any, updates: int) -> tuple[Any, Any, int]:
    """Optimizer, schedule (None without one), and how many epochs that lasts; `updates` are those of an epoch."""
    with explained("can't create optimizer or schedule"):
        check_betas(args)
        if args.sched not in ("none", "constant") and args.min_lr > args.lr > 0:
            raise ValueError(f"--min-lr {args.min_lr:g} is above the learning rate, {args.lr:g}")
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
        metric = {"decreasing_metric": args.eval_metric == "loss"}
        schedule, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args, **metric), updates_per_epoch=updates)
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"--opt {args.opt} needs second derivatives, which are not computed here: choose another")
    return optimizer, schedule, epochs


def load_optimizer(optimizer: Any, state: dict[str, Any], scheduled: bool = False) -> None:
    """Load an optimizer's state, but for the settings that it was built with: options may have changed them.

    `scheduled`: whether a scheduler is about to set the rate, which is the state's until then.
    """
    # What changes, of all that an optimizer of timm is built with.
    counted = ("params", "lookahead_step", *(["lr"] if scheduled else []))
    built = [{key: value for key, value in group.items() if key not in counted} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, built, strict=True):
        group.update(settings)


def check_betas(args: argparse.Namespace) -> None:
    """Raises ValueError for another number of --opt-betas than the optimizer takes."""
    kind = get_optimizer_class(args.opt.removeprefix("lookahead_"))
    betas = getattr(inspect.signature(kind).parameters.get("betas"), "default", ())
    if args.opt_betas and betas and len(args.opt_betas) != len(betas):
        raise ValueError(f"--opt-betas: {args.opt} takes {len(betas)}, not {len(args.opt_betas)}")
