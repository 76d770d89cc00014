#!/usr/bin/env python3
"""Train any timm model, SUGAR or not, on images; options as in timm's own train script, so one YAML drives both.

    python scripts/train.py --data-dir DATA --model resnet18_sugar --num-classes 10 --epochs 20
    python scripts/train.py --config scripts/recipes/resnet18_cifar10.yaml --data-dir DATA
    torchrun --nproc_per_node=2 scripts/train.py --data-dir DATA --model convnext_tiny_sugar
    python scripts/train.py --resume output/train/RUN

DATA holds train/CLASS/*.png and validation/CLASS/*.png, or use --dataset for timm's other data sets. A run is a folder:
args.yaml, train.log, summary.csv, curves.png, last.pth.tar, model_best.pth.tar and the best checkpoint-N.pth.tar.
"""

from __future__ import annotations

import argparse
import math
import random
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from lab.cli import Parser, UserError, explained, import_modules
from lab.files import write_atomically, write_rows
from lab.training.data import DataError, check_classes, open_dataset
from lab.training.divergence import STATUS, Diverged, all_finite, diverged
from lab.training.options import parse_args
from lab.training.runs import (
    START,
    find_checkpoint,
    is_saved,
    plot_curves,
    read_checkpoint,
    read_summary,
    write_summary,
)
from timm.data import FastCollateMixup, create_loader, resolve_data_config
from timm.models import clean_state_dict, create_model, resolve_model_input_args, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, evaluation_sample_limit
from timm.utils import (
    AverageMeter,
    CheckpointSaver,
    NativeScaler,
    dispatch_clip_grad,
    distribute_bn,
    init_distributed_device,
    random_seed,
    unwrap_model,
)
from torch import nn
from tqdm import tqdm

import timm_sugar  # noqa: F401  registers the models
from timm_sugar.diagnostics import track_activations


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
    with explained(f"can't create model {args.model}"):
        kwargs = resolve_model_input_args(args.model, vars(args), **kwargs)
        model: Any = create_model(pretrained=args.pretrained, checkpoint_path=args.initial_checkpoint, **kwargs)
        scale_head(model, args.head_init_scale, args.head_init_bias)
        if args.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
    args.num_classes = model.num_classes
    return model


@torch.no_grad()
def scale_head(model: Any, scale: float | None, bias: float | None) -> None:
    """Scale the classifier's initial weights and biases, and set its biases, where these are asked for."""
    if scale is not None:
        for parameter in model.get_classifier().parameters():
            parameter.mul_(scale)
    if bias is not None:
        model.get_classifier().bias.fill_(bias)


def build_loaders(args: argparse.Namespace, data_config: dict[str, Any], device: torch.device) -> tuple[Any, Any]:
    """Training and validation loader; the latter is None without --val-split. Raises DataError."""
    mode = "RGB" if data_config["input_size"][0] == 3 else "L"

    def dataset(split: str, training: bool) -> Any:
        samples = args.train_num_samples if training else args.val_num_samples
        return open_dataset(
            args.dataset, args.data_dir, split, skip_broken=args.skip_broken_images, is_training=training,
            download=args.dataset_download, class_map=args.class_map, batch_size=args.batch_size, seed=args.seed,
            num_samples=samples, input_img_mode=mode, input_key=args.input_key, target_key=args.target_key,
        )  # fmt: skip

    train = dataset(args.train_split, True)
    validation = dataset(args.val_split, False) if args.val_split else None
    check_classes(train, validation or train, args.num_classes)
    shared = {
        "input_size": data_config["input_size"], "mean": data_config["mean"], "std": data_config["std"],
        "num_workers": args.workers, "pin_memory": args.pin_mem, "device": device, "distributed": args.distributed,
    }  # fmt: skip
    mixup = None
    if args.mixup or args.cutmix:
        mixup = FastCollateMixup(
            mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
            num_classes=args.num_classes,
        )  # fmt: skip
    train_loader = create_loader(
        train, batch_size=args.batch_size, is_training=True, no_aug=args.no_aug, re_prob=args.reprob,
        re_mode=args.remode, re_count=args.recount, train_crop_mode=args.train_crop_mode, scale=args.scale,
        ratio=args.ratio, hflip=args.hflip, vflip=args.vflip, color_jitter=args.color_jitter, auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats, collate_fn=mixup,
        interpolation=data_config["interpolation"] if args.no_aug else args.train_interpolation,
        persistent_workers=False,  # new workers each epoch take their seed from it, old ones can't be resumed
        **shared,
    )  # fmt: skip
    if not len(train_loader):
        raise DataError(f"the training split has {len(train)} images, fewer than one batch of {args.batch_size}")
    if validation is None:
        return train_loader, None
    batch_size = args.validation_batch_size or args.batch_size
    return train_loader, create_loader(
        validation, batch_size=batch_size, is_training=False, interpolation=data_config["interpolation"],
        crop_pct=data_config["crop_pct"], **shared,
    )  # fmt: skip


def seed_epoch(args: argparse.Namespace, loader: Any, epoch: int) -> None:
    """Derive all randomness of an epoch from (seed, epoch, rank): a resumed run then needs no generator states."""
    random_seed(random.Random(f"{args.seed}/{epoch}").getrandbits(31), args.rank)
    for part in (loader.dataset, loader.sampler):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        loader.mixup_enabled = False


class Run:
    """One training run: the model with all that training changes, and the folder that keeps it."""

    def __init__(self, args: argparse.Namespace, resume: Path | None) -> None:
        self.args, self.resume = args, resume
        self.rows: list[dict[str, Any]] = []  # of summary.csv
        self.folder: Path | None = None  # on the first process only
        self.device = init_distributed_device(args)
        model = build_model(args)
        data_config = resolve_data_config(vars(args), model=model)
        self.train_loader, self.eval_loader = build_loaders(args, data_config, self.device)
        model.to(self.device)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        soft = bool(args.mixup or args.cutmix)
        loss = {"loss_type": "bce" if args.bce_loss else "ce", "smoothing": args.smoothing, "soft_targets": soft}
        if args.bce_loss:
            loss["bce_target_thresh"] = args.bce_target_thresh
        self.task = ClassificationTask(model, criterion_kwargs=loss, device=self.device, verbose=False)
        scaled = args.amp and args.amp_dtype == "float16" and self.device.type == "cuda"
        self.scaler = NativeScaler() if scaled else None
        self.autocast: Any = nullcontext
        if args.amp:
            self.autocast = partial(torch.autocast, self.device.type, dtype=getattr(torch, args.amp_dtype))
        self.build_optimizer()
        if args.model_ema:
            self.task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        name = args.experiment or "-".join(
            [datetime.now().strftime("%Y%m%d-%H%M%S"), safe_model_name(args.model), str(data_config["input_size"][-1])]
        )
        folder = Path(args.output, name)
        if resume and not args.experiment:
            folder = resume if resume.is_dir() else resume.parent
        checkpoint = find_checkpoint(resume)
        self.start_epoch, history = self.restore(checkpoint) if checkpoint else (0, {})
        if args.torchcompile:
            self.task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if args.distributed:
            self.task.prepare_distributed(device_ids=[self.device] if self.device.type == "cuda" else None)
        if args.rank == 0:
            self.open_folder(folder, history)
        if self.scheduler and self.start_epoch:  # after open_folder, which saves what was restored once more
            self.scheduler.step(self.start_epoch)
            self.scheduler.step_update(self.start_epoch * self.updates)

    def build_optimizer(self) -> None:
        args = self.args
        self.updates = math.ceil(len(self.train_loader) / args.grad_accum_steps)  # per epoch
        if not args.lr:
            ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
            root = args.lr_base_scale == "sqrt" or (
                not args.lr_base_scale and any(word in args.opt.lower() for word in ("ada", "lamb"))
            )
            args.lr = args.lr_base * (ratio**0.5 if root else ratio)
        with explained("can't create optimizer or schedule"):
            model: Any = self.task.get_trainable_module()
            self.optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
            self.scheduler, self.epochs = create_scheduler_v2(
                self.optimizer, **scheduler_kwargs(args, decreasing_metric=args.eval_metric == "loss"),
                updates_per_epoch=self.updates,
            )  # fmt: skip

    def restore(self, path: Path) -> tuple[int, dict[str, Any]]:
        """Load a checkpoint; return the epoch to start with and the state of the CheckpointSaver at the one before."""
        state = read_checkpoint(path, self.args.model)
        with explained(f"checkpoint {path} doesn't fit model {self.args.model} with these options"):
            self.task.load_checkpoint_state(clean_state_dict(state["state_dict"]))
            if self.task.has_ema():
                ema = state.get("state_dict_ema", state["state_dict"])
                self.task.load_checkpoint_state(clean_state_dict(ema), ema=True)
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler and self.scaler.state_dict_key in state:
                self.scaler.load_state_dict(state[self.scaler.state_dict_key])
        start = state["epoch"] + 1
        if start > self.epochs or (start == self.epochs and is_saved(path.parent)):
            raise UserError(f"--resume {path}: the run is finished ({start} of {self.epochs} epochs); raise --epochs")
        return start, state.get("saver", {})

    def open_folder(self, folder: Path, history: dict[str, Any]) -> None:
        """Make or reopen the folder of the run; finish the save that a kill may have cut short."""
        resumed = self.resume is not None and folder in (self.resume, self.resume.parent)
        begun = folder.is_dir() and any(path.name != "tmp-args.yaml" for path in folder.iterdir())
        if not resumed and (begun or folder.is_file()):
            raise UserError(f"output folder {folder} exists: choose another --experiment or continue it with --resume")
        with explained(f"can't write to output folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "args.yaml", yaml.safe_dump(self.args.given, default_flow_style=False))
            self.rows = read_summary(folder, self.start_epoch) if resumed else []
        self.folder = folder
        self.saver = CheckpointSaver(
            model=self.task.get_trainable_module(), optimizer=self.optimizer, amp_scaler=self.scaler, task=self.task,
            args=argparse.Namespace(**{k: v for k, v in vars(self.args).items() if k != "given"}),
            checkpoint_dir=str(folder), recovery_dir=str(folder), decreasing=self.args.eval_metric == "loss",
            max_history=self.args.checkpoint_hist,
        )  # fmt: skip
        if self.start_epoch:
            with self.saving():
                self.saver.load_state_dict({**history, "pending": (None, None)})
                self.saver.save_checkpoint(self.start_epoch - 1, history.get("pending", (None, None))[1])
                plot_curves(folder, self.rows)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Where a full disk ends the run with a line, leaving the checkpoint before this one."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
            for path in Path(str(self.folder)).glob("*tmp*"):
                path.unlink()
            reason = " ".join(str(error).split())
            raise UserError(f"can't save to {self.folder} ({reason}); make room, then {self.resume_command}") from error

    def log(self, line: str) -> None:
        """Print a line, and add it to train.log in the folder of the run."""
        print(line, flush=True)
        if self.folder:
            with self.saving(), open(self.folder / "train.log", "a") as file:
                file.write(line + "\n")

    @property
    def resume_command(self) -> str:
        return f"continue with: python {shlex.quote(sys.argv[0])} --resume {shlex.quote(str(self.folder))}"

    def train(self) -> None:
        """All remaining epochs."""
        if self.args.eval_first and not self.start_epoch:
            self.evaluate_start()
        for epoch in range(self.start_epoch, self.epochs):
            seed_epoch(self.args, self.train_loader, epoch)
            row: dict[str, Any] = {"epoch": epoch, "train_loss": self.train_one_epoch(epoch)}
            if self.eval_loader is not None:
                metrics = self.evaluate(epoch)
                if self.task.has_ema():
                    metrics = self.evaluate(epoch, ema=True)
                row.update({f"eval_{k}": v for k, v in metrics.items()})
            self.check_epoch(epoch, row)
            groups = self.optimizer.param_groups
            row["lr"] = sum(group["lr"] for group in groups) / len(groups)
            if self.folder:
                self.save(epoch, row)
            if self.scheduler:
                self.scheduler.step(epoch + 1)

    def check_epoch(self, epoch: int, row: dict[str, Any]) -> None:
        """Raises Diverged rather than save weights that are not finite; all processes have the same ones."""
        losses, model = (row["train_loss"], row.get("eval_loss", 0.0)), unwrap_model(self.task.get_trainable_module())
        if not all_finite(losses, model.parameters()):
            raise diverged(math.nan, f"after epoch {epoch}")

    def check_loss(self, loss: float, epoch: int, update: int) -> None:
        """Raises Diverged in all processes if in one of them the loss of a batch is not finite."""
        found = loss
        if self.args.distributed:  # one process alone that stops would leave the others waiting for it
            total = torch.tensor(loss, device=self.device)
            torch.distributed.all_reduce(total)
            found = total.item()
        if not math.isfinite(found):
            raise diverged(loss if not math.isfinite(loss) else found, f"in epoch {epoch}, update {update}")

    def evaluate_start(self) -> None:
        """What the weights do before training, as epoch -1 in start.csv."""
        if self.eval_loader is None:
            raise UserError("--eval-first needs a validation split (--val-split)")
        row = {"epoch": -1, **{f"eval_{k}": v for k, v in self.evaluate(-1).items()}}
        if self.folder:
            with self.saving():
                write_rows(self.folder / START, [row], list(row))

    def train_one_epoch(self, epoch: int) -> float:
        """One pass over the training data; returns the mean loss of all processes."""
        args, task, losses, accum = self.args, self.task, AverageMeter(), self.args.grad_accum_steps
        batches = len(self.train_loader)
        images, start, update = 0, time.time(), epoch * self.updates
        task.train()
        bar = tqdm(self.train_loader, f"epoch {epoch}", leave=False, disable=args.rank > 0 or not sys.stderr.isatty())
        for i, (x, y) in enumerate(bar):
            last = (i + 1) % accum == 0 or i + 1 == batches
            group = min(accum, batches - i // accum * accum)  # batches in this update
            x = x.contiguous(memory_format=torch.channels_last) if args.channels_last else x
            with nullcontext() if last else task.no_sync():
                with self.autocast():
                    loss = task(x, y)["loss"]
                value = loss.item()
                self.check_loss(value, epoch, update - epoch * self.updates)
                self.backward(loss / group, last)
            losses.update(value, len(x))
            images += len(x) * args.world_size
            if not last:
                continue
            update += 1
            task.update_ema(step=update)
            if self.scheduler:
                self.scheduler.step_update(update)
            speed = images / (time.time() - start)
            bar.set_postfix_str(f"loss {losses.avg:.4f}, {speed:.0f} img/s", refresh=False)
            done = update - epoch * self.updates
            if bar.disable and args.rank == 0 and (done % args.log_interval == 0 or done == self.updates):
                self.log(f"epoch {epoch} update {done}/{self.updates} loss {losses.avg:.4f} {speed:.0f} img/s")
        if not args.distributed:
            return losses.avg
        for ema in (False, True) if task.has_ema() else (False,):
            distribute_bn(task.get_trainable_module(ema=ema), args.world_size, reduce=True)
        mean = torch.tensor(losses.avg, device=self.device)
        torch.distributed.all_reduce(mean)
        return mean.item() / args.world_size

    def backward(self, loss: torch.Tensor, update: bool) -> None:
        """Add the gradient of a loss; update the weights if it completes a batch."""
        args, agc = self.args, self.args.clip_mode == "agc"
        parameters = None if args.clip_grad is None else self.task.get_clip_parameters(exclude_head=agc)
        if self.scaler:
            self.scaler(loss, self.optimizer, args.clip_grad, args.clip_mode, parameters, need_update=update)
        else:
            loss.backward()
            if update and args.clip_grad is not None:
                dispatch_clip_grad(parameters, args.clip_grad, args.clip_mode)
            if update:
                self.optimizer.step()
        if update:
            self.optimizer.zero_grad()

    @torch.inference_mode()
    def evaluate(self, epoch: int, ema: bool = False) -> dict[str, float]:
        """Loss, top-1 and top-5 (percent), share of dead units and zeros (0..1) on the validation data."""
        args = self.args
        model = unwrap_model(self.task.get_trainable_module(ema=ema)).eval()
        evaluator = self.task.create_evaluator(max_samples=evaluation_sample_limit(self.eval_loader))
        quiet = args.rank > 0 or not sys.stderr.isatty()
        with track_activations(model) as activations:
            for x, y in tqdm(self.eval_loader, "validation", leave=False, disable=quiet):
                x = x.contiguous(memory_format=torch.channels_last) if args.channels_last else x
                with self.autocast():
                    output = model(x)
                evaluator.update(output, y)
        if args.distributed:
            activations.reduce()
        metrics = dict(evaluator.compute(distributed=args.distributed))
        metrics.update(dead_units=activations.dead, sparsity=activations.sparsity)
        if args.rank == 0:
            text = " ".join(f"{k} {v:.3f}" for k, v in metrics.items())
            self.log(f"epoch {epoch} validation{' (EMA)' if ema else ''}: {text}")
        return metrics

    def save(self, epoch: int, row: dict[str, Any]) -> None:
        """Summary first, checkpoint second: a kill in between leaves a row that the resumed run replaces."""
        assert self.folder
        self.rows.append(row)
        metric = row.get(f"eval_{self.args.eval_metric}", row["train_loss"])
        with self.saving():
            write_summary(self.folder, self.rows)
            self.saver.save_checkpoint(epoch, metric)
            plot_curves(self.folder, self.rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns 0, 3 if the loss stops being finite, or 130 after Ctrl-C.

    A user's mistake exits with status 2 and one line on stderr.
    """
    run: Run | None = None
    try:
        args, resume = parse_args(sys.argv[1:] if argv is None else argv, __doc__ or "")
        import_modules(args.device_modules)
        run = Run(args, resume)
        run.train()
    except UserError as error:
        Parser("train.py").error(str(error))
    except Diverged as error:
        assert run
        if run.args.rank == 0:
            kept = f"; weights of the epoch before: {run.folder}/last.pth.tar" if run.rows else ""
            print(f"train.py: error: {error}{kept}", file=sys.stderr)
        return STATUS
    except KeyboardInterrupt:
        if run and run.folder:
            print(f"\ninterrupted; {run.resume_command}", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if run.folder:
        best = f"; best {args.eval_metric} {run.saver.best_metric:.3f} in epoch {run.saver.best_epoch}"
        print(f"done: {run.folder}{best}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
