"""Training and evaluation on a real WebDataset (--dataset wds/): what is missing or odd in it is one line."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lab.training.data import DataError, open_dataset
from lab.training.runs import load_file
from PIL import Image
from scripting import TINY, error_line, load_script

train, evaluate = load_script("train"), load_script("evaluate")
FAST = ["-j", "0", "--device", "cpu"]
# webdataset leaves files to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:Length of IterableDataset"
)


def make_shard(path: Path, labels: list[int]) -> Path:
    """A tar file of noisy images with these labels."""
    generator = np.random.default_rng(len(path.name))
    with tarfile.open(path, "w") as shard:
        for i, label in enumerate(labels):
            image = io.BytesIO()
            Image.fromarray(generator.integers(0, 255, (36, 36, 3), dtype=np.uint8)).save(image, "PNG")
            for suffix, content in (("png", image.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{path.stem}-{i:04}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("train-0000", "train-0001", "validation-0000"):
        make_shard(folder / f"{name}.tar", [0, 1, 2] * 4)
    return folder


def options(data: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--dataset", "wds/", "--data-dir", str(data), "--train-split", "train-{0000..0001}.tar"),
        *("--val-split", "validation-0000.tar", "--train-num-samples", "24", "--val-num-samples", "12"),
        *(*TINY, *FAST, "-b", "8", "--lr", "0.02", "--sched", "none", "--output", str(out), *more),
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last.pth.tar")["state_dict"]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_run_goes_on_as_if_it_had_not_been_cut(workers: str, data: Path, tmp_path: Path) -> None:
    for name, epochs in (("whole", "3"), ("cut", "1")):
        command = options(data, tmp_path, "--experiment", name, "--epochs", epochs, "-j", workers)
        assert train.main(command) == 0
    assert train.main(["--resume", str(tmp_path / "cut"), "--epochs", "3"]) == 0
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_a_shard_that_is_missing_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=f"there is no {data / 'train-0002.tar'}"):
        open_dataset("wds/", str(data), "train-{0000..0002}.tar")
    monkeypatch.setattr("timm.data.readers.reader_wds._load_info", lambda _: {})  # which would be fetched
    open_dataset("wds/", "https://example.com", "train-{0000..0002}.tar")  # nobody knows yet


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("label", [3, -1])
def test_a_label_without_an_output_is_named(
    label: int, workers: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shard(data / "validation-0000.tar", [0, 1, label])
    argv = options(data, tmp_path / "runs", "-j", workers, "--epochs", "1")
    expected = f"there is a label {label}, but the model has outputs 0 to 2"
    assert expected in error_line(train.main, argv, capsys)
    make_shard(data / "train-0000.tar", [0, 1, label] * 4)
    argv += ["--mixup", "0.2", "--experiment", "mixed"]  # mixes labels before the model sees them
    assert expected in error_line(train.main, argv, capsys)


def test_a_stream_without_images_is_an_error(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(options(data, tmp_path, "--experiment", "run", "--epochs", "1")) == 0
    scored = ["--checkpoint", str(tmp_path / "run"), "--split", "validation-0000.tar", *FAST]
    results = ["--results-file", str(tmp_path / "row.json"), "--results-format", "json"]
    assert evaluate.main([*scored, *results]) == 0
    assert json.loads((tmp_path / "row.json").read_text())["images"] == 12
    make_shard(data / "validation-0000.tar", [])
    assert "the data gave no image" in error_line(evaluate.main, scored, capsys)
    argv = options(data, tmp_path, "--experiment", "empty", "--epochs", "1")
    assert "the validation split gave no image" in error_line(train.main, argv, capsys)
    for name in ("train-0000.tar", "train-0001.tar"):
        make_shard(data / name, [])
    argv = options(data, tmp_path, "--experiment", "nothing", "--epochs", "1")
    assert "the training split gave no image" in error_line(train.main, argv, capsys)
