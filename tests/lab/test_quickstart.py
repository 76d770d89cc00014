"""scripts/quickstart.py as a user runs it."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm.data
import timm.models
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import timm_sugar

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "quickstart.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and standard output of a run."""
    folder = tmp_path_factory.mktemp("quickstart")
    result = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT)],
        cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.fixture(scope="module")
def loaded(finished: tuple[Path, str]) -> nn.Module:
    """The model that the two printed lines load."""
    folder, out = finished
    lines = out.partition("Load it again:")[2].replace("output/", f"{folder}/output/")
    names: dict[str, nn.Module] = {}
    exec("\n".join(line.strip() for line in lines.strip().splitlines()), names)
    return names["model"].eval()


def test_pretrained_weights_beat_random_ones_on_the_same_budget(finished: tuple[Path, str]) -> None:
    rows = re.findall(r"^(\S.*\S|  after training) +([\d.]+)% +([\d.]+)% +([\d.]+)%$", finished[1], flags=re.MULTILINE)
    tag = runpy.run_path(str(SCRIPT))["TAG"]
    assert [row[0].strip() for row in rows] == ["random weights", "after training", tag, "after training"]
    untrained, scratch, pretrained, fine_tuned = [float(row[1]) for row in rows]
    assert max(untrained, pretrained) < 30
    assert 30 < scratch < fine_tuned - 10
    assert fine_tuned > 90
    dead = [float(row[2]) for row in rows]
    assert dead[1] < dead[0]
    assert dead[3] <= dead[2]


def test_saved_model_loads_again_by_the_two_printed_lines_with_its_labels(
    finished: tuple[Path, str], loaded: nn.Module
) -> None:
    assert any(isinstance(module, timm_sugar.SUGAR) for module in loaded.modules())
    folder = finished[0] / "output" / "quickstart" / "resnet18_sugar"
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == [str(digit) for digit in range(10)]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_reported_accuracy_is_that_of_the_saved_files(finished: tuple[Path, str], loaded: nn.Module) -> None:
    """The split is made again here, and images go through the preprocessing that the saved config asks for."""
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels, labels = digits.images, digits.target
    _, held_out = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=loaded))
    pictures = [Image.fromarray((pixels[i] * 255 / 16).astype("uint8")) for i in held_out]
    with torch.no_grad():
        predictions = loaded(torch.stack([transform(picture) for picture in pictures])).argmax(1)
    accuracy = (predictions == torch.as_tensor(labels[held_out])).double().mean().item()
    reported = re.findall(r"after training +([\d.]+)%", finished[1])
    assert float(reported[-1]) == pytest.approx(100 * accuracy, abs=0.05)


def test_picture_of_predictions_is_a_readable_png(finished: tuple[Path, str]) -> None:
    with Image.open(finished[0] / "output" / "quickstart" / "predictions.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "--epochs: expected 1 or more, not 0"),
        (["--epochs", "x"], "--epochs: expected a whole number"),
        (["--seed", "9" * 20], "--seed: expected 0 to"),
        (["--seed", "-1"], "--seed: expected 0 to"),
        (["--surrogate", "tanh"], "none of bsilu, elu"),
        (["--output", "taken"], "can't write to taken"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("")
    main = runpy.run_path(str(SCRIPT))["main"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("quickstart.py: error: ")
    assert words in error
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
