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

import timm_sugar
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


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXT = {"vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49}
PIXELS, IDS = {"pixel_values": torch.randn(2, 3, 32, 32)}, {"input_ids": torch.arange(14).view(2, 7)}
# Model, config and inputs; their configs name the activation hidden_act, activation_function, activation,
# feed_forward_proj, and hidden_act in two configs below a third.
NAMED: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "ViT": ("ViTForImageClassification", "ViTConfig", {**SMALL, "image_size": 32, "patch_size": 16}, PIXELS),
    "GPT-2": ("GPT2Model", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, **TEXT}, IDS),
    "DistilBERT": ("DistilBertModel", "DistilBertConfig", {"dim": 32, "n_layers": 2, "n_heads": 2, **TEXT}, IDS),
    "T5": (
        "T5EncoderModel", "T5Config",
        {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"},
        IDS,
    ),
    "Llama": ("LlamaModel", "LlamaConfig", {**SMALL, **TEXT}, IDS),
    "CLIP": (
        "CLIPModel", "CLIPConfig",
        {"projection_dim": 16, "text_config": {**SMALL, **TEXT, "projection_dim": 16},
         "vision_config": {**SMALL, "image_size": 32, "patch_size": 16, "projection_dim": 16}}, {**PIXELS, **IDS},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "config", "settings", "inputs"), NAMED.values(), ids=NAMED)
def test_a_sugarized_model_that_is_saved_and_loaded_computes_with_relu(
    kind: str, config: str, settings: dict[str, Any], inputs: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    with torch.inference_mode():
        before = model(**inputs)[0]
        expected = timm_sugar.sugarize(model)(**inputs)[0]
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, kind).from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(**inputs)[0], expected)
    assert not torch.equal(before, expected)


def test_a_config_keeps_its_name_where_activations_are_left_and_gets_it_back_after_sugarized() -> None:
    model = transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=32, patch_size=16))
    with timm_sugar.sugarized(model):
        assert model.config.hidden_act == "relu"
    assert model.config.hidden_act == "gelu"
    with pytest.warns(UserWarning, match="config of ViTModel doesn't say"):
        timm_sugar.sugarize(model, filter_fn=lambda module, name: "0" in name)
    assert model.config.hidden_act == "gelu"
    timm_sugar.sugarize(model)
    assert model.config.hidden_act == "relu"
    assert transformers.ViTConfig().hidden_act == "gelu"


def test_a_part_of_a_model_leaves_the_config_that_all_parts_share_and_says_so() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **TEXT))
    with pytest.warns(UserWarning, match="config of LlamaDecoderLayer doesn't say.*sugarize\\(\\) it again"):
        timm_sugar.sugarize(model.model.layers[-1])
    assert model.config.hidden_act == "silu"
    timm_sugar.sugarize(model)
    assert model.config.hidden_act == "relu"


def test_a_model_that_looks_its_activation_up_by_name_keeps_it_and_names_it() -> None:
    settings = {"vocab_size": 50, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**settings))
    with (
        pytest.warns(UserWarning, match=r"mixer.activation \(named 'silu'\)"),
        pytest.warns(UserWarning, match="doesn't say that these activations are ReLU"),
    ):
        timm_sugar.sugarize(model)
    assert model.config.hidden_act == "silu"


def test_a_network_of_timm_inside_of_transformers_says_that_its_config_is_another() -> None:
    model = transformers.TimmWrapperForImageClassification(transformers.TimmWrapperConfig(architecture="test_vit"))
    with pytest.warns(UserWarning, match="config of TimmWrapperForImageClassification doesn't say"):
        timm_sugar.sugarize(model)
