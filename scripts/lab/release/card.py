"""The card of a published model: README.md, made from the other files of its folder and never by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import TemplateError

from lab.cli import explained
from lab.files import read_rows
from lab.training.runs import DAMAGE
from timm_sugar.models._weights import ORG, WEIGHTS
from timm_sugar.models.sugar import ALIASES, SUFFIX

CARD, CONFIG, RECIPE, RESULTS = "README.md", "config.json", "train_args.yaml", "results.csv"
ODD = (*DAMAGE, csv.Error, TemplateError)  # what files of another form raise beside the usual
TWIN = "ReLU twin"  # the row of results of the plain network
ORIGINAL, INT8, ORIGINAL_INT8 = "original", "int8", "original, int8"  # those that `publish.py int8` adds
TEMPLATE = Path(__file__).with_name("card.md")
SURROGATES = {"bsilu": "B-SiLU", "nelu": "NeLU", "elu": "ELU", "selu": "SELU", "gelu": "GELU", "silu": "SiLU",
              "same": "the activations that ReLU replaced"}  # fmt: skip


@dataclass(frozen=True)
class Dataset:
    """What a card says of the images: the name on the Hub, the split that is reported, terms, and how to get them."""

    hub_id: str
    name: str
    split: str
    terms: str
    get: str


DATASETS = {
    "cifar10": Dataset(
        "uoft-cs/cifar10",
        "CIFAR-10",
        "test",
        "CIFAR-10 (A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009) states no licence and "
        "asks to be cited.",
        "`DATA` is a folder with `train/CLASS/` and `validation/CLASS/` (the 10,000 test images); "
        "`--dataset torch/cifar10 --dataset-download` fetches the same images.",
    ),
    "tin200": Dataset(
        "zh-plus/tiny-imagenet",
        "Tiny-ImageNet-200",
        "valid",
        "Tiny-ImageNet-200 (Stanford CS231n, 2015) is a subset of ImageNet, whose terms allow non-commercial research "
        "and education: use these weights under the same terms.",
        "`DATA` is a folder with `train/CLASS/` and `validation/CLASS/` (the 10,000 labelled validation images).",
    ),
}


def read_results(folder: Path) -> list[dict[str, str]]:
    """The measurements of a folder; the first row is that of its weights. Raises UserError if there are none."""
    with explained(f"can't read {folder / RESULTS}", *ODD):
        rows = read_rows(folder / RESULTS)
        if not rows:
            raise ValueError("no rows")
    return rows


def card(folder: Path) -> str:
    """The text of a folder's README.md. Raises UserError if a file that it is made from is missing or damaged."""
    with explained(f"can't write the card of {folder}", *ODD):
        config = json.loads((folder / CONFIG).read_text())
        recipe = yaml.safe_load((folder / RECIPE).read_text())
        size = (folder / WEIGHTS).stat().st_size
        rows = read_results(folder)
        return _render(folder.name, config, recipe, rows, size)


def _shown(name: str) -> Dataset:
    """What the card says of a data set, one of DATASETS or a name of one's own."""
    return DATASETS.get(name) or Dataset(
        "", name, "validation", "", "`DATA` holds `train/CLASS/` and `validation/CLASS/`."
    )


def _pixels(size: Sequence[int]) -> str:
    """Height and width of images, the last two numbers of `size`."""
    return f"{size[-2]} x {size[-1]}"


def _metadata(name: str, config: dict[str, Any], own: dict[str, str]) -> ModelCardData:
    """The head of the card, which the Hub reads."""
    shown = _shown(config["sugar"]["dataset"])
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=shown.hub_id or shown.name,
            dataset_name=shown.name,
            dataset_split=shown.split,
            metric_type="accuracy",
            metric_name=metric,
            metric_value=float(f"{float(own[key]):.2f}"),
        )
        for key, metric in (("top1", "Top-1 accuracy (%)"), ("top5", "Top-5 accuracy (%)"))
    ]
    return ModelCardData(
        model_name=name,
        library_name="timm",
        pipeline_tag="image-classification",
        license=config["pretrained_cfg"]["license"],
        datasets=[shown.hub_id] if shown.hub_id else None,
        tags=["image-classification", "timm", "relu", "sugar"],
        eval_results=results,
    )


def _render(name: str, config: dict[str, Any], recipe: dict[str, Any], rows: list[dict[str, str]], size: int) -> str:
    sugar, cfg = config["sugar"], config["pretrained_cfg"]
    architecture = name.partition(".")[0]
    base = architecture.removesuffix(SUFFIX)
    trained = recipe.get("input_size") or cfg["input_size"]
    text = ModelCard.from_template(
        _metadata(name, config, rows[0]),
        template_path=str(TEMPLATE),
        name=name,
        org=sugar["org"],
        registered=sugar["org"] == ORG,
        architecture=architecture,
        base=ALIASES.get(base, base),
        stock=not config["architecture"].endswith(SUFFIX),
        config=config,
        surrogate=SURROGATES.get(sugar["model_args"]["surrogate"], sugar["model_args"]["surrogate"]),
        alpha=sugar["model_args"].get("alpha"),
        dataset=_shown(sugar["dataset"]),
        shape=", ".join(map(str, cfg["input_size"])),
        size=_pixels(cfg["input_size"]),
        trained_size=_pixels([recipe["img_size"]] * 2 if recipe.get("img_size") else trained),
        classes=config["num_classes"],
        rows=[row for row in rows if row["weights"] not in (ORIGINAL, INT8, ORIGINAL_INT8)],
        own=rows[0],
        deployed={row["weights"]: row for row in rows},
        twin=next((row for row in rows if row["weights"] == TWIN), None),
        megabytes=f"{size / 1e6:.1f}",
        recipe=recipe,
        notes=sugar.get("notes", []),
        changes=sugar.get("changes", []),
    )
    return str(text).rstrip("\n") + "\n"
