"""One training run: its epochs, and what is measured in each."""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.data.readers.reader_wds import ReaderWds
from timm.task import evaluation_sample_limit
from timm.utils import AverageMeter, dispatch_clip_grad, distribute_bn, random_seed, unwrap_model
from tqdm import tqdm

from lab.cli import Parser, UserError, explained, import_modules, outside, say
from lab.training.data import DataError
from lab.training.divergence import STATUS, Diverged, all_finite, diverged
from lab.training.prepared import Prepared
from lab.training.runs import DAMAGE, measure
from timm_sugar.diagnostics import track_activations


def seed_epoch(args: argparse.Namespace, loader: Any, epoch: int) -> None:
    """Derive all randomness of an epoch from (seed, epoch, rank): a resumed run then needs no generator states."""
    random_seed(random.Random(f"{args.seed}/{epoch}").getrandbits(31), args.rank)
    for part in (loader.dataset, loader.sampler):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
    reader: Any = getattr(loader.dataset, "reader", None)
    if isinstance(reader, ReaderWds) and not args.workers:  # would shuffle on from the epoch before
        reader.ds, reader.worker_seed = None, random.Random(f"{args.seed}/{epoch}/{args.rank}").getrandbits(31)
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        loader.mixup_enabled = False


def run_command(prog: str, kind: type[Run], parse: Callable[[], tuple[argparse.Namespace, Path | None]]) -> int:
    """Parse and train; returns 0, 3 if the loss stops being finite, or 130 after Ctrl-C.

    A user's mistake exits with status 2 and one line on stderr.
    """
    run: Run | None = None
    try:
        args, resume = parse()
        import_modules(args.device_modules)
        run = kind(args, resume)
        run.train()
    except UserError as error:
        Parser(prog).error(str(error))
    except OSError as error:
        Parser(prog).error(outside(error))
    except Diverged as error:
        if run and run.folder:
            last = run.folder.path / "last.pth.tar"
            kept = f"; weights of the epoch before: {last}" if last.exists() else ""
            print(f"{prog}: error: {error}{kept}", file=sys.stderr)
        return STATUS
    except KeyboardInterrupt:
        if run and run.folder:
            print(f"\ninterrupted; {run.folder.resume_command}", file=sys.stderr)
        return 130
    finally:
        if run:
            run.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if run.folder:
        saver, what = run.folder.saver, measure(args).removeprefix("eval_")
        say(f"done: {run.folder.path}; best {what} {saver.best_metric:.3f} in epoch {saver.best_epoch}")
    return 0


class Run(Prepared):
    """One training run."""

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
                self.folder.saver.args = self.checkpoint_args()
                self.folder.save(epoch, row, row[measure(self.args)])
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
            self.folder.save_start(row)

    def train_one_epoch(self, epoch: int) -> float:
        """One pass over the training data; returns the mean loss of all processes."""
        args, losses, start = self.args, AverageMeter(), time.time()
        self.task.train()
        bar = tqdm(self.train_loader, f"epoch {epoch}", leave=False, disable=args.rank > 0 or not sys.stderr.isatty())
        for i, (x, y) in enumerate(bar):
            done = i // args.grad_accum_steps  # updates in this epoch
            with self.trial():
                losses.update(self.train_one_batch(x, y, i, epoch), len(x))
            if not self.completes_update(i):
                continue
            done += 1
            self.tried = True
            self.after_update(epoch * self.updates + done)
            speed = losses.count * args.world_size / (time.time() - start)
            bar.set_postfix_str(f"loss {losses.avg:.4f}, {speed:.0f} img/s", refresh=False)
            if self.folder and bar.disable and (done % args.log_interval == 0 or done == self.updates):
                self.folder.log(f"epoch {epoch} update {done}/{self.updates} loss {losses.avg:.4f} {speed:.0f} img/s")
        if not losses.count:
            raise DataError("the training split gave no image")
        return self.gather(losses.avg) if args.distributed else losses.avg

    def trial(self) -> AbstractContextManager[None]:
        """Around the batches of the first update, where options, model and a restored state meet for the first time."""
        origin = f" with the state in {self.restored}" if self.restored else ""
        return nullcontext() if self.tried else explained(f"can't make the first update{origin}", *DAMAGE)

    def completes_update(self, batch: int) -> bool:
        """Whether the weights change after this batch of the epoch."""
        return (batch + 1) % self.args.grad_accum_steps == 0 or batch + 1 == len(self.train_loader)

    def train_one_batch(self, x: torch.Tensor, y: torch.Tensor, batch: int, epoch: int) -> float:
        """Forward and backward; returns the loss."""
        accum, last = self.args.grad_accum_steps, self.completes_update(batch)
        group = min(accum, len(self.train_loader) - batch // accum * accum)  # batches in this update
        x = x.contiguous(memory_format=torch.channels_last) if self.args.channels_last else x
        with nullcontext() if last else self.task.no_sync():
            with self.autocast():
                loss = self.task(x, y)["loss"]
            value = loss.item()
            self.check_loss(value, epoch, batch // accum)
            self.backward(loss / group, last)
        return value

    def after_update(self, update: int) -> None:
        """Let moving average, learning rate and surrogate follow; `update` counts from the start of the run."""
        self.task.update_ema(step=update)
        for schedule in self.surrogate_schedules:
            schedule.step()
        if self.scheduler:
            self.scheduler.step_update(update)

    def gather(self, loss: float) -> float:
        """Give all processes the same batch statistics; returns the mean of their losses."""
        for ema in (False, True) if self.task.has_ema() else (False,):
            distribute_bn(self.task.get_trainable_module(ema=ema), self.args.world_size, reduce=True)
        mean = torch.tensor(loss, device=self.device)
        torch.distributed.all_reduce(mean)
        return mean.item() / self.args.world_size

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

    def evaluate(self, epoch: int, ema: bool = False) -> dict[str, float]:
        """Loss, top-1 and top-5 (percent), share of dead units and zeros (0..1) on the validation data."""
        return self.evaluate_model(self.task.get_trainable_module(ema=ema), epoch, " (EMA)" if ema else "")

    @torch.inference_mode()
    def evaluate_model(self, model: Any, epoch: int, what: str = "") -> dict[str, float]:
        """The same of any model with these classes; `what` says in the log which it is."""
        args = self.args
        model = unwrap_model(model).eval()
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
        if not evaluator.num_samples:
            raise DataError("the validation split gave no image")
        metrics = dict(evaluator.compute(distributed=args.distributed))
        metrics.update(dead_units=activations.dead, sparsity=activations.sparsity)
        if self.folder:
            text = " ".join(f"{k} {v:.3f}" for k, v in metrics.items())
            self.folder.log(f"epoch {epoch} validation{what}: {text}")
        return metrics
