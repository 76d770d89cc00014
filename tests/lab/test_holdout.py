"""`scripts/holdout.py`: what it sets aside, and that nothing is left behind where it can't."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripting import deny_reading, error_line, load_script, make_images
from timm.data import create_dataset

holdout = load_script("holdout")


def listing(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if not path.is_dir()}


def test_each_class_is_divided_and_no_image_is_in_both_splits(tmp_path: Path) -> None:
    make_images(tmp_path / "data", train=10, validation=2)
    assert holdout.main([str(tmp_path / "data"), str(tmp_path / "out"), "--share", "0.3"]) == 0
    train, held_out = listing(tmp_path / "out/train"), listing(tmp_path / "out/validation")
    assert not train.keys() & held_out.keys()
    assert train.keys() | held_out.keys() == listing(tmp_path / "data/train").keys()
    for name, link in {**train, **held_out}.items():
        assert link.read_bytes() == (tmp_path / "data/train" / name).read_bytes()
    for folder in (tmp_path / "out/validation").iterdir():
        assert len(list(folder.iterdir())) == 3
    assert len(create_dataset("", root=str(tmp_path / "out"), split="validation")) == len(held_out)


def test_what_is_no_image_is_left_out_and_classes_may_lie_deeper(tmp_path: Path) -> None:
    """As timm reads the folder: the last folder is the class."""
    data = make_images(tmp_path / "data", train=10, validation=2)
    classes = list((data / "train").iterdir())
    (data / "train" / "group").mkdir()
    for folder in classes:
        folder.rename(data / "train" / "group" / folder.name)
        (data / "train" / "group" / folder.name / ".ipynb_checkpoints").mkdir()
        for name in (".DS_Store", "notes.txt"):
            (data / "train" / "group" / folder.name / name).write_text("x")
    assert holdout.main([str(data), str(tmp_path / "out"), "--share", "0.3"]) == 0
    for split, count in (("train", 7), ("validation", 3)):
        for folder in classes:
            assert len(list((tmp_path / "out" / split / "group" / folder.name).iterdir())) == count


def test_a_class_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    denied = make_images(tmp_path / "data", train=10, validation=2) / "train" / "dog"
    deny_reading(denied, monkeypatch)
    line = error_line(holdout.main, [str(tmp_path / "data"), str(tmp_path / "out"), "--share", "0.3"], capsys)
    assert f"can't read folder {denied}" in line
    assert not (tmp_path / "out").exists()


def test_a_kill_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(tmp_path / "data", train=10, validation=2)
    link, seen = Path.symlink_to, []

    def watched(path: Path, target: Path) -> None:
        link(path, target)
        seen.append((tmp_path / "out").exists())

    monkeypatch.setattr(Path, "symlink_to", watched)
    assert holdout.main([str(tmp_path / "data"), str(tmp_path / "out"), "--share", "0.3"]) == 0
    assert seen == [False] * 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


def test_the_seed_decides_which(tmp_path: Path) -> None:
    make_images(tmp_path / "data", train=10, validation=2)
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        holdout.main([str(tmp_path / "data"), str(tmp_path / out), "--share", "0.5", "--seed", seed])
    a, b, c = (listing(tmp_path / out / "train").keys() for out in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ("0", "expected above 0 and below 1, not 0"),
        ("1.5", "expected above 0 and below 1, not 1.5"),
        ("0.01", "leaves a split empty"),
    ],
)
def test_a_share_that_leaves_a_split_empty_is_refused(
    tmp_path: Path, share: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_images(tmp_path / "data", train=10, validation=2)
    assert message in error_line(
        holdout.main, [str(tmp_path / "data"), str(tmp_path / "out"), "--share", share], capsys
    )
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(tmp_path / "data", train=4, validation=2)
    before = listing(tmp_path / "data").keys()
    assert "exists" in error_line(holdout.main, [str(tmp_path / "data"), str(tmp_path / "data")], capsys)
    assert listing(tmp_path / "data").keys() == before


def test_a_folder_without_splits_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no split 'train'" in error_line(holdout.main, [str(tmp_path), str(tmp_path / "out")], capsys)


@pytest.mark.parametrize("out", ["data/train/out", "data/val", "data/train/../out"])
def test_the_data_stays_as_it_is(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_images(tmp_path / "data", train=10, validation=2)
    before = listing(tmp_path)
    assert "is inside of" in error_line(holdout.main, [str(data), str(tmp_path / out), "--share", "0.5"], capsys)
    assert listing(tmp_path) == before
