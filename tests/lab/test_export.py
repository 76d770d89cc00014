"""scripts/export.py: the files hold a ReLU network that computes what PyTorch computes, in float32 and in int8."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import export as script
import numpy as np
import onnx
import pytest
import timm
import torch
from lab.deploy import formats, int8
from lab.deploy.runtimes import open_file
from scripting import error_line, largest_file, make_images
from torch import nn

import timm_sugar

TINY = ["--model", "test_efficientnet_sugar", "--num-classes", "3", "--img-size", "32"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet_sugar", num_classes=3)
    with torch.no_grad():
        network(torch.randn(64, 3, 32, 32))  # statistics of the batch norms
    return timm_sugar.to_relu(network.eval())


def nodes(path: Path) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def test_no_two_runs_share_the_name_of_their_file(tmp_path: Path) -> None:
    for name in ("lr0.1", "lr0.2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pth.tar").touch()
        (tmp_path / name / "ema.v1.safetensors").touch()
    found = [script.name_of(tmp_path / name) for name in ("lr0.1", "lr0.1/last.pth.tar", "lr0.2/ema.v1.safetensors")]
    assert found == ["lr0.1", "lr0.1-last", "lr0.2-ema.v1"]


@pytest.mark.slow
def test_two_networks_in_openvino_do_not_crash_a_process_that_ends(tmp_path: Path) -> None:
    """Two cores of OpenVINO 2026.4.1, one for the network and one for its own activations, did."""
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_efficientnet_sugar", num_classes=3).state_dict(), weights)
    options = ["--checkpoint", str(weights), "--format", "openvino", "--output", str(tmp_path / "net.xml")]
    options += ["--data-dir", str(make_images(tmp_path / "data")), "-j", "1"]
    done = subprocess.run(
        [sys.executable, script.__file__, *TINY, *options], capture_output=True, text=True, timeout=300
    )
    assert "with SiLU" in done.stdout
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", ["onnx", pytest.param("openvino", marks=pytest.mark.slow), "torch-export"])
def test_a_file_computes_what_pytorch_does_for_batches_of_any_size(form: str, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / f"net{formats.SUFFIXES[form]}"
    formats.export(model, torch.randn(2, 3, 32, 32), path, form)
    run = open_file(path)
    for size in (1, 5):
        images = torch.randn(size, 3, 32, 32)
        with torch.no_grad():
            expected = model(images).numpy()
        np.testing.assert_allclose(run(images.numpy()), expected, rtol=1e-4, atol=1e-5)
    assert {file.stem for file in tmp_path.iterdir()} == {"net"}


@pytest.mark.slow
def test_onnx_holds_relu_and_no_batch_norm(model: nn.Module, tmp_path: Path) -> None:
    formats.export(model, torch.randn(2, 3, 32, 32), tmp_path / "net.onnx", "onnx")
    found = nodes(tmp_path / "net.onnx")
    assert found["Relu"] == len([m for m in model.modules() if isinstance(m, nn.ReLU)])
    assert found["BatchNormalization"] == 0


class OneOutlier(nn.Module):
    """Its hidden ReLU passes on what comes in, so that one large pixel sets the range of minimum and maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.head = nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.first(images))).flatten(1)


def test_the_method_is_chosen_that_keeps_the_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = OneOutlier().eval()
    formats.export(network, torch.randn(2, 1, 16, 16), tmp_path / "net.onnx", "onnx")
    batches = [torch.randn(4, 1, 16, 16).numpy() for _ in range(8)]
    batches[0][0, 0, 0, 0] = 300.0
    errors = int8.quantize(tmp_path / "net.onnx", tmp_path / "net-int8.onnx", batches, ["minmax", "percentile-99.9"])
    assert list(errors) == ["percentile-99.9", "minmax"]
    assert 2 * errors["percentile-99.9"] < errors["minmax"], errors
    held_out = np.concatenate(batches[6:])
    with torch.no_grad():
        expected = network(torch.from_numpy(held_out)).numpy()
    found = open_file(tmp_path / "net-int8.onnx")(held_out)
    assert int8.output_error(found, expected) == pytest.approx(errors["percentile-99.9"], rel=1e-3)
    assert nodes(tmp_path / "net-int8.onnx")["QuantizeLinear"] > 0


def test_output_error_is_0_for_equal_and_1_for_constant_outputs() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    assert int8.output_error(logits, logits) == 0
    assert int8.output_error(np.broadcast_to(logits.mean(0), logits.shape), logits) == pytest.approx(1)


@pytest.mark.slow
def test_int8_is_scored_beside_pytorch_and_timed_beside_its_own_activations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_images(tmp_path / "data")
    options = ["--data-dir", str(data), "--calibration", str(data / "train"), "--calibration-images", "12", "-j", "0"]
    options += [
        "--format",
        "onnx-int8",
        "--methods",
        "minmax",
        "--output",
        str(tmp_path / "net.onnx"),
        "--repeats",
        "2",
    ]
    torch.manual_seed(0)
    weights, results = tmp_path / "weights.pth", tmp_path / "results.json"
    torch.save(timm.create_model("test_efficientnet_sugar", num_classes=3).state_dict(), weights)
    assert script.main([*TINY, *options, "--checkpoint", str(weights), "--results-file", str(results)]) == 0
    printed = capsys.readouterr().out
    assert json.loads(results.read_text()).keys() == {"top1", "latency"}
    assert "int8 by minmax" in printed
    assert "top-1 of 12 images: PyTorch" in printed
    assert "with SiLU" in printed
    assert " times (" in printed
    assert nodes(tmp_path / "net.onnx")["QuantizeLinear"] > 0


def test_a_relu_network_has_no_activations_of_its_own_to_compare(tmp_path: Path) -> None:
    args = script.build_parser().parse_args(["--model", "test_resnet_sugar"])
    assert script.with_own_activations(args, timm.create_model("test_resnet_sugar")) is None
    args = script.build_parser().parse_args(["--model", "test_efficientnet_sugar"])
    own = script.with_own_activations(args, timm.create_model("test_efficientnet_sugar", num_classes=5))
    assert own is not None
    assert {*timm_sugar.list_activations(own).values()} == {"SiLU"}


def test_a_program_that_the_disk_has_no_room_for_is_an_error_and_leaves_the_old_one(
    model: nn.Module, tmp_path: Path
) -> None:
    """torch, writing the file by itself, ended the process there."""
    path = tmp_path / "net.pt2"
    path.write_bytes(b"old")
    with largest_file(10_000), pytest.raises(OSError, match="File too large"):
        formats.export(model, torch.randn(2, 3, 32, 32), path, "torch-export")
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt2"]
    assert path.read_bytes() == b"old"


@pytest.mark.slow
def test_a_failed_export_leaves_the_old_file(tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("onnxruntime.quantization.shape_inference.quant_pre_process", fail)
    with pytest.raises(RuntimeError, match="no such operator"):
        formats.export(model, torch.randn(2, 3, 32, 32), path, "onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--format", "onnx-int8"], "--calibration DIR"),
        (["--output", "net.pb"], "ends in .onnx"),
        (["--output", "nowhere/net.onnx"], "no such folder"),
        (
            ["--format", "onnx-int8", "--calibration", "{data}/train", "--data-dir", "{data}/train", "-j", "0"],
            "flatter",
        ),
        (
            ["--format", "onnx-int8", "--calibration", "{data}/validation", "--data-dir", "{data}", "-j", "0"],
            "flatter",
        ),
        (["--format", "onnx-int8", "--calibration", "{few}", "-j", "0"], "has 6 images: 8 are needed"),
        (["--methods", "guess"], "--methods"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_a_users_mistake_is_one_line(
    options: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(timm.create_model("test_efficientnet_sugar", num_classes=3).state_dict(), tmp_path / "weights.pth")
    data = make_images(tmp_path / "data")
    few = make_images(tmp_path / "few", train=2)
    words = [option.format(data=data, few=few) for option in options]
    assert word in error_line(script.main, [*TINY, "--checkpoint", str(tmp_path / "weights.pth"), *words], capsys)
    assert not list(tmp_path.glob("*.onnx"))


def test_images_to_calibrate_on_may_be_of_other_classes(model: nn.Module, tmp_path: Path) -> None:
    argv = [*TINY, "--calibration", str(make_images(tmp_path / "more", classes=("x", "y"))), "-j", "0"]
    args = script.build_parser().parse_args(argv)
    args.classes = ["cat", "dog", "owl"]  # of the checkpoint
    batches = script.calibration_batches(args, model)
    assert sum(map(len, batches)) == 16
