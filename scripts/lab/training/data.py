"""timm's data sets, opened so that bad data is named instead of trained on."""

from __future__ import annotations

import logging
import os
import random
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image
from timm.data import ImageDataset, create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_wds import ReaderWds
from timm.utils import natural_key
from torch.utils.data import Dataset, IterableDataset

from lab.cli import UserError, one_line

_logger = logging.getLogger(__name__)
# Folder names that timm takes for each other when it looks for a split.
_SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"), ("test",))
_TRAIN_OR_TEST = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")  # of torch/
_FOLDERS = ("torch/image_folder", "torch/folder")
_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")  # timm takes any other name for a folder


class DataError(UserError):
    """Data that can't be used as it is; the message is one line that says what is wrong and what to do."""


def open_dataset(name: str, root: str | None, split: str, *, skip_broken: bool = False, **options: Any) -> Dataset[Any]:
    """`timm.data.create_dataset(name, root, split, **options)`, checked.

    Raises DataError for a name that timm doesn't know, for a folder that is missing, empty, has no such split or no
    class folders, or two whose names timm can't order, for a shard that is missing, and, when the image is read, for
    one that can't be decoded; with `skip_broken` the next readable image takes its place, as in timm.
    """
    prefix, slash, _ = name.partition("/")
    if name and not (slash and prefix.lower() in _PREFIXES):
        kinds = ", ".join(f"{kind}/..." for kind in _PREFIXES)
        raise DataError(f"--dataset {name}: expected {kinds}, or nothing for the folder of --data-dir")
    if name.lower() in _FOLDERS:
        raise DataError(f"--dataset {name}: leave it out, --data-dir alone is a folder of images")
    _check_split(name, split)
    if not name:
        _check_folder(root, split)
        if options.get("num_samples"):
            raise DataError("the number of samples is that of a stream (wds/, hfids/); a folder is used whole")
    try:
        dataset = create_dataset(name, root=root, split=split, **options)
    except Exception as error:  # as many kinds as there are libraries of data sets
        raise DataError(f"can't open data set {name or root} ({split}): {' '.join(str(error).split())}") from error
    classes, given = class_to_idx(dataset) or {}, options.get("class_map")
    if given and ("" in classes or {*classes.values()} != {*range(max(classes.values()) + 1)}):
        raise DataError(f"--class-map {given}: a line is empty, or a class stands there twice")
    if "" in classes:
        raise DataError(f"images of split {split} lie directly in {root}: put each class into a folder of its own")
    if not name and not given:
        _check_order(list(classes))
    _check_shards(dataset)
    return _CheckedImages(dataset, skip_broken) if isinstance(dataset, ImageDataset) else dataset


def class_to_idx(dataset: Any) -> dict[str, int] | None:
    """Class names and their indices, None if the data set doesn't tell."""
    return getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)


def class_names(dataset: Any) -> list[str]:
    """The names of the classes in the order of their indices; none if the data set doesn't tell."""
    classes = class_to_idx(dataset) or {}
    return [str(name) for name, _ in sorted(classes.items(), key=lambda item: item[1])]


def check_same_classes(known: list[str] | None, dataset: Any, what: str, advice: str) -> None:
    """Raises DataError if `what` was trained on other classes than the data set's, or in another order."""
    names = class_names(dataset)
    if known and names and known != names:
        differ = [f"{old}, not {new}" for old, new in zip(known, names, strict=False) if old != new]
        first = differ[0] if differ else f"{len(known)}, not {len(names)}"
        raise DataError(f"{what} was trained on other classes ({first}): {advice}")


def check_classes(train: Any, validation: Any, num_classes: int) -> None:
    """Raises DataError if two splits don't have the same classes or a model has too few outputs for them.

    Where the data doesn't tell its classes, so does the label of an example, when it is read.
    """
    classes, other = class_to_idx(train), class_to_idx(validation)
    for names, rest, split in ((classes, other, "validation"), (other, classes, "training")):
        missing = sorted(map(str, set(names or ()) - set(rest or ()))) if names and rest else []
        if missing:
            listed = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
            raise DataError(f"{len(missing)} of {len(names or ())} classes are missing in the {split} split: {listed}")
    for dataset in (train, validation):
        _check_class_folders(dataset)
        if not class_to_idx(dataset) and getattr(dataset, "target_transform", ...) is None:
            dataset.target_transform = _CheckedLabel(num_classes)
    count = max((classes or other or {"": 0}).values()) + 1
    if count > num_classes:
        raise DataError(f"the data has {count} classes but the model has {num_classes} outputs: --num-classes {count}")


def check_apart(train: Any, validation: Any) -> None:
    """Raises DataError if both splits are the same folder: what was trained on would be validated."""
    readers = [getattr(dataset, "reader", None) for dataset in (train, validation)]
    folders = [Path(reader.root) for reader in readers if isinstance(reader, ReaderImageFolder)]
    if len(folders) == 2 and folders[0].samefile(folders[1]):
        raise DataError(
            f"{folders[0]} would be both training and validation split: divide it with scripts/holdout.py, "
            "or train without validation (--val-split=)"
        )


def split_folder(root: Path, split: str) -> Path:
    """The folder below `root` that timm reads for a split; `root` itself if it isn't divided into splits."""
    split = split.split("[")[0]
    for name in (split, *next((group for group in _SYNONYMS if split in group), ())):
        if (root / name).exists():
            return root / name
    return root


def _check_split(name: str, split: str) -> None:
    """Raises DataError for a split of which timm would take all, or the test images, without a word."""
    kind, _, which = name.lower().partition("/")
    if "[" in split and kind in ("", "torch"):
        raise DataError(f"split {split}: of {name or 'a folder'} no part can be taken")
    known = [word for group in _SYNONYMS for word in group]
    if kind == "torch" and which in _TRAIN_OR_TEST and split not in known:
        raise DataError(f"data set {name} has no split {split!r} (it has: train, test)")


def _check_folder(root: str | None, split: str) -> None:
    if not root:
        raise DataError("no data: name a folder with --data-dir or a data set with --dataset")
    path = Path(root)
    if not path.exists():
        raise DataError(f"data folder {root} does not exist")
    if path.is_dir() and split_folder(path, split) == path:
        others = sorted(p.name for p in path.iterdir() if any(p.name in group for group in _SYNONYMS))
        if others:
            raise DataError(f"data folder {root} has no split {split!r} (it has: {', '.join(others)})")
    if path.is_dir() and not any(split_folder(path, split).rglob("*.*")):
        raise DataError(f"data folder {split_folder(path, split)} is empty")
    _check_links(split_folder(path, split))


def _check_order(classes: list[str]) -> None:
    """Raises DataError for classes that timm orders by chance, which is another one in each process."""
    known: dict[tuple[Any, ...], str] = {}
    for name in sorted(classes):
        other = known.setdefault(tuple(natural_key(name)), name)
        if other != name:
            raise DataError(
                f"classes {other} and {name} differ in nothing by which timm orders them (capitals, leading zeros): "
                "rename one, or give all in order with --class-map FILE"
            )


def _check_shards(dataset: Any) -> None:
    """Raises DataError for a file of a WebDataset that isn't there: timm would go on without it."""
    reader: Any = getattr(dataset, "reader", None)
    for shard in reader.split_info.filenames if isinstance(reader, ReaderWds) else ():
        path = os.path.join(reader.root, shard)
        if "://" not in path and not path.startswith("pipe:") and not os.path.isfile(path):
            raise DataError(f"there is no {path}: name files that are there, e.g. 'train-{{0000..0003}}.tar'")


def unreadable(error: OSError) -> NoReturn:
    """What a walk through folders does about one that can't be read: timm would go on without its images."""
    raise DataError(f"can't read folder {error.filename}: {error.strerror}") from error


def _check_links(folder: Path) -> None:
    """Raises DataError for a link that leads back to where it is: timm would follow it round and round."""
    known: dict[Path, tuple[int, int]] = {}
    for name, _, _ in os.walk(folder, onerror=unreadable, followlinks=True):
        path = Path(name)
        info = path.stat()
        known[path] = info.st_dev, info.st_ino
        if any(known.get(parent) == known[path] for parent in path.parents):
            raise DataError(f"{path} leads back to a folder that it is in: remove this link")


def _check_class_folders(dataset: Any) -> None:
    """Raises DataError for a class folder without images: timm would count the classes as if it weren't there."""
    reader = getattr(dataset, "reader", None)
    if not isinstance(reader, ReaderImageFolder):
        return
    for folder, below, _ in os.walk(reader.root, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        if not below and folder != str(reader.root) and Path(folder).name not in reader.class_to_idx:
            raise DataError(
                f"class folder {folder} has no images (.png, .jpg, .jpeg), or isn't in --class-map: add it, or remove "
                "it to train without the class"
            )


def read_image(stream: Any, mode: str) -> Image.Image:
    """The image as `mode` (RGB or L); of 16 bits a channel the upper 8, as PIL itself reads 16-bit colour.

    Raises ValueError for values whose range is unknown: PIL would clip them to 8 bits, most often to white.
    """
    image = Image.open(stream)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(mode)
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not 0 <= low <= high <= 255:
            raise ValueError(f"values from {low:g} to {high:g}: convert it to 8 or 16 bits a channel")
    return image.convert(mode)


class RandomPart(Dataset[Any]):
    """`count` examples of a data set (or all, if it has fewer), drawn with the seed, in their order.

    A loader may set `transform`, which is that of the data set. Raises DataError for a data set that is a stream.
    """

    def __init__(self, dataset: Any, count: int, seed: int = 0) -> None:
        if isinstance(dataset, IterableDataset):
            raise DataError("this data set is a stream, of which no random part can be taken: use all of it")
        self.dataset = dataset
        self.indices = sorted(random.Random(seed).sample(range(len(dataset)), min(count, len(dataset))))

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]


class _CheckedLabel:
    """Returns a label; raises DataError for one that a model has no output for."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(self, label: Any) -> Any:
        if not 0 <= int(label) < self.num_classes:
            raise DataError(f"there is a label {int(label)}, but the model has outputs 0 to {self.num_classes - 1}")
        return label


class _CheckedImages(Dataset[Any]):
    """timm's ImageDataset, except that an unreadable image doesn't become its neighbour in silence."""

    def __init__(self, dataset: ImageDataset, skip_broken: bool) -> None:
        self.reader, self.mode, self.skip_broken = dataset.reader, dataset.input_img_mode, skip_broken
        self.transform = dataset.transform  # set by create_loader
        self.target_transform = dataset.target_transform

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        for shift in range(len(self)):
            i = (index + shift) % len(self)
            try:
                stream, target, *_ = self.reader[i]
                with closing(stream):
                    image = read_image(stream, self.mode)
            except Exception as error:  # PIL's readers raise nearly anything for a broken file
                name = one_line(self.reader.filename(i, absolute=True))
                if not self.skip_broken:
                    raise DataError(f"can't read image {name} ({error}); remove it or --skip-broken-images") from error
                _logger.warning("skipped image %s (%s)", name, error)
            else:
                return self._prepare(image, i), self.target_transform(target) if self.target_transform else target
        raise DataError("no image of the data set can be read")

    def _prepare(self, image: Image.Image, index: int) -> Any:
        try:
            return self.transform(image)
        except Exception as error:  # as many kinds as there are augmentations
            name = one_line(self.reader.filename(index, absolute=True))
            raise DataError(f"can't prepare image {name}: {' '.join(str(error).split())}") from error
