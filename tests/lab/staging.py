"""What the tests of publishing share: tiny finished runs, and folders of models made from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.files import write_atomically
from lab.release.card import CARD, card
from lab.release.stage import TrainedRun, stage
from scripting import CLASSES, load_script, make_images

SWIN = ("--img-size", "64", "--model-kwargs", "img_size=64", "embed_dim=12", "depths=(1,1,1,1)", "num_heads=(1,1,1,1)")
MEASURED = {"top1": 90.0, "top5": 100.0, "loss": 0.3, "dead_units": 0.01, "sparsity": 0.5, "images": 12}
VERSIONS = {"device": "CPU", "torch": "2", "timm": "1", "timm_sugar": "0", "command": "python scripts/evaluate.py"}


def train(root: Path, model: str, *options: str) -> Path:
    """A finished run of one epoch on a few noisy images below `root`."""
    data = root / "data"
    if not data.exists():
        make_images(data)
    size = [] if {"--img-size", "--input-size"} & {*options} else ["--img-size", "32"]
    argv = ["--data-dir", str(data), "--model", model, "--num-classes", "3", *size, "--epochs", "1"]
    argv += ["--warmup-epochs", "0", "-b", "8", "-j", "0", "--output", str(root), "--experiment", model, *options]
    assert load_script("train").main(argv) == 0
    return root / model


def make_folder(run: Path, folder: Path, measure: Callable[[Path], dict[str, Any]] | None = None, **more: Any) -> Path:
    """The folder of a model, staged with made-up measurements."""
    about = {"org": "timm-sugar", "dataset": "toys", "notes": []}
    made_up = MEASURED | VERSIONS
    stage(
        TrainedRun(run), folder, licence="apache-2.0", labels=list(CLASSES), about=about,
        measure=measure or (lambda _: dict(made_up)), **more,
    )  # fmt: skip
    return folder


def refresh(folder: Path) -> None:
    """Write the card again."""
    write_atomically(folder / CARD, card(folder))
