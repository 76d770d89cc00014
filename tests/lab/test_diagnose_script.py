"""`scripts/diagnose.py`: its numbers are those of `diagnose()` on the same images, for one model and for two."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from lab.experiments.gains import describe, gradient_gains
from lab.training.runs import load_file
from PIL import Image
from scripting import CLASSES, error_line, load_script
from staging import train
from timm.data import create_transform
from torch import nn

import timm_sugar

script = load_script("diagnose")
FAST = ["-j", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    train(root, "test_resnet_sugar")
    train(root, "test_resnet")
    return root


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_are_those_of_diagnose(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--checkpoint", str(runs / "test_resnet_sugar"), "--output", str(tmp_path), "--tau", "0.3"]
    assert script.main([*argv, *FAST, "-b", "5"]) == 0
    model = timm.create_model("test_resnet_sugar", num_classes=3)
    model.load_state_dict(load_file(runs / "test_resnet_sugar" / "model_best.pth.tar")["state_dict"])
    config = model.pretrained_cfg
    transform = create_transform(
        (3, 32, 32),
        **{key: config[key] for key in ("interpolation", "mean", "std", "crop_pct")},
    )
    batches = []
    for target, name in enumerate(CLASSES):
        for path in (runs / "data" / "validation" / name).iterdir():
            with Image.open(path) as image:
                batches.append((transform(image)[None], torch.tensor([target])))
    expected = timm_sugar.diagnose(model, batches, tau=0.3).rows()
    rows = table(tmp_path / "activations.csv")
    assert [row["layer"] for row in rows] == [row["layer"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row["model"] == "test_resnet_sugar"
        for key in ("units", "dead", "dormant", "zeros", "gradient", "mean", "spread"):
            assert float(row[key]) == pytest.approx(other[key], rel=1e-4, abs=1e-5, nan_ok=True), (row, key)
    with Image.open(tmp_path / "activations.png") as picture:
        assert picture.width > 1000
    assert "total" in capsys.readouterr().out


def test_two_models_stand_in_one_table(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--compare", str(runs / "test_resnet_sugar"), str(runs / "test_resnet"), "--output", str(tmp_path / "out")]
    assert script.main([*argv, *FAST, "--images", "5", "-b", "4"]) == 0
    rows = table(tmp_path / "out" / "activations.csv")
    names = [row["model"] for row in rows]
    assert names == sorted(names, reverse=True)
    assert set(names) == {"test_resnet_sugar", "test_resnet"}
    assert capsys.readouterr().out.count("total") == 2
    same = ["--compare", str(runs / "test_resnet"), str(runs / "test_resnet" / "last.pth.tar")]
    assert script.main([*same, *FAST, "--images", "1", "--output", str(tmp_path / "same")]) == 0
    assert len({row["model"] for row in table(tmp_path / "same" / "activations.csv")}) == 2


def test_two_folders_of_one_name_stay_two_models(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "test_resnet", tmp_path / "sub" / "run")
    shutil.copytree(runs / "test_resnet_sugar", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert script.main(["--compare", "sub/run", "run", *FAST, "--images", "1", "--output", "out"]) == 0
    assert {row["model"] for row in table(tmp_path / "out" / "activations.csv")} == {"sub/run", "run"}
    assert "that is one model, not two" in error_line(script.main, ["--compare", "run", "./run", *FAST], capsys)


def test_gains_are_those_of_the_chain_rule_and_leave_the_model_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), timm_sugar.SUGAR(alpha=0.8), nn.Linear(7, 3)).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(16, 5, dtype=torch.float64), torch.arange(16) % 3
    hidden = F.batch_norm(model[0](x), None, None, model[1].weight, model[1].bias, training=True)
    error = (F.softmax(model[3](F.relu(hidden)), 1) - F.one_hot(y, 3)) / 16

    def first_layer(derivative: torch.Tensor) -> torch.Tensor:
        at_hidden = (error @ model[3].weight * derivative).detach()
        return torch.autograd.grad(hidden, model[0].weight, at_hidden, retain_graph=True)[0].norm()

    s = torch.sigmoid(hidden)
    expected = first_layer(s + (hidden + 0.8) * s * (1 - s)) / first_layer((hidden > 0).double())
    gains = gradient_gains(model, x, y)
    assert gains == {"0": pytest.approx(expected.item(), rel=1e-9), "3": 1}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert describe(gains).startswith("gradients over ReLU's by layer:")


def test_gains_of_a_sugar_model_are_written_and_drawn(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--compare", str(runs / "test_resnet_sugar"), str(runs / "test_resnet"), "--output", str(tmp_path)]
    assert script.main([*argv, *FAST]) == 0
    rows = table(tmp_path / "gains.csv")
    model = timm.create_model("test_resnet_sugar", num_classes=3)
    assert [row["layer"] for row in rows] == [n[:-7] for n, p in model.named_parameters() if p.ndim > 1]
    assert {row["model"] for row in rows} == {"test_resnet_sugar"}
    assert float(rows[-1]["gain"]) == 1  # no activation comes after it
    assert max(float(row["gain"]) for row in rows) > 1
    with Image.open(tmp_path / "gains.png") as picture:
        assert picture.width == 800
    assert "gradients over ReLU's by layer: " in capsys.readouterr().out


def test_without_gains_the_rest_is_kept(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("Expected more than 1 value per channel")

    monkeypatch.setattr(script, "gradient_gains", fail)
    argv = ["--checkpoint", str(runs / "test_resnet_sugar"), "--output", str(tmp_path), "-b", "1"]
    assert script.main([*argv, *FAST]) == 0
    assert "no gains of gradients: Expected more than 1 value" in capsys.readouterr().out
    assert table(tmp_path / "activations.csv")
    assert not (tmp_path / "gains.csv").exists()


def test_mistakes_are_one_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ["--checkpoint", str(runs / "test_resnet"), *FAST, "--output", str(tmp_path / "out")]
    for argv, message in (
        ([*one, "--tau", "-1"], "argument --tau: expected 0 or more, not -1"),
        ([*one, "--images", "0"], "argument --images: expected 1 or more, not 0"),
        ([*one, "--compare", "a", "b"], "leave out"),
        (["--compare", str(runs / "test_resnet"), str(tmp_path / "none"), *FAST], "no such file"),
        (FAST, "which model"),
    ):
        assert message in error_line(script.main, argv, capsys)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    assert "can't write" in error_line(script.main, [*one[:-1], str(tmp_path / "file")], capsys)


def test_a_network_that_is_dead_with_relu_is_diagnosed_too(runs: Path, tmp_path: Path, capsys: Any) -> None:
    """No layer has a gradient to compare with; the numbers are written all the same."""
    state = timm.create_model("test_resnet_sugar", num_classes=3).state_dict()
    torch.save({name: torch.zeros_like(value) for name, value in state.items()}, tmp_path / "dead.pth")
    argv = ["--model", "test_resnet_sugar", "--num-classes", "3", "--checkpoint", str(tmp_path / "dead.pth")]
    assert script.main([*argv, "--data-dir", str(runs / "data"), "--output", str(tmp_path / "o"), *FAST]) == 0
    assert "no gains of gradients: with ReLU no layer has one" in capsys.readouterr().out
    assert table(tmp_path / "o" / "activations.csv")
    assert not (tmp_path / "o" / "gains.csv").exists()
