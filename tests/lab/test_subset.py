"""Subsets: the same images whatever the files are called, and nothing half-made."""

from __future__ import annotations

import shutil
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from lab.experiments.subset import make_subset
from lab.training.data import DataError, open_dataset
from PIL import Image
from scripting import make_images
from torch.utils.data import IterableDataset


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_images(tmp_path / "data")


def folder(root: Path) -> Any:
    return partial(open_dataset, "", str(root))


def pixels(root: Path) -> list[bytes]:
    return [Image.open(path).tobytes() for path in sorted(root.rglob("*.png"))]


def test_it_holds_the_images_of_lowest_hash_whatever_they_are_called(tmp_path: Path, data: Path) -> None:
    renamed = tmp_path / "renamed"
    shutil.copytree(data, renamed)
    for place in (renamed / "train").iterdir():
        for i, path in enumerate(sorted(place.iterdir(), reverse=True)):
            path.rename(place / f"x{i}.png")
    make_subset(folder(data), tmp_path / "a", 3)
    make_subset(folder(renamed), tmp_path / "b", 3)
    assert pixels(tmp_path / "a") == pixels(tmp_path / "b")
    assert sorted(pixels(tmp_path / "a/validation")) == sorted(pixels(data / "validation"))
    for label, name in enumerate(("cat", "dog", "owl")):
        ranked = sorted(pixels(data / "train" / name), key=lambda image: sha256(image).hexdigest())
        assert pixels(tmp_path / f"a/train/{label:04}") == ranked[:3]


def test_held_out_images_are_the_next_ones_and_the_training_images_stay(tmp_path: Path, data: Path) -> None:
    make_subset(folder(data), tmp_path / "a", 3)
    make_subset(folder(data), tmp_path / "held", 3, 2)
    assert pixels(tmp_path / "held/train") == pixels(tmp_path / "a/train")
    for label, name in enumerate(("cat", "dog", "owl")):
        ranked = sorted(pixels(data / "train" / name), key=lambda image: sha256(image).hexdigest())
        assert pixels(tmp_path / f"held/validation/{label:04}") == ranked[3:5]


def test_no_image_that_the_start_knows_is_held_out(tmp_path: Path, data: Path) -> None:
    make_subset(folder(data), tmp_path / "start", 5)
    make_subset(folder(data), tmp_path / "run", 3, 2, of=5)
    start = pixels(tmp_path / "start/train")
    assert set(pixels(tmp_path / "run/train")) < set(start)
    assert len(pixels(tmp_path / "run/train")) == 3 * 3
    assert len(pixels(tmp_path / "run/validation")) == 3 * 2
    assert not set(pixels(tmp_path / "run/validation")) & set(start)
    with pytest.raises(DataError, match="fewer than the 9"):
        make_subset(folder(data), tmp_path / "more", 3, 4, of=5)


def test_torchvisions_data_sets_give_the_same_subset(tmp_path: Path, data: Path) -> None:
    """They are lists of PIL images with a `transform`, as here."""

    class InMemory(torch.utils.data.Dataset):
        transform: Any = None

        def __init__(self, split: str) -> None:
            paths = sorted((data / split).rglob("*.png"), reverse=True)
            self.items = [(Image.open(path), ["cat", "dog", "owl"].index(path.parent.name)) for path in paths]

        def __len__(self) -> int:
            return len(self.items)

        def __getitem__(self, i: int) -> Any:
            image, label = self.items[i]
            return self.transform(image), label

    make_subset(folder(data), tmp_path / "a", 3)
    make_subset(InMemory, tmp_path / "b", 3)
    assert pixels(tmp_path / "a") == pixels(tmp_path / "b")


def test_too_few_images_or_a_stream_leave_nothing_behind(tmp_path: Path, data: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            yield from ()

    for source, message in ((folder(data), "fewer than the 9"), (lambda split: Stream(), "stream")):
        with pytest.raises(DataError, match=message):
            make_subset(source, tmp_path / "a", 5, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_seed_draws_other_images_and_holds_out_others_still(tmp_path: Path, data: Path) -> None:
    """By the SHA-256 of seed and pixels; each seed's training images are the same with and without held-out ones."""
    for seed in (1, 2):
        make_subset(folder(data), tmp_path / f"a{seed}", 3, seed=seed)
        make_subset(folder(data), tmp_path / f"held{seed}", 3, 2, seed)
        assert pixels(tmp_path / f"a{seed}/train") == pixels(tmp_path / f"held{seed}/train")
        for label, name in enumerate(("cat", "dog", "owl")):
            images = pixels(data / "train" / name)
            ranked = sorted(images, key=lambda image: sha256(f"seed {seed}".encode() + image).hexdigest())
            assert pixels(tmp_path / f"held{seed}/train/{label:04}") == ranked[:3]
            assert pixels(tmp_path / f"held{seed}/validation/{label:04}") == ranked[3:5]
    assert pixels(tmp_path / "a1/train") != pixels(tmp_path / "a2/train")


def test_all_but_the_held_out_images(tmp_path: Path, data: Path) -> None:
    make_subset(folder(data), tmp_path / "a", held_out=2)
    parts = [pixels(tmp_path / "a" / split) for split in ("train", "validation")]
    assert [len(part) for part in parts] == [3 * 6, 3 * 2]
    assert sorted(parts[0] + parts[1]) == sorted(pixels(data / "train"))
