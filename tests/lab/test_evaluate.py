"""scripts/evaluate.py gives the accuracy that the training run saw and that a loop written here gives."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from lab.training.runs import load_file
from loopback_hub import LoopbackHub
from PIL import Image
from scripting import SCRIPTS, TINY, error_line, load_script, make_images
from timm.data import create_transform
from timm.models import save_for_hf

evaluate = load_script("evaluate")
FAST = ["-j", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), validation=7)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose last weights, their moving average and the best checkpoint differ in accuracy."""
    out = tmp_path_factory.mktemp("runs")
    argv = ["--data-dir", str(data), *TINY, *FAST, "-b", "8", "--epochs", "3", "--lr", "0.05", "--warmup-epochs", "0"]
    more = ["--model-ema", "--model-ema-decay", "0.9", "--crop-pct", "0.9", "--output", str(out), "--experiment", "run"]
    assert load_script("train").main([*argv, *more]) == 0
    return out / "run"


def result(argv: list[str], tmp_path: Path) -> dict[str, Any]:
    """The row of results as JSON."""
    path = tmp_path / "row.json"
    assert evaluate.main([*argv, *FAST, "--results-file", str(path), "--results-format", "json"]) == 0
    return json.loads(path.read_text())


def accuracy_by_hand(state: dict[str, torch.Tensor], data: Path) -> tuple[float, float]:
    """Top-1 in percent and cross-entropy, image by image."""
    model = timm.create_model("test_resnet_sugar", num_classes=3).eval()
    model.load_state_dict(state)
    config = model.pretrained_cfg
    transform = create_transform(
        (3, 32, 32), interpolation=config["interpolation"], mean=config["mean"], std=config["std"], crop_pct=0.9
    )
    right, loss, count = 0, 0.0, 0
    for target, name in enumerate(("cat", "dog", "owl")):
        for path in (data / "validation" / name).iterdir():
            with Image.open(path) as image, torch.no_grad():
                logits = model(transform(image.convert("RGB"))[None])[0]
            right += int(logits.argmax() == target)
            loss -= float(logits.log_softmax(0)[target])
            count += 1
    return 100 * right / count, loss / count


@pytest.mark.parametrize("ema", [True, False])
def test_accuracy_and_loss_are_those_of_a_plain_loop(run: Path, data: Path, tmp_path: Path, ema: bool) -> None:
    path = run / "last.pth.tar"
    row = result(["--checkpoint", str(path), "-b", "8"] + ([] if ema else ["--no-ema"]), tmp_path)
    top1, loss = accuracy_by_hand(load_file(path)["state_dict_ema" if ema else "state_dict"], data)
    assert row["top1"] == pytest.approx(top1, abs=1e-3)
    assert row["loss"] == pytest.approx(loss, abs=1e-4)
    assert row["top5"] == 100
    assert row["images_per_second"] > 0
    assert row["weights"] == f"{path} (EMA)" if ema else row["weights"] == str(path)


def test_moving_average_and_weights_differ_here(run: Path) -> None:
    """Else the test above could not tell them apart."""
    state = load_file(run / "last.pth.tar")
    assert any(not torch.equal(v, state["state_dict_ema"][k]) for k, v in state["state_dict"].items())


def test_a_run_folder_is_its_best_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = result(["--checkpoint", str(run)], tmp_path)
    rows = list(csv.DictReader((run / "summary.csv").read_text().splitlines()))
    best = max(rows, key=lambda r: float(r["eval_top1"]))
    assert row["top1"] == pytest.approx(float(best["eval_top1"]), abs=1e-3)
    assert row["loss"] == pytest.approx(float(best["eval_loss"]), abs=1e-4)
    text = capsys.readouterr().out
    assert "model_best.pth.tar (EMA)" in text
    for word in ("top-1", "top-5", "loss", "images/s"):
        assert word in text


def test_safetensors_a_saved_model_and_the_checkpoint_agree(run: Path, data: Path, tmp_path: Path) -> None:
    row = result(["--checkpoint", str(run / "last.pth.tar")], tmp_path)
    state = load_file(run / "last.pth.tar")["state_dict_ema"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    argv = ["--checkpoint", str(tmp_path / "model.safetensors"), *TINY, "--data-dir", str(data), "--crop-pct", "0.9"]
    model = timm.create_model("test_resnet_sugar", num_classes=3)
    model.load_state_dict(state)
    config = {"input_size": (3, 32, 32), "crop_pct": 0.9}
    save_for_hf(model, tmp_path / "saved", safe_serialization=True, data_config=config)
    saved = ["--checkpoint", str(tmp_path / "saved"), "--data-dir", str(data), "--img-size", "32", "--crop-pct", "0.9"]
    for other in (result(argv, tmp_path), result(saved, tmp_path)):
        assert {k: other[k] for k in ("top1", "loss", "img_size")} == {k: row[k] for k in ("top1", "loss", "img_size")}


def test_the_results_file_has_the_columns_of_timm(run: Path, tmp_path: Path) -> None:
    assert evaluate.main(["--checkpoint", str(run), *FAST, "--results-file", str(tmp_path / "r.csv")]) == 0
    header, row = (tmp_path / "r.csv").read_text().splitlines()
    assert header.startswith("model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation")
    assert row.startswith("test_resnet_sugar,")


def test_a_folder_that_is_itself_the_split(run: Path, data: Path, tmp_path: Path) -> None:
    argv = ["--checkpoint", str(run), "--data-dir"]
    whole = result([*argv, str(data)], tmp_path)
    assert result([*argv, str(data / "validation")], tmp_path)["loss"] == whole["loss"]
    assert result([*argv, str(data), "--split", "train"], tmp_path)["loss"] != whole["loss"]


def test_bad_input(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (run / "last.pth.tar").read_bytes()
    (tmp_path / "half.pth.tar").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.safetensors").write_text("no weights")
    state = load_file(run / "last.pth.tar")["state_dict"]
    safetensors.torch.save_file(state, tmp_path / "bare.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    named = ["--data-dir", str(data), *TINY]
    cases = {
        "which model? Give --model NAME": ["--checkpoint", str(tmp_path / "bare.safetensors"), "--data-dir", str(data)],
        "half.pth.tar is not a whole checkpoint": [*named, "--checkpoint", str(tmp_path / "half.pth.tar")],
        "text.safetensors is not a whole checkpoint": [*named, "--checkpoint", str(tmp_path / "text.safetensors")],
        "holds a list, not a checkpoint": [*named, "--checkpoint", str(tmp_path / "list.pth")],
        "nowhere: no such file or folder": [*named, "--checkpoint", "nowhere"],
        "neither a run's folder": [*named, "--checkpoint", str(data)],
        "doesn't fit model test_vit_sugar": [*named, "--checkpoint", str(run), "--model", "test_vit_sugar"],
        "Unknown model (nonsense)": ["--data-dir", str(data), "--model", "nonsense"],
        "Invalid pretrained tag (nonsense)": ["--data-dir", str(data), "--model", "resnet18_sugar.nonsense"],
        "data folder nowhere does not exist": ["--checkpoint", str(run), "--data-dir", "nowhere"],
        "no split 'test' (it has: train, validation)": ["--checkpoint", str(run), "--split", "test"],
        "--results-file": ["--checkpoint", str(run), "--results-file", str(tmp_path / "no" / "r.csv")],
    }
    for message, argv in cases.items():
        assert message in error_line(evaluate.main, [*argv, *FAST], capsys)


@pytest.mark.parametrize("odd", [{"interpolation": "x"}, {"crop_pct": "x"}, {"mean": "x"}])
def test_odd_preprocessing_in_a_config_is_one_line(
    odd: dict[str, str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = timm.create_model("test_resnet", num_classes=3)
    config = timm.data.resolve_data_config({"img_size": 32}, model=model)
    timm.models.save_for_hf(model, str(tmp_path / "m"), data_config=config | odd, safe_serialization=True)
    argv = ["--checkpoint", str(tmp_path / "m"), "--data-dir", str(data), *FAST]
    assert "can't prepare images for model" in error_line(evaluate.main, argv, capsys)


def test_more_classes_than_outputs_and_a_broken_image(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    images = make_images(tmp_path / "four", classes=("cat", "dog", "eel", "owl"))
    argv = ["--checkpoint", str(run), *FAST, "--data-dir"]
    assert "4 classes but the model has 3 outputs" in error_line(evaluate.main, [*argv, str(images)], capsys)
    images = make_images(tmp_path / "three")
    broken = images / "validation" / "dog" / "1.png"
    broken.write_bytes(b"no image")
    assert f"can't read image {broken}" in error_line(evaluate.main, [*argv, str(images)], capsys)
    assert evaluate.main([*argv, str(images), "--skip-broken-images"]) == 0
    assert f"skipped image {broken}" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("streams", [(2,), (1, 2)])
def test_a_script_runs_where_its_streams_are_closed(
    streams: tuple[int, ...], run: Path, data: Path, tmp_path: Path
) -> None:
    """As a daemon's are; what opens next takes their places, were nothing there."""
    argv = ["--checkpoint", str(run), "--data-dir", str(data), "--device", "cpu", "-j", "0"]
    command = [sys.executable, str(SCRIPTS / "evaluate.py"), *argv, "--results-file", str(tmp_path / "results.csv")]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    closing = " ".join(f"{stream}>&-" for stream in streams)
    done = subprocess.run(["bash", "-c", f'"$@" {closing}', "-", *command], env=environment, timeout=200, check=False)
    assert done.returncode == 0
    assert "top1" in (tmp_path / "results.csv").read_text()


@pytest.mark.slow
def test_names_that_the_terminal_cannot_show_end_no_script(run: Path, data: Path, tmp_path: Path) -> None:
    """A folder with umlauts, and an output that takes ASCII alone."""
    named = shutil.copytree(run, tmp_path / "lauf ö")
    argv = ["--checkpoint", str(named), "--data-dir", str(data), "--device", "cpu", "-j", "0"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(SCRIPTS.parent)}
    command = [sys.executable, str(SCRIPTS / "evaluate.py"), *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert r"lauf \xf6" in done.stdout
    assert "top-1" in done.stdout


def test_weights_that_are_not_finite_have_no_accuracy(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(run / "last.pth.tar")
    weights = {name: value * float("nan") for name, value in state["state_dict"].items()}
    torch.save({"state_dict": weights, "args": state["args"]}, tmp_path / "nan.pth.tar")
    argv = ["--checkpoint", str(tmp_path / "nan.pth.tar"), "--data-dir", str(data), *FAST]
    assert "the loss is nan" in error_line(evaluate.main, [*argv, "--results-file", str(tmp_path / "x.csv")], capsys)
    assert not (tmp_path / "x.csv").exists()


def test_results_may_go_to_a_pipe_which_stays_one(run: Path, data: Path, tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    argv = ["--checkpoint", str(run), "--data-dir", str(data), *FAST]
    assert evaluate.main([*argv, "--results-file", str(pipe)]) == 0
    assert os.read(reader, 10_000).startswith(b"model,top1")
    os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.slow
def test_a_connection_that_breaks_is_one_line(tmp_path: Path) -> None:
    data = make_images(tmp_path / "data")
    command = [sys.executable, str(SCRIPTS / "evaluate.py"), "--model", "mobilenetv3_small_100_sugar.same_cifar10"]
    with LoopbackHub() as hub:
        hub.alive_for = 0
        environment = hub.environment(tmp_path / "home") | {"TIMM_SUGAR_ORG": "org"}
        command += ["--data-dir", str(data), "-j", "0"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "can't create model" in done.stderr.splitlines()[-1]


def test_other_classes_than_those_that_were_trained_on_are_refused(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(data, tmp_path / "other")
    for split in ("train", "validation"):
        (other / split / "cat").rename(other / split / "zebra")  # which comes last
    argv = ["--checkpoint", str(run), "--data-dir", str(other), *FAST]
    assert "was trained on other classes (cat, not dog): is this the data?" in error_line(evaluate.main, argv, capsys)
    (tmp_path / "map.txt").write_text("zebra\ndog\nowl\n")
    again = result(
        ["--checkpoint", str(run), "--data-dir", str(other), "--class-map", str(tmp_path / "map.txt")], tmp_path
    )
    assert again["top1"] == result(["--checkpoint", str(run), "--data-dir", str(data)], tmp_path)["top1"]
    model = timm.create_model("test_resnet_sugar", num_classes=3)
    save_for_hf(
        model, str(tmp_path / "m"), model_config={"label_names": ["cat", "dog", "owl"]}, safe_serialization=True
    )
    argv[1] = str(tmp_path / "m")
    assert "was trained on other classes (cat, not dog)" in error_line(evaluate.main, argv, capsys)
