"""A training run with all its parts in place, before its first epoch or where the run that is resumed was."""

from __future__ import annotations

import argparse
import math
from contextlib import nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.models import clean_state_dict, safe_model_name
from timm.task import ClassificationTask
from timm.utils import NativeScaler, init_distributed_device, unwrap_model

import timm_sugar  # noqa: F401  registers the models
from lab.cli import UserError, explained
from lab.files import environment
from lab.training.data import check_same_classes, class_names
from lab.training.folder import RunFolder
from lab.training.runs import (
    DAMAGE,
    asked,
    change_of,
    check_numbers,
    check_unchanged,
    find_checkpoint,
    is_saved,
    measure,
    read_checkpoint,
)
from lab.training.seal import SealedSaver
from lab.training.setup import build_loaders, build_model, build_optimizer, check_outputs, choose_rate, load_optimizer
from lab.training.surrogates import build_surrogate_schedules, values_in_force


class Prepared:
    """The model with all that training changes, and on the first process the folder that keeps it."""

    def __init__(self, args: argparse.Namespace, resume: Path | None) -> None:
        self.args = args
        self.folder: RunFolder | None = None
        self.restored: Path | None = None
        self.tried = False  # whether an update was made
        self.asked: dict[str, Any] = asked(args.given)  # of the epochs that are done
        self.changes: list[str] = []  # of options among these epochs
        self.device = init_distributed_device(args)
        try:
            self.set_up(resume)
        except BaseException:
            self.close()
            raise

    def set_up(self, resume: Path | None) -> None:
        """Build all parts, and bring them to where the run that is resumed was."""
        if resume and self.args.rank == 0:
            self.folder = RunFolder(Path(self.args.output, self.args.experiment), resume)
        self.build_task()
        self.build_precision()
        self.build_optimizer()
        checkpoint = find_checkpoint(resume)
        self.start_epoch, history = self.restore(checkpoint) if checkpoint else (0, {})
        self.build_surrogate_schedules()
        self.prepare_task()
        if self.args.rank == 0:
            self.open_folder(history)
        if self.scheduler and self.start_epoch:  # after open_folder, which saves what was restored once more
            self.scheduler.step(self.start_epoch)
            self.scheduler.step_update(self.start_epoch * self.updates)

    def close(self) -> None:
        """Let other processes have the folder."""
        if self.folder:
            self.folder.lock.release()

    def build_task(self) -> None:
        """The model with its loss, and the loaders of its data."""
        args = self.args
        model = self.create_model()
        with explained(f"can't prepare images for model {args.model}"):
            self.data_config = resolve_data_config(vars(args), model=model)
        self.train_loader, self.eval_loader = build_loaders(args, self.data_config, self.device)
        check_outputs(model, self.data_config["input_size"], self.device)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        soft = bool(args.mixup or args.cutmix)
        loss = {"loss_type": "bce" if args.bce_loss else "ce", "smoothing": args.smoothing, "soft_targets": soft}
        if args.bce_loss:
            loss["bce_target_thresh"] = args.bce_target_thresh
        self.task = self.create_task(model, loss)
        if args.model_ema:
            self.task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)

    def create_model(self) -> Any:
        """The model to train, on the CPU."""
        return build_model(self.args)

    def create_task(self, model: Any, loss: dict[str, Any]) -> Any:
        """The model with what it is to learn; `loss` are the settings of timm's classification loss."""
        return ClassificationTask(model, criterion_kwargs=loss, device=self.device, verbose=False)

    def build_precision(self) -> None:
        """Autocast, and the scaling of losses that float16 needs."""
        args = self.args
        scaled = args.amp and args.amp_dtype == "float16" and self.device.type == "cuda"
        self.scaler = NativeScaler() if scaled else None
        self.autocast: Any = nullcontext
        if args.amp:
            self.autocast = partial(torch.autocast, self.device.type, dtype=getattr(torch, args.amp_dtype))

    def build_optimizer(self) -> None:
        """Optimizer and schedule, at the learning rate of an update."""
        self.updates = math.ceil(len(self.train_loader) / self.args.grad_accum_steps)  # per epoch
        self.args.lr = choose_rate(self.args)
        model = self.task.get_trainable_module()
        self.optimizer, self.scheduler, self.epochs = build_optimizer(self.args, model, self.updates)

    def build_surrogate_schedules(self) -> None:
        """Parameters of surrogates that change, where the updates that were done have brought them."""
        model: Any = self.task.get_trainable_module()
        self.surrogate_schedules = build_surrogate_schedules(self.args, model, self.epochs * self.updates)
        for schedule in self.surrogate_schedules:
            schedule.load_state_dict({"done": self.start_epoch * self.updates})

    def checkpoint_args(self) -> argparse.Namespace:
        """The settings as a checkpoint has them: with the values of the surrogate's parameters in force now."""
        settings = {key: value for key, value in vars(self.args).items() if key != "given"}
        settings["model_kwargs"] = self.args.model_kwargs | values_in_force(self.surrogate_schedules)
        settings["all_epochs"] = self.epochs  # those of warm-up and cool-down that a schedule adds, too
        settings["environment"] = environment(self.device.type)
        settings["asked"], settings["changes"] = self.asked, self.changes
        settings["classes"] = class_names(self.train_loader.dataset)
        return argparse.Namespace(**settings)

    def prepare_task(self) -> None:
        """Compile the training step and share it among processes, after the weights are in place."""
        args = self.args
        if args.torchcompile:
            with explained(f"--torchcompile {args.torchcompile}"):
                self.task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if args.distributed:
            self.task.prepare_distributed(device_ids=[self.device] if self.device.type == "cuda" else None)

    def restore(self, path: Path) -> tuple[int, dict[str, Any]]:
        """Load a checkpoint; return the epoch to start with and the state of the saver at the one before."""
        state = read_checkpoint(path, self.args.model)
        check_unchanged(state, self.args, path, Path(self.args.output, self.args.experiment))
        known = vars(state.get("args") or argparse.Namespace()).get("classes")
        check_same_classes(known, self.train_loader.dataset, str(path), "use it as --initial-checkpoint")
        with explained(f"checkpoint {path} doesn't fit model {self.args.model} with these options", *DAMAGE):
            for ema in (False, True) if self.task.has_ema() else (False,):
                weights = state.get("state_dict_ema", state["state_dict"]) if ema else state["state_dict"]
                weights = clean_state_dict(weights)
                check_numbers(weights, unwrap_model(self.task.get_trainable_module(ema=ema)))
                self.task.load_checkpoint_state(weights, ema=ema)
            load_optimizer(self.optimizer, state["optimizer"], scheduled=self.scheduler is not None)
            if self.scaler and self.scaler.state_dict_key in state:
                self.scaler.load_state_dict(state[self.scaler.state_dict_key])
        self.restored, start = path, state["epoch"] + 1
        known = vars(state.get("args") or argparse.Namespace())
        self.asked, self.changes = known.get("asked", self.asked), list(known.get("changes", ()))
        if start > self.epochs or (start == self.epochs and self.is_whole(path.parent)):
            raise UserError(f"--resume {path}: the run is finished ({start} of {self.epochs} epochs); raise --epochs")
        return start, state.get("saver", {})

    def is_whole(self, folder: Path) -> bool:
        """Whether the folder of a run that has made its last epoch lacks nothing."""
        return is_saved(folder)

    def open_folder(self, history: dict[str, Any]) -> None:
        """Make or reopen the folder of the run, and let it keep checkpoints; `history` is the saver's state."""
        args = self.args
        if not self.folder:
            size = str(self.data_config["input_size"][-1])
            name = "-".join([datetime.now().strftime("%Y%m%d-%H%M%S"), safe_model_name(args.model), size])
            self.folder = RunFolder(Path(args.output, args.experiment or name), None)
        self.folder.open(args, self.start_epoch)
        saver = SealedSaver(
            model=self.task.get_trainable_module(), optimizer=self.optimizer, amp_scaler=self.scaler, task=self.task,
            args=self.checkpoint_args(), checkpoint_dir=str(self.folder.path), recovery_dir=str(self.folder.path),
            decreasing=measure(args).endswith("loss"), max_history=args.checkpoint_hist,
        )  # fmt: skip
        self.folder.keep(saver, self.start_epoch, history)
        now = asked(args.given)
        if change := change_of(self.asked, now, self.start_epoch):
            self.folder.log(change)
            self.asked, self.changes = now, [*self.changes, change]
