"""`scripts/train_tabular.py`: runs of one seed differ in the activation alone, and mistakes are one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from lab.training.runs import read_summary
from scripting import error_line, load_script
from torch import nn

from timm_sugar import SUGAR

tabular = load_script("train_tabular")


def parse(*options: str) -> object:
    return tabular.build_parser().parse_args(options)


def test_the_seed_draws_the_split_and_it_is_standardised_by_the_training_rows() -> None:
    (a, b, labels, truth), again, other = (tabular.load_rows("wine", seed) for seed in (1, 1, 2))
    assert torch.equal(a, again[0])
    assert not torch.equal(a, other[0])
    assert (len(a), len(b)) == (124, 54)  # 178 rows, 30 % of them rounded up
    assert len(labels) == len(a)
    assert truth.bincount().tolist() == pytest.approx([59 * 0.3, 71 * 0.3, 48 * 0.3], abs=1)
    torch.testing.assert_close(a.mean(0), torch.zeros(13), atol=1e-5, rtol=0)
    torch.testing.assert_close(a.std(0), torch.ones(13))
    assert (b.mean(0).abs() > 1e-3).any()


def test_weights_are_the_same_whatever_the_activation() -> None:
    models = []
    for options in (
        ("--activation", "relu"),
        ("--activation", "sugar", "--model-kwargs", "surrogate=nelu", "alpha=0.1"),
    ):
        torch.manual_seed(3)
        models.append(tabular.build_model(parse(*options, "--depth", "2", "--width", "5"), 4, 3))
    relu, sugar = models
    assert [type(layer) for layer in relu] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [layer.values for layer in sugar if isinstance(layer, SUGAR)] == [[0.1], [0.1]]
    x = torch.randn(7, 4)
    assert torch.equal(relu(x), sugar(x))


def test_a_run_writes_its_settings_and_every_epoch_and_repeats_itself(tmp_path: Path) -> None:
    for name in ("a", "b"):
        options = ["--output", str(tmp_path), "--experiment", name, "--epochs", "3", "--seed", "5", "--dataset", "iris"]
        assert tabular.main(options) == 0
    args = yaml.safe_load((tmp_path / "a" / "args.yaml").read_text())
    assert (args["epochs"], args["seed"], args["activation"]) == (3, 5, "sugar")
    rows = read_summary(tmp_path / "a", 3)
    assert rows == read_summary(tmp_path / "b", 3)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert float(rows[2]["train_loss"]) < float(rows[0]["train_loss"])
    assert 0 <= float(rows[2]["eval_top1"]) <= 100
    assert 0 <= float(rows[2]["eval_dead_units"]) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--depth", "0"], "argument --depth: expected 1 or more, not 0"),
        (["--model-kwargs", "surrogate=nonsense"], "unknown surrogate 'nonsense'"),
        (["--activation", "gelu", "--model-kwargs", "alpha=1"], "--model-kwargs: "),
        (["--dataset", "mnist"], "invalid choice"),
        (["--experiment", "../outside"], "is no name of a folder in --output"),
        (["--experiment", ".."], "is no name of a folder in --output"),
        (["--experiment", ""], "is no name of a folder in --output"),
        (["--activation", "gelu", "--model-kwargs", "approximate=foo"], "can't train with these options"),
    ],
)
def test_a_mistake_is_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_line(tabular.main, [*options, "--output", str(tmp_path)], capsys)


def test_a_run_that_is_overwritten_and_cut_off_is_none_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--output", str(tmp_path), "--epochs", "1", "--dataset", "iris"]
    assert tabular.main(options) == 0

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tabular, "write_summary", killed)
    assert tabular.main([*options, "--seed", "1"]) == 130
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["args.yaml"]
