"""Published folders load in transformers, with this package, and without it where the base computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_sugar.models._weights import MODEL_CARDS

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
FOLDERS = sorted(path.parent for path in MODEL_CARDS.glob("*/config.json"))
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 72, 3), dtype=np.uint8))


def expected(folder: Path) -> tuple[list[str], torch.Tensor]:
    """Labels and logits of the picture by timm's own way to load a folder and prepare a picture."""
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().float()
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        return json.loads((folder / "config.json").read_text())["label_names"], model(transform(IMAGE)[None])[0]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_model_processor_and_pipeline_label_a_picture_as_timm_does(folder: Path) -> None:
    labels, logits = expected(folder)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.inference_mode():
        found = model(**processor(IMAGE, return_tensors="pt")).logits[0]
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    answers = transformers.pipeline("image-classification", model=str(folder), dtype=torch.float32)(IMAGE, top_k=3)
    assert [answer["label"] for answer in answers] == [labels[i] for i in logits.topk(3).indices]


WITHOUT = """
import sys
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
assert "timm_sugar" not in sys.modules
print(model.config.num_labels)
"""


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_without_this_package_a_folder_loads_or_its_card_says_what_is_missing(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(folder)], capture_output=True, text=True, check=False)
    if config["architecture"].endswith("_sugar"):
        assert done.returncode == 1
        block = (folder / "README.md").read_text().partition("### With transformers")[2].partition("###")[0]
        assert "import timm_sugar" in block
    else:
        assert done.stdout.split() == [str(config["num_classes"])], done.stderr
