"""A loss that is not finite ends a run with status 3, one line, and the last good checkpoint, in every process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lab.files import read_rows
from lab.training.runs import read_checkpoint
from scripting import SCRIPTS, TINY, load_script, make_images

train, tabular = load_script("train"), load_script("train_tabular")
NAN_IN_ONE = """\
import os, torch
from timm.models import register_model
from timm.models.resnet import resnet18
__all__ = ["half_broken"]
from timm.models import generate_default_cfgs
default_cfgs = generate_default_cfgs({"half_broken.x": {"url": "", "input_size": (3, 32, 32)}})
@register_model
def half_broken(pretrained=False, **kwargs):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, kwargs["num_classes"]))
    model.num_classes = kwargs["num_classes"]
    if os.environ.get("RANK") == "1":
        model.register_forward_hook(lambda module, x, y: y * torch.nan)
    return model
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_images(tmp_path / "data")


def options(data: Path, tmp_path: Path) -> list[str]:
    shared = ["--data-dir", str(data), "--output", str(tmp_path), "--experiment", "run", "-j", "0", "--device", "cpu"]
    return [*shared, "--batch-size", "8", "--opt", "sgd", "--warmup-epochs", "0", "--sched", "none"]


def test_the_last_good_checkpoint_stays(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two sound epochs; then the same run goes on at a rate that breaks its weights."""
    sound = [*options(data, tmp_path), *TINY, "--lr", "0.01"]
    assert train.main([*sound, "--epochs", "2"]) == 0
    capfd.readouterr()
    again = [*options(data, tmp_path), *TINY, "--lr", "1e30", "--epochs", "4", "--resume", str(tmp_path / "run")]
    checkpoint = tmp_path / "run" / "last.pth.tar"
    state = read_checkpoint(checkpoint, None)
    for group in state["optimizer"]["param_groups"]:
        group["lr"] = 1e30
    del state["saver"]["sha256"]  # of what it was before
    torch.save(state, checkpoint)
    assert train.main(again) == 3
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert "in epoch 2, update " in line
    assert "try a lower --lr" in line
    assert str(checkpoint) in line
    assert len(read_rows(tmp_path / "run" / "summary.csv")) == 2
    state = read_checkpoint(checkpoint, None)
    assert state["epoch"] == 1
    assert all(weight.isfinite().all() for weight in state["state_dict"].values())


def test_weights_that_break_in_the_last_update_are_not_saved(data: Path, tmp_path: Path) -> None:
    """One update an epoch, whose loss is finite: only the weights, and the loss on the validation data, tell."""
    words = [*options(data, tmp_path), *TINY, "--lr", "1e38", "--epochs", "1", "--batch-size", "24"]
    assert train.main(words) == 3
    assert not list((tmp_path / "run").glob("*.pth.tar"))


@pytest.mark.slow
def test_no_process_waits_for_the_one_whose_loss_broke(data: Path, tmp_path: Path) -> None:
    """Two processes of torchrun, of which the second one's loss is NaN: both end with status 3, one line in all."""
    (tmp_path / "broken.py").write_text(NAN_IN_ONE)
    words = [*options(data, tmp_path), "--model", "half_broken", "--device-modules", "broken", "--num-classes", "3"]
    path = os.pathsep.join([str(tmp_path), str(SCRIPTS), str(SCRIPTS.parent)])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPTS / "train.py")]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, *words, "--img-size", "32", "--epochs", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("train.py: error: the loss is nan in epoch 0, update 0") == 1
    assert re.search(r"exitcode *: 3", done.stderr)


def test_a_tabular_run_ends_so_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tabular.main(["--lr", "1e30", "--epochs", "5", "--output", str(tmp_path)]) == 3
    assert "train_tabular.py: error: the loss is" in capsys.readouterr().err
