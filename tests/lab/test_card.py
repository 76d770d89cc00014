"""The card of a model: its numbers are those of results.csv, and the Hub's own classes read it back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import yaml
from huggingface_hub import ModelCard
from lab.cli import UserError
from lab.release.card import DATASETS, card, read_results
from lab.release.stage import TrainedRun, add_twin, check_is_of
from staging import MEASURED, VERSIONS, make_folder, train

from timm_sugar.models._weights import MODEL_CARDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("card")
    twin = {**MEASURED, **VERSIONS, "top1": 81.23456}
    folder = make_folder(train(root, "test_resnet_sugar"), root / "models/test_resnet_sugar.bsilu_x")
    add_twin(folder, TrainedRun(train(root, "test_resnet", "--model-kwargs")), lambda: twin)
    return folder


def test_card_is_what_its_folder_makes_every_time(folder: Path) -> None:
    assert card(folder) == card(folder) == (folder / "README.md").read_text()


def test_metadata_is_read_back_by_the_hubs_own_classes(folder: Path) -> None:
    data = ModelCard((folder / "README.md").read_text()).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "timm", "image-classification")
    assert data.model_name == "test_resnet_sugar.bsilu_x"
    values = {result.metric_name: result.metric_value for result in data.eval_results or []}
    assert values == {"Top-1 accuracy (%)": 90.0, "Top-5 accuracy (%)": 100.0}


def test_numbers_are_those_of_the_measurements(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "| **this file (float16)** | 90.00 | 100.00 | 1.00 | 50.00 |" in text
    assert "| test_resnet with ReLU's own gradient, same recipe and seed | 81.23 | 100.00 | 1.00 | 50.00 |" in text
    assert f"{int(read_results(folder)[0]['params']) / 1e6:.2f} M" in text
    assert "1 epochs, batch 8" in text
    assert "python scripts/evaluate.py" in text


def test_a_twin_is_scored_on_as_many_images(folder: Path, tmp_path: Path) -> None:
    run, before = TrainedRun(train(tmp_path, "test_resnet", "--model-kwargs")), read_results(folder)
    with pytest.raises(UserError, match=r"was scored on 13 images, test_resnet_sugar\.bsilu_x on 12"):
        add_twin(folder, run, lambda: {**MEASURED, **VERSIONS, "images": 13})
    assert read_results(folder) == before


def test_a_folder_has_the_weights_of_its_run_alone(folder: Path, tmp_path: Path) -> None:
    check_is_of(folder, TrainedRun(folder.parents[1] / "test_resnet_sugar"))
    with pytest.raises(UserError, match="does not have the weights of"):
        check_is_of(folder, TrainedRun(train(tmp_path, "test_resnet_sugar", "--seed", "5")))


OTHERS = {
    "other": (("test_convnext",), "trained test_convnext, not test_resnet"),
    "itself": (("test_resnet_sugar",), r"no network of ReLU and its gradient: there is SUGAR\(surrogate='bsilu'"),
    "gelu": (("test_resnet", "--model-kwargs", "act_layer=gelu"), "there is GELU"),
    "relu": (("test_resnet_sugar", "--model-kwargs", "surrogate=relu"), None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_twin_is_the_same_network_with_relu(name: str, folder: Path, tmp_path: Path) -> None:
    (model, *options), message = OTHERS[name]
    run = TrainedRun(train(tmp_path, model, *(options or ["--model-kwargs"])))
    before = read_results(folder)
    if message is None:
        add_twin(folder, run, lambda: {**MEASURED, **VERSIONS, "top1": 81.23456})
    else:
        with pytest.raises(UserError, match=message):
            add_twin(folder, run, lambda: {})
    assert read_results(folder) == before


@pytest.mark.parametrize("committed", sorted(MODEL_CARDS.glob("*/README.md")), ids=lambda path: path.parent.name)
def test_network_that_a_committed_card_names_is_one_of_timms(committed: Path) -> None:
    named = re.findall(r"timm's own `(.+?)`", committed.read_text())
    assert named
    assert set(named) <= {name for name in timm.list_models() if not name.endswith("_sugar")}


def test_known_data_sets_are_named_with_their_terms(folder: Path, tmp_path: Path) -> None:
    for name, dataset in DATASETS.items():
        copy = tmp_path / name / folder.name
        copy.mkdir(parents=True)
        for path in folder.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        (copy / "config.json").write_text((folder / "config.json").read_text().replace('"toys"', f'"{name}"'))
        text = card(copy)
        assert dataset.terms in text.replace("\n", " ")
        assert ModelCard(text).data.datasets == [dataset.hub_id]


def test_card_of_a_model_of_ones_own_loads_it_from_there(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / folder.name
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "config.json").write_text((folder / "config.json").read_text().replace('"timm-sugar"', '"me"'))
    text = card(copy)
    assert "timm-sugar/" not in text
    assert '"hf-hub:me/test_resnet_sugar.bsilu_x"' in text
    assert '{"hf_hub_id": "me/test_resnet_sugar.bsilu_x", "num_classes": 3}' in text


@pytest.mark.parametrize("missing", ["config.json", "results.csv", "train_args.yaml", "model.safetensors"])
def test_card_of_a_folder_that_lacks_a_file_is_an_error_of_one_line(missing: str, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / folder.name
    copy.mkdir()
    for path in folder.iterdir():
        if path.name != missing:
            (copy / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=missing) as caught:
        card(copy)
    assert "\n" not in str(caught.value)


def test_recipe_in_the_folder_is_the_one_that_the_card_states(folder: Path) -> None:
    assert yaml.safe_load((folder / "train_args.yaml").read_text())["epochs"] == 1
