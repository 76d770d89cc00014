"""The folder of a training run, named and laid out as by timm: args.yaml, summary.csv, checkpoints; and curves.png."""

from __future__ import annotations

import argparse
import csv
import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lab.cli import UserError, explained
from lab.files import read_rows, save_figure, write_atomically
from lab.training.seal import check_seal

# One row each as of summary.csv: on the weights before training, and on the network that a conversion starts from.
START, ORIGINAL = BEFORE = ("start.csv", "original.csv")
_LAST, _PARTIAL = "last.pth.tar", "tmp.pth.tar"  # as timm's CheckpointSaver names them
FORK = "fork: "  # how train.log begins where a run goes on that is in another folder
DAMAGE = (AttributeError, IndexError, struct.error)  # what torch.load raises for a damaged file beside the usual


def find_checkpoint(resume: Path | None) -> Path | None:
    """The newest whole checkpoint of a run folder (or the file itself); None if the run was killed before its first.

    Raises UserError for a fork that was: it would begin from other weights than it was to.
    """
    if resume is None or resume.is_file() or (resume / _LAST).exists():
        return resume / _LAST if resume and resume.is_dir() else resume
    # A kill between removing the old last.pth.tar and renaming the new one into place.
    newest_first = sorted(numbered_checkpoints(resume).items(), reverse=True)
    for path in (resume / _PARTIAL, *(path for _, path in newest_first)):
        try:
            read_checkpoint(path, None)
        except UserError:
            continue
        return path
    log = resume / "train.log"
    if log.exists() and log.read_text(encoding="utf-8", errors="replace").startswith(FORK):
        raise UserError(
            f"{resume} was to go on from another run and ended before its first checkpoint: remove it, then give the "
            "command again that began it"
        )
    return None


def numbered_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run that have their epoch in their name, by epoch."""
    found = {path.name[11:-8]: path for path in folder.glob("checkpoint-*.pth.tar")}
    return {int(number): path for number, path in found.items() if number.isdecimal()}


def measure(args: argparse.Namespace) -> str:
    """The column of summary.csv in which the best checkpoint is best."""
    return f"eval_{args.eval_metric}" if args.val_split else "train_loss"


def is_saved(folder: Path) -> bool:
    """Whether the last save was not cut short: the curves are drawn after the checkpoints are in place."""
    last, curves = folder / _LAST, folder / "curves.png"
    return last.exists() and curves.exists() and curves.stat().st_mtime_ns >= last.stat().st_mtime_ns


def load_file(path: Path) -> Any:
    """What torch.save wrote, on the CPU; nothing in it is executed, but timm's options (a Namespace) are allowed.

    Raises ValueError where the content differs from its SHA-256, and what torch.load raises.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose message would tell users to let the file execute code
        raise ValueError("it is damaged, no file of torch.save, or holds more than tensors and simple values") from None
    check_seal(state)
    return state


def read_checkpoint(path: Path, model: str | None) -> dict[str, Any]:
    """A training checkpoint on the CPU. Raises UserError if it is damaged, something else, or of another model."""
    with explained(f"{path} is not a whole checkpoint", *DAMAGE):
        state = load_file(path)
    if not isinstance(state, dict) or not {"state_dict", "optimizer", "epoch"} <= state.keys():
        raise UserError(f"{path} is not a training checkpoint (no optimizer state); use it as --initial-checkpoint")
    kinds = {
        "state_dict": dict,
        "optimizer": dict,
        "epoch": int,
        "saver": dict,
        "arch": str,
        "args": argparse.Namespace,
    }
    odd = [name for name, kind in kinds.items() if not isinstance(state.get(name, kind()), kind)]
    if odd or state["epoch"] < 0:
        raise UserError(f"{path} is not a training checkpoint: its {', '.join(odd) or 'epoch'} can't be used")
    if model:
        check_model(state, path, model)
    return state


def check_model(state: dict[str, Any], path: Path, model: str) -> None:
    """Raises UserError for a checkpoint of another model."""
    if state.get("arch", str(model)).split(".")[0] != str(model).split(".")[0]:
        raise UserError(f"{path} is a checkpoint of {state['arch']}, not of {model}")


def check_numbers(weights: dict[str, Any], model: nn.Module) -> None:
    """Raises ValueError for weights that are whole or complex numbers where the model has real ones.

    Counters may be real numbers, as in a checkpoint that was halved whole.
    """
    for name, own in model.state_dict().items():
        if own.is_floating_point() and name in weights and not weights[name].is_floating_point():
            raise ValueError(f"{name} is {weights[name].dtype}, not {own.dtype}")


def check_unchanged(state: dict[str, Any], args: argparse.Namespace, path: Path, folder: Path) -> None:
    """Raises UserError if a checkpoint comes from options that can't change where a run goes on in `folder`.

    Nor can the weights of the network that a conversion starts from.
    """
    before = argparse.Namespace(**vars(args) | vars(state.get("args") or argparse.Namespace()))
    if before.opt != args.opt:
        raise UserError(f"{path} has the state of --opt {before.opt}, not {args.opt}: use it as --initial-checkpoint")
    if vars(before).get("teacher") != vars(args).get("teacher"):
        raise UserError(f"{path}: the network that is converted has changed since; begin anew, without --resume")
    if measure(before) != measure(args) and path.parent.resolve() == folder.resolve():
        chosen = f"the best checkpoint was chosen by {measure(before)}, not by {measure(args)}"
        raise UserError(f"{path.parent}: {chosen}; add --experiment to go on in another folder")


# Options by which a run that is resumed doesn't change: of the machine, of what is shown, of how it began.
_WITHOUT_EFFECT = frozenset(
    {"data_dir", "output", "experiment", "device", "workers", "pin_mem", "log_interval", "checkpoint_hist"}
    | {"dataset_download", "validation_batch_size", "eval_first", "grad_checkpointing", "torchcompile"}
    | {"torchcompile_mode", "pretrained", "pretrained_path", "initial_checkpoint", "checkpoint", "calibration"}
)


def asked(given: dict[str, Any]) -> dict[str, Any]:
    """The options that say how a run trains, as a checkpoint keeps them."""
    return {key: value for key, value in given.items() if key not in _WITHOUT_EFFECT}


def change_of(before: dict[str, Any], given: dict[str, Any], start: int) -> str:
    """One line on what `asked` returned before epoch `start`, and returns from there on; empty if nothing differs."""
    keys = [key for key in before if key in given and before[key] != given[key]]
    differ = [f"{key} {_shown(before[key])} -> {_shown(given[key])}" for key in keys]
    return f"from epoch {start} on: {', '.join(differ)}" if differ else ""


def _shown(value: Any) -> str:
    """The value of an option; of a path the name alone, since the line is published."""
    return Path(value).name if isinstance(value, str) and os.sep in value else str(value)


def read_summary(folder: Path, epochs: int) -> list[dict[str, Any]]:
    """The rows of summary.csv of the first `epochs` epochs, none if there is no such file.

    Raises UserError for one that is damaged.
    """
    path = folder / "summary.csv"
    with explained(f"{path} is damaged; mend or remove it", csv.Error):
        rows: list[dict[str, Any]] = list(read_rows(path))
        if path.exists() and "epoch" not in (rows[0] if rows else ()):
            raise ValueError("it has no epochs")
        for line, row in enumerate(rows, 2):
            if None in row or None in row.values():
                raise ValueError(f"line {line} has not as many columns as the first")
            for number in row.values():
                float(number or 0)
            if int(row["epoch"]) != int(rows[0]["epoch"]) + line - 2:
                raise ValueError(f"line {line} is not the epoch after the one before")
        return [row for row in rows if int(row["epoch"]) < epochs]


def write_summary(folder: Path, rows: list[dict[str, Any]]) -> None:
    """All rows as summary.csv, the columns being those of the last row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[-1]), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "summary.csv", text.getvalue())


def plot_curves(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Loss, accuracy and activity over the epochs, as curves.png."""
    if not rows:
        return
    from matplotlib.figure import Figure  # here, since it takes long to import and only training draws

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    panels = {
        "loss": ("train_loss", "eval_loss"),
        "accuracy (%)": ("eval_top1", "eval_top5"),
        "hidden activations (share)": ("eval_dead_units", "eval_sparsity"),
    }
    for axes, (title, keys) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for key in keys:
            if key in rows[-1]:
                points = [(int(row["epoch"]), float(row[key])) for row in rows if row.get(key, "") != ""]
                axes.plot(*zip(*points, strict=True), ".-", label=key.removeprefix("eval_"))
                axes.legend()
        axes.set(title=title, xlabel="epoch")
    save_figure(figure, folder / "curves.png")
