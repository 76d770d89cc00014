"""A run that turns a trained network into its ReLU self, with the original as the teacher."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import is_model
from timm.task import DistillationTeacher, LogitDistillationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from lab.cli import Parser, UserError, as_options, explained
from lab.files import read_rows
from lab.training.data import check_same_classes
from lab.training.groups import x
from lab.training.loading import INHERITED, find_file, load_weights
from lab.training.options import parse_args
from lab.training.run import Run
from lab.training.runs import ORIGINAL, START
from lab.training.seal import digest
from lab.training.setup import build_model
from timm_sugar import SUGAR
from timm_sugar.models import SUFFIX
from timm_sugar.surgery import other_than_relu

ORDERS = ("all", "input", "output")


def add_options(parser: Parser) -> None:
    """The options of a conversion, beside those of training."""
    add = parser.add_argument_group("conversion").add_argument
    add("--checkpoint", metavar="PATH", help="the trained network: a checkpoint, or the folder of a run")
    add("--surrogate", default="same", metavar="NAME", help="whose gradient ReLU gets (default: %(default)s)")
    teacher = "weight of the distance from the original's outputs, beside the labels; 0 goes without (default: 1)"
    add("--distill", **x(0, default=1.0), help=teacher)
    add("--temperature", **x(above=0, most=1000, default=1.0), help="of those outputs (default: %(default)s)")
    blend = "epochs in which the activations move from the old ones to ReLU (default: 0, ReLU from the first update)"
    add("--blend-epochs", **x(0, default=0.0), help=blend)
    order = "which layers move first: all at once, from the input on, or from the output on (default: %(default)s)"
    add("--blend-order", default="all", choices=ORDERS, help=order)
    add("--no-int8", action="store_true", help="write no model-int8.onnx at the end")


def parse_conversion(argv: Sequence[str], parser: Parser) -> tuple[argparse.Namespace, Path | None]:
    """As `parse_args`, with a parser of both groups of options.

    What a checkpoint knows of its model and data are options, too, before those that are given. `original` is the name
    of the network that is converted, and `model` that of its ReLU self.
    """
    args, resume = parse_args(argv, parser, known_options(argv))
    if "surrogate" in args.model_kwargs:
        raise UserError("--model-kwargs surrogate: a conversion has an option for it, --surrogate")
    if args.model.split(".")[0].endswith(SUFFIX):
        raise UserError(f"--model {args.model} has ReLU already: name the network with the activations to replace")
    if args.checkpoint and args.pretrained:
        raise UserError("--checkpoint and --pretrained both name the trained weights: give one of them")
    if not (args.checkpoint or args.pretrained or args.initial_checkpoint):
        raise UserError("there are no trained weights to convert: give --checkpoint PATH or --pretrained")
    if args.blend_epochs and args.torchcompile:
        raise UserError("--blend-epochs can't be compiled: leave out --torchcompile")
    if args.blend_epochs >= args.epochs:
        raise UserError(
            f"--blend-epochs {args.blend_epochs:g}: leave epochs for ReLU itself, --epochs are {args.epochs}"
        )
    if args.checkpoint:
        args.initial_checkpoint = str(find_file(Path(args.checkpoint)))
    base, dot, tag = args.model.partition(".")
    args.original, args.model = args.model, f"{base}{SUFFIX}{dot}{tag}"
    args.model_kwargs = {**args.model_kwargs, "surrogate": args.surrogate}
    return args, resume


def known_options(argv: Sequence[str]) -> list[str]:
    """What the checkpoint that is named says about its model and data, as options."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--checkpoint")
    first.add_argument("-c", "--config")
    given = first.parse_known_args(argv)[0]
    checkpoint = given.checkpoint
    if given.config and not checkpoint:
        with explained(f"can't read {given.config}"):
            values = yaml.safe_load(Path(given.config).read_text())
            checkpoint = values.get("checkpoint") if isinstance(values, dict) else None
    if not isinstance(checkpoint, str):  # a file that is odd is refused where it is read whole
        return []
    _, _, settings = load_weights(find_file(Path(checkpoint)), ema=True)
    known = {name: settings[name] for name in INHERITED if settings.get(name) not in (None, "", {})}
    return [word for name, value in known.items() for word in as_options(name, value)]


class Blend:
    """Forward hooks that move the value of each SUGAR module from the old activation's to its own, in training.

    In eval mode a module has its own value at once, so that what is measured and kept is the ReLU network.
    """

    def __init__(self, student: nn.Module, original: nn.Module, updates: int, order: str) -> None:
        """`updates` is how many it takes, from 1 on."""
        names = [name for name, module in student.named_modules() if isinstance(module, SUGAR)]
        if order == "output":
            names.reverse()
        self.updates = updates
        self.shares = [0.0] * len(names)  # of each module's own value, 0..1
        self.width = 1 if order == "all" else 1 / len(names)  # of the time in which one moves
        self.starts = [0.0 if order == "all" else i * self.width for i in range(len(names))]
        self.hooks = []
        for i, name in enumerate(names):
            hook = self._hook(i, copy.deepcopy(attrgetter(name)(original)))
            self.hooks.append(student.get_submodule(name).register_forward_hook(hook))

    def _hook(self, i: int, old: Any) -> Any:
        def blend(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
            share = self.shares[i]
            return None if share == 1 or not module.training else torch.lerp(old(inputs[0].clone()), output, share)

        return blend

    def move(self, update: int) -> None:
        """Set the shares after so many updates; at the end nothing is left of the blend."""
        done = update / self.updates
        self.shares = [min(1.0, max(0.0, (done - start) / self.width)) for start in self.starts]
        if update >= self.updates:
            for hook in self.hooks:
                hook.remove()
            self.hooks = []


class Conversion(Run):
    """The training of a ReLU network that begins with the weights of one with other activations."""

    def create_model(self) -> Any:
        """The ReLU network; the original goes into `teacher`."""
        if not is_model(self.args.model):
            raise UserError(
                f"there is no {self.args.model}: sugarize {self.args.original} in your own code (docs/convert.md)"
            )
        own = {key: value for key, value in self.args.model_kwargs.items() if key != "surrogate"}
        original = argparse.Namespace(**{**vars(self.args), "model": self.args.original, "model_kwargs": own})
        self.teacher = build_model(original).eval().requires_grad_(False).to(self.device)
        self.args.teacher = digest({"state_dict": self.teacher.state_dict()}, {})
        if not other_than_relu(self.teacher):
            raise UserError(f"{self.args.original} has no activations but ReLU: there is nothing to convert")
        self.blend: Blend | None = None
        return build_model(self.args)

    def create_task(self, model: Any, loss: dict[str, Any]) -> Any:
        """The labels, and if it has a weight the original's outputs."""
        if self.args.checkpoint:
            known = load_weights(find_file(Path(self.args.checkpoint)), ema=True)[2].get("classes")
            advice = "convert it on the data it knows, then use the result as --initial-checkpoint of scripts/train.py"
            check_same_classes(known, self.train_loader.dataset, self.args.checkpoint, advice)
        if not self.args.distill:
            return super().create_task(model, loss)
        teacher = DistillationTeacher(self.teacher, device=self.device)
        return LogitDistillationTask(
            model, teacher, criterion_kwargs=loss, distill_loss_weight=self.args.distill,
            temperature=self.args.temperature, device=self.device, verbose=False,
        )  # fmt: skip

    def train(self) -> None:
        """Score the original and the bare exchange, then train; print what was lost and won back."""
        if not self.start_epoch and self.eval_loader is not None:
            self.score_original()
            self.evaluate_start()
        self.args.eval_first = False  # done
        if self.args.blend_epochs:
            updates = max(1, round(self.args.blend_epochs * self.updates))
            model = unwrap_model(self.task.get_trainable_module())  # of several processes, too
            self.blend = Blend(model, self.teacher, updates, self.args.blend_order)
            self.blend.move(self.start_epoch * self.updates)
        super().train()
        if self.folder and self.eval_loader is not None:
            self.folder.log(account(self.folder.path))

    def score_original(self) -> None:
        """What the original does, as original.csv."""
        metrics = self.evaluate_model(self.teacher, -1, " of the original")
        if self.folder:
            self.folder.save_start({"epoch": -1, **{f"eval_{k}": v for k, v in metrics.items()}}, ORIGINAL)

    def after_update(self, update: int) -> None:
        """Move the blend, too."""
        super().after_update(update)
        if self.blend:
            self.blend.move(update)


def account(folder: Path) -> str:
    """What the exchange cost, and what training won back, in points of top-1."""
    before = [row for name in (ORIGINAL, START) for row in read_rows(folder / name)]
    trained = float(read_rows(folder / "summary.csv")[-1]["eval_top1"])
    if len(before) < 2:
        return f"top-1: after training {trained:.2f} % ({ORIGINAL} or {START} is gone, so there is nothing to compare)"
    original, exchanged = (float(row["eval_top1"]) for row in before)
    text = f"top-1: original {original:.2f} %, ReLU in its place {exchanged:.2f} %, after training {trained:.2f} %"
    if exchanged < original:
        text += f" ({(trained - exchanged) / (original - exchanged):.0%} of the loss won back)"
    return text
