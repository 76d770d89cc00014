"""Options that differ where a run goes on: they hold, or one line says why not; and what the best checkpoint is."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lab.files import read_rows
from lab.training.runs import load_file
from lab.training.setup import load_optimizer
from scripting import TINY, error_line, load_script, make_images
from timm.optim import create_optimizer_v2

train = load_script("train")
OPTIMIZERS = ("sgd", "adamw", "lamb", "adan", "lookahead_adamw")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def options(data: Path, out: Path, *more: str) -> list[str]:
    argv = ["--data-dir", str(data), *TINY, "--device", "cpu", "-b", "12", "-j", "0", "--warmup-epochs", "0"]
    return [
        *argv,
        "--epochs",
        "1",
        "--lr",
        "0.01",
        "--sched",
        "none",
        "--output",
        str(out),
        "--experiment",
        "run",
        *more,
    ]


@pytest.fixture(scope="module")
def begun(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch."""
    out = tmp_path_factory.mktemp("begun")
    assert train.main(options(data, out)) == 0
    return out / "run"


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return shutil.copytree(begun, tmp_path / "run")


@pytest.mark.parametrize(
    ("more", "key", "value"),
    [
        (["--lr", "0.002"], "lr", 0.002),
        (["--weight-decay", "0.5"], "weight_decay", 0.5),
        (["--momentum", "0.5"], "momentum", 0.5),
        (["--opt-kwargs", "nesterov=False"], "nesterov", False),
    ],
)
def test_settings_of_the_optimizer_that_are_given_hold_from_there_on(
    run: Path, more: list[str], key: str, value: float
) -> None:
    before = load_file(run / "last.pth.tar")["optimizer"]
    assert before["param_groups"][-1][key] != value
    assert train.main(["--resume", str(run), "--epochs", "2", *more]) == 0
    after = load_file(run / "last.pth.tar")["optimizer"]
    assert after["param_groups"][-1][key] == value
    assert after["param_groups"][0]["weight_decay"] == 0  # biases stay without
    assert not torch.equal(after["state"][0]["momentum_buffer"], before["state"][0]["momentum_buffer"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_optimizer_makes_the_same_updates(name: str) -> None:
    """Five updates, or two and three with a new optimizer in between: what counts updates goes on counting."""

    def make() -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        return model, create_optimizer_v2(model, opt=name, lr=0.1, weight_decay=0.1)

    def update(model: torch.nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            model(torch.full((2, 4), float(step))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, its = make()
    update(whole, its, range(5))
    model, optimizer = make()
    update(model, optimizer, range(2))
    other, restored = make()
    other.load_state_dict(model.state_dict())
    load_optimizer(restored, optimizer.state_dict())
    update(other, restored, range(2, 5))
    if not name.startswith("lookahead"):  # whose slow weights begin anew
        assert torch.equal(other.weight, whole.weight)
    for group, same in zip(restored.param_groups, its.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in same.items() if k != "params"}


@pytest.mark.parametrize("name", ["adamw", "lion", "sgdw", "lookahead_sgd"])
def test_another_optimizer_is_refused(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--resume", str(run), "--epochs", "2", "--opt", name]
    for more in ([], ["--experiment", "fork"]):
        line = error_line(train.main, [*argv, *more], capsys)
        assert f"has the state of --opt sgd, not {name}: use it as --initial-checkpoint" in line
    assert not (run.parent / "fork").exists()


def broken(change: Callable[[dict[int, Any]], Any], run: Path) -> dict[str, bytes]:
    """Change the optimizer's state in the checkpoint of a run, which has no SHA-256 afterwards."""
    state = load_file(run / "last.pth.tar")
    del state["saver"]["sha256"]
    change(state["optimizer"]["state"])
    torch.save(state, run / "last.pth.tar")
    return {path.name: path.read_bytes() for path in run.glob("checkpoint*")}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state[0].update(momentum_buffer=torch.ones(7, 5)),
        lambda state: state[0].update(momentum_buffer="x"),
        lambda state: state.update({0: None}),
    ],
    ids=["shape", "text", "none"],
)
def test_state_that_is_not_the_optimizers_is_one_line(
    run: Path, change: Callable[[dict[int, Any]], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = broken(change, run)
    line = error_line(train.main, ["--resume", str(run), "--epochs", "2"], capsys)
    assert f"can't make the first update with the state in {run / 'last.pth.tar'}" in line
    assert {path.name: path.read_bytes() for path in run.glob("checkpoint*")}.keys() == before.keys()
    assert [row["epoch"] for row in read_rows(run / "summary.csv")] == ["0"]


def test_a_batch_that_the_model_cannot_train_on_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One image, of which the last feature map has one pixel: batch normalisation has no spread to divide by."""
    line = error_line(train.main, options(data, tmp_path, "-b", "1"), capsys)
    assert "can't make the first update: Expected more than 1 value per channel" in line


def test_without_validation_the_best_epoch_has_the_lowest_loss(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(options(data, tmp_path, "--val-split", "", "--epochs", "3", "--lr", "0.05")) == 0
    losses = [float(row["train_loss"]) for row in read_rows(tmp_path / "run" / "summary.csv")]
    best = losses.index(min(losses))
    assert best > 0
    assert load_file(tmp_path / "run" / "model_best.pth.tar")["epoch"] == best
    assert f"best train_loss {losses[best]:.3f} in epoch {best}" in capsys.readouterr().out


@pytest.mark.parametrize("more", [["--eval-metric", "loss"], ["--eval-metric", "top5"], ["--val-split", ""]])
def test_what_is_best_cannot_change_within_a_folder_and_starts_anew_in_a_fork(
    run: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--resume", str(run), "--epochs", "2", *more]
    line = error_line(train.main, argv, capsys)
    assert "the best checkpoint was chosen by eval_top1, not by " in line
    assert "add --experiment to go on in another folder" in line
    assert train.main([*argv, "--experiment", "fork"]) == 0
    assert load_file(run.parent / "fork" / "model_best.pth.tar")["epoch"] == 1


def test_the_best_of_a_fork_is_one_of_its_own_epochs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Even where no epoch of the fork is better than one before it: that one lies in another folder."""
    state = load_file(run / "last.pth.tar")
    del state["saver"]["sha256"]
    state["saver"] |= {"best_metric": 101.0, "pending": (0, 101.0)}
    torch.save(state, run / "last.pth.tar")
    assert train.main(["--resume", str(run), "--epochs", "2", "--experiment", "fork"]) == 0
    assert load_file(run.parent / "fork" / "model_best.pth.tar")["epoch"] == 1
    assert "in epoch 1" in capsys.readouterr().out.splitlines()[-1]


def test_options_of_a_checkpoint_that_are_none_are_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_file(run / "last.pth.tar")
    assert isinstance(state["args"], argparse.Namespace)
    del state["saver"]["sha256"]
    torch.save(state | {"args": [1]}, run / "last.pth.tar")
    assert "its args can't be used" in error_line(train.main, ["--resume", str(run), "--epochs", "2"], capsys)


def test_options_that_differ_are_kept_with_the_run_and_those_of_epochs_that_are_gone_are_not(
    data: Path, tmp_path: Path
) -> None:
    """A checkpoint says how each epoch before it was trained, and train.log says it too."""
    train.main(options(data, tmp_path))
    train.main(["--resume", str(tmp_path / "run"), "--epochs", "2", "-j", "0", "--log-interval", "3"])
    assert train.main(["--resume", str(tmp_path / "run"), "--epochs", "3", "--lr", "0.001", "--seed", "7"]) == 0
    lines = ["from epoch 1 on: epochs 1 -> 2", "from epoch 2 on: epochs 2 -> 3, lr 0.01 -> 0.001, seed 42 -> 7"]
    assert load_file(tmp_path / "run" / "last.pth.tar")["args"].changes == lines
    log = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert [line for line in log if line.startswith("from epoch")] == lines
    first = tmp_path / "run" / "checkpoint-1.pth.tar"
    assert train.main(["--resume", str(first), "--epochs", "3", "--lr", "0.01", "--seed", "42"]) == 0
    assert load_file(tmp_path / "run" / "last.pth.tar")["args"].changes == [lines[0], "from epoch 2 on: epochs 2 -> 3"]


def test_a_run_that_was_cut_off_has_changed_nothing(data: Path, tmp_path: Path) -> None:
    argv = options(data, tmp_path, "--epochs", "2", "--model-kwargs", "surrogate=nelu", "alpha=0.05")
    train.main(argv)
    (tmp_path / "run" / "last.pth.tar").unlink()
    (tmp_path / "run" / "checkpoint-1.pth.tar").unlink()
    assert train.main(["--resume", str(tmp_path / "run"), "--data-dir", str(data)]) == 0
    assert load_file(tmp_path / "run" / "last.pth.tar")["args"].changes == []


def test_other_classes_are_refused(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(data, run.parent / "other")
    for split in ("train", "validation"):
        first = sorted(path for path in (other / split).iterdir())[0]
        first.rename(first.with_name("zzz"))
    error = error_line(train.main, ["--resume", str(run), "--epochs", "2", "--data-dir", str(other)], capsys)
    assert "was trained on other classes (" in error
    assert "use it as --initial-checkpoint" in error
