"""A fixed part of a data set as a folder of images, the same ones wherever the data comes from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset

from lab.training.data import DataError

Split = Callable[[str], Any]  # opens a split as a data set of pairs: image, label


def _images(open_split: Split, split: str) -> Any:
    """A split as pairs of an RGB image and a label."""
    images = open_split(split)
    if isinstance(images, IterableDataset):
        raise DataError("this data set is a stream, of which no subset can be taken: use a folder or torch/...")
    images.transform = lambda image: image.convert("RGB")
    return images


def _ranked(images: Any, seed: int | None = None) -> dict[int, list[tuple[str, int]]]:
    """For each class the SHA-256 of seed and pixels and the index of each image, lowest first."""
    salt = b"" if seed is None else f"seed {seed}".encode()
    by_class: dict[int, list[tuple[str, int]]] = {}
    for i in range(len(images)):
        image, label = images[i]
        by_class.setdefault(int(label), []).append((sha256(salt + image.tobytes()).hexdigest(), i))
    return {label: sorted(entries) for label, entries in by_class.items()}


def make_subset(
    open_split: Split,
    root: Path,
    per_class: int | None = None,
    held_out: int = 0,
    seed: int | None = None,
    of: int | None = None,
) -> None:
    """Write root/train/LABEL/ and root/validation/LABEL/ as PNG, whole or not at all.

    The images are chosen by the SHA-256 of their pixels, so they are the same whatever the files are called.

    Args:
        open_split: Opens a split that `lab.training.data.open_dataset` knows.
        root: The folder to write.
        per_class: How many training images of each class; None for all but those held out.
        held_out: How many further training images of each class to validate on; 0 for split `validation`.
        seed: Draws other images: it goes into the hash. None for the images of lowest SHA-256.
        of: The images of each class from which those to train on are taken and none is held out, such as the ones that
            a network knows from which the run starts; None for `per_class`.

    Raises:
        DataError: If the data is a stream, or a class has too few images.
    """
    train = _images(open_split, "train")
    ranked = _ranked(train, seed)
    smallest = min(map(len, ranked.values()), default=0)
    known = of or per_class
    if smallest < (needed := (known or 1) + held_out):
        raise DataError(f"a class has fewer than the {needed} training images that the subset needs")
    chosen, rest = {}, {}
    for label, entries in ranked.items():
        count = len(entries) - held_out if known is None else known
        chosen[label], rest[label] = entries[:count][:per_class], entries[count : count + held_out]
    partial = root.with_name(f"tmp-{root.name}")
    shutil.rmtree(partial, ignore_errors=True)
    _save(train, chosen, partial / "train")
    validation = train
    if not held_out:
        validation = _images(open_split, "validation")
        rest = _ranked(validation)
    _save(validation, rest, partial / "validation")
    partial.rename(root)


def _save(images: Any, chosen: dict[int, list[tuple[str, int]]], folder: Path) -> None:
    """Names follow the order of the hashes, so that a loader, too, meets the images in the same order everywhere."""
    for label, entries in chosen.items():
        place = folder / f"{label:04}"
        place.mkdir(parents=True)
        for rank, (_, i) in enumerate(entries):
            images[i][0].save(place / f"{rank:05}.png")


def make_noise(root: Path, size: int) -> None:
    """Random images of four classes, `size` x `size`, 8 each to train on and 2 each to validate."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 2)):
        for label in range(4):
            (root / split / str(label)).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / str(label) / f"{i}.png")
