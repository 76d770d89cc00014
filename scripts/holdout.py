#!/usr/bin/env python3
"""Set aside a part of a training split, to choose settings on it without a look at the reported split.

    python scripts/holdout.py DATA OUT --share 0.1
    python scripts/train.py --data-dir OUT --config scripts/recipes/resnet18_cifar10.yaml --model-kwargs alpha=1

OUT gets train/CLASS/ and validation/CLASS/ with links to the images of DATA's training split: the given share of each
class, drawn with the seed, is its validation split. DATA stays as it is, and is needed as long as OUT is used.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lab.cli import Parser, UserError, explained
from lab.training.data import DataError, split_folder, unreadable
from lab.training.groups import SEED, x
from timm.data import is_img_extension


def choose(names: Sequence[str], share: float, seed: str) -> set[str]:
    """The given share (0..1) of the names, rounded, drawn with the seed whatever their order."""
    return set(random.Random(seed).sample(sorted(names), round(share * len(names))))


def images_by_class(source: Path) -> dict[Path, list[Path]]:
    """The images that timm finds in a split, by the folder that is their class. Raises DataError if there is none."""
    found: dict[Path, list[Path]] = {}
    for folder, below, files in os.walk(source, onerror=unreadable, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]  # .ipynb_checkpoints
        images = [Path(folder, name) for name in files if is_img_extension(Path(name).suffix)]
        if images or not below:
            found[Path(folder)] = images
    found.pop(source, None)
    if not found:
        raise DataError(f"no class folders in {source}")
    return found


def link_splits(data: Path, out: Path, share: float, seed: int) -> dict[str, int]:
    """Write OUT; returns how many images each of its splits has. Raises UserError, and then there is no OUT."""
    source = split_folder(data, "train")
    if source == data:
        raise DataError(f"data folder {data} has no split 'train'")
    if out.exists():
        raise UserError(f"output folder {out} exists: choose another")
    if data.resolve() in out.resolve().parents:
        raise UserError(f"output folder {out} is inside of {data}, which stays as it is: choose another")
    counts = {"train": 0, "validation": 0}
    classes = images_by_class(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="tmp-") as temporary:
        partial = Path(temporary, out.name)
        for folder, images in classes.items():
            name = folder.relative_to(source)
            held_out = choose([image.name for image in images], share, f"{seed}/{name}")
            if not 0 < len(held_out) < len(images):
                raise DataError(f"class {name} has {len(images)} images: a share of {share:g} leaves a split empty")
            for image in images:
                split = "validation" if image.name in held_out else "train"
                link = partial / split / name / image.name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(image.resolve())
                counts[split] += 1
        os.replace(partial, out)
    return counts


def run(args: argparse.Namespace) -> None:
    """Write, and say what was written."""
    with explained(f"can't write {args.out}"):
        counts = link_splits(args.data, args.out, args.share, args.seed)
    print(f"{args.out}: {counts['train']} images to train on, {counts['validation']} held out")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 130 after Ctrl-C. A user's mistake exits with status 2 and one line on stderr, nothing written."""
    parser = Parser("holdout.py", description=__doc__)
    parser.add_argument("data", type=Path, metavar="DATA", help="data folder with a training split")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--share", **x(above=0, below=1, default=0.1), help="0..1 (default: %(default)s)")
    parser.add_argument("--seed", type=SEED, default=42, metavar="N", help="(default: %(default)s)")
    return parser.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
