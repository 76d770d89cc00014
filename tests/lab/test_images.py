"""Images that are not 8 bits, folders without images, names that timm doesn't know: right, or one line."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab.training.data import DataError, check_classes, class_to_idx, open_dataset, read_image
from PIL import Image
from scripting import TINY, deny_reading, error_line, load_script, make_images

train, evaluate = load_script("train"), load_script("evaluate")


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, grey (H, W) or RGB (H, W, 3), written by hand."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_sixteen_bits_are_the_upper_eight(mode: str) -> None:
    values = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    grey = np.asarray(read_image(io.BytesIO(png16(values)), mode))
    expected = (values // 256).astype(np.uint8)
    assert np.array_equal(grey if mode == "L" else grey[..., 1], expected)
    colour = np.asarray(read_image(io.BytesIO(png16(np.stack([values] * 3, -1))), "RGB"))
    assert np.array_equal(colour[..., 0], expected)


def tiff(values: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "tiff")
    return file


def test_values_of_unknown_range_are_not_clipped() -> None:
    for dtype in (np.int32, np.float32):
        small = np.arange(256, dtype=dtype).reshape(16, 16)
        assert np.array_equal(np.asarray(read_image(tiff(small), "L")), small.astype(np.uint8))
        with pytest.raises(ValueError, match="values from 0 to 25500: convert it to 8 or 16 bits a channel"):
            read_image(tiff(small * 100), "L")
    wide = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    assert np.array_equal(np.asarray(read_image(tiff(wide), "L")), (wide // 256).astype(np.uint8))


def test_a_sixteen_bit_data_set_trains_like_its_eight_bits(tmp_path: Path) -> None:
    """The same pixels, times 257: the losses are the same to the last bit."""
    images = make_images(tmp_path / "eight")
    for path in images.rglob("*.png"):
        with Image.open(path) as image:
            grey = image.convert("L")
        grey.save(path)
        wide = tmp_path / "sixteen" / path.relative_to(images)
        wide.parent.mkdir(parents=True, exist_ok=True)
        wide.write_bytes(png16(np.asarray(grey).astype(np.uint16) * 257))
    summaries = []
    for name in ("eight", "sixteen"):
        argv = ["--data-dir", str(tmp_path / name), *TINY, "--device", "cpu", "-b", "12", "-j", "0", "--epochs", "1"]
        assert train.main([*argv, "--output", str(tmp_path / "out"), "--experiment", name]) == 0
        summaries.append((tmp_path / "out" / name / "summary.csv").read_text())
    assert summaries[0] == summaries[1]


def options(data: Path, out: Path) -> list[str]:
    argv = ["--data-dir", str(data), *TINY, "--device", "cpu", "-b", "8", "-j", "0", "--epochs", "1"]
    return [*argv, "--output", str(out), "--experiment", "run"]


def test_a_class_without_images_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In both splits: timm would number the other classes as if it weren't there."""
    data = make_images(tmp_path / "data")
    for split in ("train", "validation"):
        (data / split / "bat").mkdir()
        (data / split / "bat" / "notes.txt").write_text("to do")
        (data / split / ".cache").mkdir()
    line = error_line(train.main, options(data, tmp_path / "out"), capsys)
    assert f"class folder {data / 'train' / 'bat'} has no images" in line
    assert not (tmp_path / "out").exists()
    for split in ("train", "validation"):
        (data / split / "bat" / "notes.txt").unlink()
        (data / split / "bat").rmdir()
    assert train.main(options(data, tmp_path / "out")) == 0


def test_a_class_map_may_name_a_class_without_images(tmp_path: Path) -> None:
    data = make_images(tmp_path / "data")
    (data / "train" / "bat").mkdir()
    (tmp_path / "map.txt").write_text("bat\ncat\ndog\nowl\n")
    dataset = open_dataset("", str(data), "train", class_map=str(tmp_path / "map.txt"))
    check_classes(dataset, dataset, 4)
    assert dataset.reader.class_to_idx["cat"] == 1


@pytest.mark.parametrize("text", ["cat\ndog\nowl\n\n", "cat\ncat\ndog\nowl\n"])
def test_a_class_map_with_an_odd_line_is_named(text: str, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data")
    (tmp_path / "map.txt").write_text(text)
    with pytest.raises(DataError, match=r"map\.txt: a line is empty, or a class stands there twice"):
        open_dataset("", str(data), "train", class_map=str(tmp_path / "map.txt"))


def test_a_broken_image_with_an_odd_name_is_named_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_images(tmp_path / "data")
    (data / "train" / "owl" / "a\nb.png").write_bytes(b"none")
    line = error_line(train.main, options(data, tmp_path / "out"), capsys)
    assert f"can't read image {data}/train/owl/a\\nb.png" in line


@pytest.mark.parametrize("name", ["torch/image_folder", "torch/folder"])
def test_a_folder_goes_without_a_name_of_a_data_set(name: str, tmp_path: Path) -> None:
    """torchvision's reader would take one folder for both splits, and know no broken image."""
    data = make_images(tmp_path / "data")
    with pytest.raises(DataError, match="leave it out, --data-dir alone is a folder of images"):
        open_dataset(name, str(data / "train"), "train")


def test_classes_below_other_folders_are_no_classes_without_images(tmp_path: Path) -> None:
    data = make_images(tmp_path / "data")
    (data / "train" / "pets").mkdir()
    (data / "train" / "cat").rename(data / "train" / "pets" / "cat")
    dataset = open_dataset("", str(data), "train")
    check_classes(dataset, dataset, 3)


@pytest.mark.parametrize("name", ["nope/nope", "nope", "/", "folder/x"])
def test_a_data_set_that_timm_does_not_know(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_images(tmp_path / "data")
    argv = [*options(data, tmp_path / "out"), "--dataset", name]
    assert f"--dataset {name}: expected torch/..., hfds/..." in error_line(train.main, argv, capsys)
    with pytest.raises(DataError):
        open_dataset(name, str(data), "train")


def test_a_decompression_bomb_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PIL's limit, lowered here, is on twice as many pixels as it warns for."""
    data = make_images(tmp_path / "data")
    bomb = data / "train" / "owl" / "3.png"
    Image.new("RGB", (1000, 1000)).save(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    line = error_line(train.main, options(data, tmp_path / "out"), capsys)
    assert f"can't read image {bomb} (Image size (1000000 pixels) exceeds limit" in line
    assert train.main([*options(data, tmp_path / "again"), "--skip-broken-images"]) == 0
    assert f"skipped image {bomb}" in caplog.text


def test_a_folder_without_splits_is_not_validated_on_what_it_was_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_images(tmp_path / "data") / "train"
    line = error_line(train.main, options(data, tmp_path / "out"), capsys)
    assert f"{data} would be both training and validation split" in line
    assert not (tmp_path / "out").exists()
    assert train.main([*options(data, tmp_path / "out"), "--val-split="]) == 0


def test_a_link_to_the_training_split_is_no_validation_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_images(tmp_path / "data")
    (data / "validation").rename(tmp_path / "validation")
    (data / "validation").symlink_to(data / "train")
    assert "both training and validation split" in error_line(train.main, options(data, tmp_path / "out"), capsys)


def test_the_same_split_may_be_named_twice(tmp_path: Path) -> None:
    data = make_images(tmp_path / "data")
    assert train.main([*options(data, tmp_path / "out"), "--val-split", "train"]) == 0


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("", "train[:50%]", "of a folder no part can be taken"),
        ("torch/cifar10", "train[:50%]", "of torch/cifar10 no part can be taken"),
        ("torch/cifar10", "trian", "data set torch/cifar10 has no split 'trian'"),
        ("Torch/MNIST", "", "has no split ''"),
    ],
)
def test_a_split_is_never_more_or_another_than_was_asked_for(
    name: str, split: str, message: str, tmp_path: Path
) -> None:
    """timm takes all of a folder, and of torchvision's data sets the test images."""
    with pytest.raises(DataError, match=re.escape(message)):
        open_dataset(name, str(make_images(tmp_path / "data")), split)


def test_a_number_of_samples_is_refused_for_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*options(make_images(tmp_path / "data"), tmp_path / "out"), "--train-num-samples", "5"]
    assert "a folder is used whole" in error_line(train.main, argv, capsys)


@pytest.mark.parametrize("policy", ["rand-m9", "augmix-m3", "original", "v0"])
def test_policies_that_need_colour_are_refused_for_grey_images(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*options(make_images(tmp_path / "data"), tmp_path / "out"), "--in-chans", "1"]
    assert f"--aa {policy}" in error_line(train.main, [*argv, "--aa", policy], capsys)
    assert train.main([*argv, "--aa", "3a"]) == 0


def test_an_image_that_can_be_read_but_not_prepared_is_named(tmp_path: Path) -> None:
    dataset: Any = open_dataset("", str(make_images(tmp_path / "data")), "train")
    dataset.transform = lambda image: image.nothing
    with pytest.raises(DataError, match=r"can't prepare image .*/train/cat/\d.png: 'Image' object has no"):
        dataset[0]


@pytest.mark.parametrize("target", [".", "..", "../..", "../../validation/cat"])
def test_a_link_that_leads_back_is_named(target: str, tmp_path: Path) -> None:
    images = make_images(tmp_path / "data")
    (images / "train" / "cat" / "round").symlink_to(target)
    (images / "validation" / "cat" / "back").symlink_to("../../train/cat")
    with pytest.raises(DataError, match=r"round.* leads back to a folder that it is in"):
        open_dataset("", str(images), "train")


def test_links_that_lead_elsewhere_are_followed(tmp_path: Path) -> None:
    images = make_images(tmp_path / "data")
    (images / "train" / "owl").rename(tmp_path / "store")
    (images / "train" / "owl").symlink_to(tmp_path / "store")
    assert class_to_idx(open_dataset("", str(images), "train")) == {"cat": 0, "dog": 1, "owl": 2}


@pytest.mark.parametrize("pair", [("Cat", "cat"), ("1", "01")])
def test_classes_that_timm_orders_by_chance_are_named(pair: tuple[str, str], tmp_path: Path) -> None:
    images = make_images(tmp_path / "data", classes=(*pair, "owl"))
    with pytest.raises(DataError, match=r"differ in nothing by which timm orders them .* --class-map"):
        open_dataset("", str(images), "train")
    (tmp_path / "map.txt").write_text("\n".join([*pair, "owl"]))
    dataset = open_dataset("", str(images), "train", class_map=str(tmp_path / "map.txt"))
    assert class_to_idx(dataset) == {pair[0]: 0, pair[1]: 1, "owl": 2}


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_images(tmp_path / "data")
    denied = images / "train" / "dog"
    deny_reading(denied, monkeypatch)
    with pytest.raises(DataError, match=f"can't read folder {denied}: Permission denied"):
        open_dataset("", str(images), "train")
