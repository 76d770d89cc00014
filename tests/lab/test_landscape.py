"""The loss around the weights: equal to a loop over moved copies, and the model is put back."""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lab.experiments.landscape import direction, landscape
from PIL import Image
from scripting import error_line, load_script
from staging import train
from torch import Tensor, nn

script = load_script("landscape")
FAST = ["-j", "0", "--device", "cpu"]
STEPS = (-0.5, 0.0, 0.25)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)
    )


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 3) for n in (4, 2)]


def test_directions_have_the_length_of_each_filter_and_leave_the_rest() -> None:
    model = small()
    chosen = direction(model, torch.Generator().manual_seed(3))
    assert sorted(chosen) == ["0.weight", "5.weight"]
    for name, step in chosen.items():
        weight = model.get_parameter(name)
        for i in range(len(weight)):
            assert step[i].norm().item() == pytest.approx(weight[i].norm().item(), rel=1e-5)
    assert not torch.allclose(chosen["0.weight"][0] / chosen["0.weight"][1], torch.tensor(1.0))


def test_losses_are_those_of_moved_copies(batches: list[tuple[Tensor, Tensor]]) -> None:
    model = small()
    generator = torch.Generator().manual_seed(7)
    first, second = direction(model, generator), direction(model, generator)
    grid = landscape(model, batches, STEPS, seed=7)
    images, targets = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    for i, a in enumerate(STEPS):
        for j, b in enumerate(STEPS):
            moved = copy.deepcopy(model).eval()
            for name, step in first.items():
                moved.get_parameter(name).data += a * step + b * second[name]
            assert grid[i, j].item() == pytest.approx(F.cross_entropy(moved(images), targets).item(), rel=1e-4)
    assert not torch.equal(grid, landscape(model, batches, STEPS, seed=8))


def test_the_model_is_put_back_even_after_an_error(batches: list[tuple[Tensor, Tensor]]) -> None:
    model = small().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def unchanged() -> bool:
        modes = all(module.training for module in model.modules())
        return modes and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    landscape(model, batches, STEPS)
    assert unchanged()
    with pytest.raises(RuntimeError):
        landscape(model, [*batches, (torch.randn(1, 7), torch.tensor([0]))], STEPS)
    assert unchanged()
    with pytest.raises(ValueError, match="no batches"):
        landscape(model, [], STEPS)
    assert unchanged()


def test_script_writes_two_models_on_one_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(train(tmp_path, name)) for name in ("test_resnet_sugar", "test_resnet")]
    out = tmp_path / "out"
    argv = ["--compare", *runs, *FAST, "--output", str(out), "--points", "3", "--images", "5", "-b", "4"]
    assert script.main(argv) == 0
    with open(out / "landscape.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["test_resnet_sugar"] * 9 + ["test_resnet"] * 9
    assert [(row["first"], row["second"]) for row in rows[:4]] == [("-1", "-1"), ("-1", "0"), ("-1", "1"), ("0", "-1")]
    assert f"at the weights {float(rows[4]['loss']):.4f}" in capsys.readouterr().out
    with Image.open(out / "landscape.png") as picture:
        assert picture.width > 1000
    for more, message in (
        (["--points", "4"], "--points must be odd"),
        (["--points", "99999999999"], "expected 3 to 999"),
        (["--span", "0"], "argument --span: expected above 0, not 0"),
    ):
        assert message in error_line(script.main, [*argv, *more], capsys)
