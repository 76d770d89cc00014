"""scripts/convert.py: a trained network becomes its ReLU self, taught by the original."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from lab.training.conversion import Blend, account, parse_conversion
from lab.training.loading import load_model, load_weights
from PIL import Image
from scripting import SCRIPTS, error_line, load_script, make_images
from torch import nn

import timm_sugar

train, convert, evaluate = (load_script(name) for name in ("train", "convert", "evaluate"))
RUN = ("--device", "cpu", "-b", "8", "-j", "0", "--lr", "0.02", "--warmup-epochs", "0", "--smoothing", "0")
MODEL = ("--model", "test_efficientnet", "--num-classes", "3", "--img-size", "32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def original(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained network with SiLU."""
    out = tmp_path_factory.mktemp("original")
    command = ["--data-dir", str(data), *MODEL, *RUN, "--epochs", "2", "--output", str(out), "--experiment", "run"]
    assert train.main(command) == 0
    return out / "run"


@pytest.fixture(autouse=True)
def without_int8(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "int8" not in request.node.name:
        monkeypatch.setattr(convert.ConversionToInt8, "export", lambda *_: None)


def options(original: Path, out: Path, *more: str, experiment: str = "converted") -> list[str]:
    return [
        "--checkpoint", str(original), *RUN, "--epochs", "3", "--blend-epochs", "1.5", "--blend-order", "input",
        "--output", str(out), "--experiment", experiment, *more,
    ]  # fmt: skip


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(parse_evaluation(folder))[0].state_dict()


def parse_evaluation(folder: Path) -> Any:
    return evaluate.build_parser().parse_args(["--checkpoint", str(folder / "last.pth.tar"), "-j", "0"])


# --- the blend


class Network(nn.Module):
    """Three activations, one of which overwrites its input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.GELU(), nn.SiLU(inplace=True), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def blended(order: str, updates: int) -> tuple[Network, Network, Blend]:
    original = Network()
    student = timm_sugar.sugarize(Network(), "same")
    return original, student, Blend(student, original, updates, order)


SHARES = {  # after 0, 1, ... of 6 updates
    "all": [[i / 6] * 3 for i in range(6)],
    "input": [[0, 0, 0], [0.5, 0, 0], [1, 0, 0], [1, 0.5, 0], [1, 1, 0], [1, 1, 0.5]],
    "output": [[0, 0, 0], [0, 0, 0.5], [0, 0, 1], [0, 0.5, 1], [0, 1, 1], [0.5, 1, 1]],
}


@pytest.mark.parametrize("order", SHARES)
def test_activations_move_from_the_old_ones_to_relu(order: str) -> None:
    _, student, blend = blended(order, updates=6)
    x = torch.linspace(-3, 3, 20)
    for update, shares in enumerate(SHARES[order]):
        blend.move(update)
        expected = x
        for old, share in zip((F.gelu, F.silu, F.gelu), shares, strict=True):
            expected = share * F.relu(expected) + (1 - share) * old(expected)
        torch.testing.assert_close(student.train()(x), expected)
        assert torch.equal(student.eval()(x), F.relu(x))
    blend.move(6)
    assert torch.equal(student.train()(x), F.relu(x))
    assert not any(module._forward_hooks for module in student.modules())


def test_a_blend_that_begins_is_the_original_and_learns_as_it_does() -> None:
    original, student, blend = blended("all", updates=5)
    blend.move(0)
    gradients = []
    for network in (original, student):
        x = torch.linspace(-3, 3, 20, requires_grad=True)
        (gradient,) = torch.autograd.grad(network(x * 1).square().sum(), x)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)


# --- a run


def test_a_conversion_says_what_it_cost_and_won_back(
    original: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.main(options(original, tmp_path)) == 0
    folder = tmp_path / "converted"
    assert account(folder) in capsys.readouterr().out
    before = rows(original / "summary.csv")
    best = max(before, key=lambda row: float(row["eval_top1"]))
    assert rows(folder / "original.csv")[0]["eval_loss"] == best["eval_loss"]
    model = timm.create_model("test_efficientnet", num_classes=3)
    model.load_state_dict(load_weights(original / "model_best.pth.tar", True)[0])
    assert relu_score(model, data) == score_of(rows(folder / "start.csv")[0])
    trained = load_model(parse_evaluation(folder))[0]
    kinds = {type(module).__name__ for module in trained.modules()}
    assert "SUGAR" in kinds
    assert "SiLU" not in kinds
    assert relu_score(trained, data) == score_of(rows(folder / "summary.csv")[-1])


def test_what_a_conversion_needs_for_its_account_may_be_gone(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--blend-epochs", "0", "--blend-order", "all", "--epochs", "1"]
    assert convert.main(options(original, tmp_path, *short)) == 0
    (tmp_path / "converted" / "original.csv").unlink()
    assert convert.main(["--resume", str(tmp_path / "converted"), "--epochs", "2"]) == 0
    assert "(original.csv or start.csv is gone, so there is nothing to compare)" in capsys.readouterr().out


def test_a_conversion_does_not_go_on_from_another_original(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(original, tmp_path / "own")
    assert convert.main(options(own, tmp_path, "--epochs", "2")) == 0
    shutil.copyfile(own / "checkpoint-0.pth.tar", own / "model_best.pth.tar")
    shutil.copyfile(own / "checkpoint-1.pth.tar", own / "last.pth.tar")
    best = load_weights(original / "model_best.pth.tar", True)[0]
    if all(torch.equal(value, best[name]) for name, value in load_weights(own / "model_best.pth.tar", True)[0].items()):
        shutil.copyfile(own / "last.pth.tar", own / "model_best.pth.tar")
    line = error_line(convert.main, ["--resume", str(tmp_path / "converted"), "--epochs", "3"], capsys)
    assert "the network that is converted has changed since; begin anew, without --resume" in line


def test_a_checkpoint_that_a_config_names_says_what_its_model_is(original: Path, tmp_path: Path) -> None:
    words = options(original, tmp_path, "--epochs", "2", "--no-int8")
    place = words.index("--checkpoint")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"checkpoint": words[place + 1]}))
    assert convert.main([*words[:place], *words[place + 2 :], "--config", str(tmp_path / "c.yaml")]) == 0
    once = weights(tmp_path / "converted")
    shutil.rmtree(tmp_path / "converted")
    assert convert.main(words) == 0
    assert all(torch.equal(value, once[name]) for name, value in weights(tmp_path / "converted").items())


def test_int8_that_was_cut_off_is_made_by_the_same_command_again(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert.ConversionToInt8, "export", interrupted)
        assert convert.main(options(original, tmp_path, "--epochs", "2")) == 130
    trained, again = weights(tmp_path / "converted"), ["--resume", str(tmp_path / "converted")]
    output = "sys.argv[sys.argv.index('--output') + 1]"
    (tmp_path / "export.py").write_text(f"import sys, pathlib\npathlib.Path({output}).write_text('int8')\n")
    monkeypatch.setattr(convert, "EXPORT", tmp_path / "export.py")
    assert convert.main(again) == 0
    assert (tmp_path / "converted" / "model-int8.onnx").read_text() == "int8"
    assert all(torch.equal(value, trained[name]) for name, value in weights(tmp_path / "converted").items())
    assert convert.main([*again, "--epochs", "3", "--no-int8"]) == 0
    assert not (tmp_path / "converted" / "model-int8.onnx").exists(), "it is of the weights before"
    assert "the run is finished" in error_line(convert.main, again, capsys)


def score_of(row: dict[str, str]) -> Any:
    return pytest.approx((float(row["eval_top1"]), float(row["eval_loss"])), rel=1e-4)


def relu_score(model: nn.Module, data: Path) -> tuple[float, float]:
    """Top-1 (percent) and loss with nn.ReLU in the place of each hidden activation, by a loop of its own."""
    if not any(isinstance(module, timm_sugar.SUGAR) for module in model.modules()):
        timm_sugar.sugarize(model)
    model = timm_sugar.to_relu(model).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({"img_size": 32}, model=model))
    images, labels = [], []
    for label, folder in enumerate(sorted((data / "validation").iterdir())):
        for path in folder.iterdir():
            with Image.open(path) as image:
                images.append(transform(image.convert("RGB")))
            labels.append(label)
    with torch.no_grad():
        output, target = model(torch.stack(images)), torch.tensor(labels)
    return 100 * (output.argmax(1) == target).float().mean().item(), F.cross_entropy(output, target).item()


@pytest.mark.slow
def test_an_interrupted_conversion_goes_on_as_if_it_had_not_been(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert convert.main(options(original, tmp_path, experiment="whole")) == 0
    run_epoch = convert.Conversion.train_one_epoch

    def interrupted(self: Any, epoch: int) -> float:
        if epoch == 1:
            raise KeyboardInterrupt
        return run_epoch(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(convert.Conversion, "train_one_epoch", interrupted)
        assert convert.main(options(original, tmp_path, experiment="cut")) == 130
    assert convert.main(["--resume", str(tmp_path / "cut")]) == 0
    for file in ("original.csv", "start.csv", "summary.csv"):
        assert rows(tmp_path / "cut" / file) == rows(tmp_path / "whole" / file)
    cut, whole = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert cut.keys() == whole.keys()
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_the_original_teaches_if_it_has_a_weight(original: Path, tmp_path: Path) -> None:
    """The loss is that of the labels, plus the weight times the Kullback-Leibler distance from the original."""
    runs = []
    for words in (["--distill", "0"], ["--distill", "0.5", "--temperature", "2"]):
        words = options(original, tmp_path, *words, experiment=words[1])
        runs.append(convert.Conversion(*parse_conversion(words, convert.build_parser())))
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        alone, taught = (run.task.eval()(x, y)["loss"] for run in runs)
        teacher, student = (model.eval()(x) / 2 for model in (runs[0].teacher, runs[0].task.get_trainable_module()))
        distance = (F.softmax(teacher, 1) * (F.log_softmax(teacher, 1) - F.log_softmax(student, 1))).sum(1).mean()
    for run in runs:
        run.close()
    torch.testing.assert_close(taught, alone + 0.5 * distance * 2**2)


@pytest.mark.slow
def test_int8_of_the_converted_network_is_written_and_scored(
    original: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    assert convert.main(options(original, tmp_path)) == 0
    assert (tmp_path / "converted" / "model-int8.onnx").stat().st_size > 10_000
    assert "model-int8.onnx" in capfd.readouterr().out.split("top-1 of 12 images")[1]


def test_without_a_validation_split_there_is_no_int8_and_no_failure(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.main(options(original, tmp_path, "--val-split", "")) == 0
    assert "no int8: it needs a --data-dir with train/" in capsys.readouterr().out
    assert (tmp_path / "converted" / "last.pth.tar").exists()


def test_a_failed_int8_export_is_a_failure_that_keeps_what_was_converted(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "export.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(convert, "EXPORT", tmp_path / "export.py")
    line = error_line(convert.main, options(original, tmp_path), capsys)
    assert "converted, but not to int8, see above; try again with: python scripts/export.py --checkpoint" in line
    assert (tmp_path / "converted" / "last.pth.tar").exists()


@pytest.mark.slow
def test_a_network_of_torchvision_becomes_an_int8_file_as_the_page_says(data: Path, tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision").models
    pytest.importorskip("onnxruntime")
    page = (SCRIPTS.parent / "docs" / "convert.md").read_text()
    (tmp_path / "my_models.py").write_text(page.partition("# my_models.py")[2].partition("```")[0])
    torch.save(models.mobilenet_v3_small(num_classes=3).state_dict(), tmp_path / "weights.pth")
    (command,) = re.findall(r"convert.py (--device-modules .*?)\n```", page, flags=re.DOTALL)
    words = [{"5": "3", "DATA": str(data), "10": "1"}.get(word, word) for word in command.replace("\\\n", " ").split()]
    more = [*RUN, "--img-size", "64", "--output", ".", "--experiment", "run"]
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "convert.py"), *words, *more],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "with Hardswish, ReLU" in done.stdout
    assert (tmp_path / "run" / "model-int8.onnx").stat().st_size > 1_000_000


# --- mistakes

WRONG = {
    "nothing to replace": (("--model", "test_resnet", "--initial-checkpoint", "{relu}"), "no activations but ReLU"),
    "no weights": (("--model", "resnet18"), "no trained weights"),
    "two weights": (("--model", "resnet18", "--pretrained", "--checkpoint", "{run}"), "both name the trained weights"),
    "relu already": (("--model", "resnet18_sugar", "--pretrained"), "has ReLU already"),
    "left out": (("--checkpoint", "{run}", "--model", "mobilevitv2_050"), "there is no mobilevitv2_050_sugar"),
    "other network": (("--checkpoint", "{run}", "--model", "test_vit"), "can't create model test_vit"),
    "no file": (("--checkpoint", "nowhere"), "no such file or folder"),
    "only blend": (("--checkpoint", "{run}", "--epochs", "2", "--blend-epochs", "2"), "leave epochs for ReLU itself"),
    "compiled": (("--checkpoint", "{run}", "--blend-epochs", "1", "--torchcompile"), "can't be compiled"),
    "surrogate": (("--checkpoint", "{run}", "--surrogate", "nope"), "unknown surrogate 'nope'"),
    "its other option": (("--checkpoint", "{run}", "--model-kwargs", "surrogate=nelu"), "has an option for it"),
    "a list for settings": (("--config", "{list}"), "expected 'option: value' lines"),
    "a number for a path": (("--config", "{number}"), "no such file or folder"),
    "weight": (("--checkpoint", "{run}", "--distill", "-1"), "expected 0 or more"),
    "temperature": (("--checkpoint", "{run}", "--temperature", "0"), "expected above 0"),
    "hot": (("--checkpoint", "{run}", "--temperature", "1e300"), "at most 1000"),
    "no teacher": (("--checkpoint", "{run}", "--distill", "0", "--temperature", "2"), "no effect without --distill"),
    "no blend": (("--checkpoint", "{run}", "--blend-order", "output"), "no effect without --blend-epochs"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_one_line(
    case: str, original: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = WRONG[case]
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "relu.pth")
    (tmp_path / "list.yaml").write_text("[a, b]\n")
    (tmp_path / "number.yaml").write_text("checkpoint: 5\n")
    files = {"relu": tmp_path / "relu.pth", "list": tmp_path / "list.yaml", "number": tmp_path / "number.yaml"}
    argv = [word.format(run=original, **files) for word in words]
    argv += ["--data-dir", str(data), "--output", str(tmp_path / "runs"), "--device", "cpu", "-j", "0"]
    assert message in error_line(convert.main, argv, capsys)
    assert not (tmp_path / "runs").exists()


def test_an_original_of_other_classes_is_refused(
    original: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_images(tmp_path / "other", classes=("x", "y", "z"))
    argv = [*options(original, tmp_path / "runs"), "--data-dir", str(other)]
    assert f"{original} was trained on other classes (cat, not x)" in error_line(convert.main, argv, capsys)
    assert not (tmp_path / "runs").exists()
