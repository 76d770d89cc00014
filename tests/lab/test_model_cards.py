"""The folders of model_cards/ and the tags of the library say the same, and load the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lab.release.card import card
from timm.models import get_pretrained_cfg

import timm_sugar
from timm_sugar import models
from timm_sugar.models._weights import MODEL_CARDS, WEIGHTS_FILE, describe

FOLDERS = sorted(path.parent for path in MODEL_CARDS.glob("*/config.json"))
NONE = pytest.param(
    Path(), marks=pytest.mark.skip(reason="model_cards/ is empty: scripts/publish.py stage adds a model")
)
# surrogates of converted networks; Hardswish gets the derivative of SiLU
SAME = {"mobilenetv3_small_100_sugar.same_cifar10": {("relu", 1.0), ("silu",)}}


def test_each_tag_has_its_folder() -> None:
    assert sorted(models.SUGAR_TAGS) == [folder.name for folder in FOLDERS]


@pytest.mark.parametrize("folder", FOLDERS or [NONE], ids=lambda folder: folder.name)
def test_tag_is_what_the_config_of_its_folder_says(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert json.loads(WEIGHTS_FILE.read_text())[folder.name] == describe(config, folder / "model.safetensors")
    cfg = get_pretrained_cfg(folder.name)
    assert cfg.hf_hub_id == f"timm-sugar/{folder.name}"
    assert cfg.tag == folder.name.partition(".")[2]
    assert cfg.license == config["pretrained_cfg"]["license"]
    assert cfg.num_classes == config["num_classes"] == len(config["label_names"])
    assert list(cfg.label_names) == config["label_names"]
    for key in ("input_size", "mean", "std", "crop_pct", "interpolation"):
        value = getattr(cfg, key)
        assert (list(value) if isinstance(value, tuple) else value) == config["pretrained_cfg"][key], key
    assert (folder / "model.safetensors").stat().st_size <= 60e6
    assert (folder / "README.md").read_text() == card(folder)


@pytest.mark.parametrize("folder", FOLDERS or [NONE], ids=lambda folder: folder.name)
def test_pretrained_model_is_the_one_in_the_folder(folder: Path) -> None:
    model: Any = timm.create_model(folder.name, pretrained=True).eval()
    stock: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    image = torch.randn(2, *model.pretrained_cfg["input_size"])
    with torch.inference_mode():
        assert torch.equal(model(image), stock(image))
    arguments = models.SUGAR_TAGS[folder.name].model_args
    settings = {(m.surrogate, *m.values) for m in model.modules() if isinstance(m, timm_sugar.SUGAR)}
    if arguments["surrogate"] == "same":
        assert settings == SAME[folder.name]
    else:
        assert settings == {(arguments["surrogate"], arguments["alpha"])}
    other: Any = timm.create_model(folder.name, pretrained=True, num_classes=3)
    assert other.num_classes == 3
    assert not other.pretrained_cfg.get("source")


def test_bare_name_keeps_the_default_of_the_base_and_tags_are_listed() -> None:
    for name in models.SUGAR_TAGS:
        architecture = name.partition(".")[0]
        base = models.ALIASES.get(architecture.removesuffix("_sugar"), architecture.removesuffix("_sugar"))
        assert get_pretrained_cfg(architecture).tag == get_pretrained_cfg(base).tag
        assert name in timm.list_pretrained(f"{architecture}.*")
