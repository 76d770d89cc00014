#!/usr/bin/env python3
"""Set aside a part of a training split, to choose settings on it without a look at the reported split.

    python scripts/holdout.py DATA OUT --share 0.1
    python scripts/train.py --data-dir OUT --config scripts/recipes/resnet18_cifar10.yaml --model-kwargs alpha=1

OUT gets train/CLASS/ and validation/CLASS/ with links to the images of DATA's training split: the given share of each
class, drawn with the seed, is its validation split. DATA stays as it is, and is needed as long as OUT is used.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.cli import Parser, UserError, explained
from lab.training.data import DataError, split_folder
from lab.training.groups import SEED, x


def choose(names: Sequence[str], share: float, seed: str) -> set[str]:
    """The given share (0..1) of the names, rounded, drawn with the seed whatever their order."""
    return set(random.Random(seed).sample(sorted(names), round(share * len(names))))


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
    try:
        for folder in sorted(path for path in source.iterdir() if path.is_dir()):
            images = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
            held_out = choose(list(images), share, f"{seed}/{folder.name}")
            if not 0 < len(held_out) < len(images):
                raise DataError(
                    f"class {folder.name} has {len(images)} images: a share of {share:g} leaves a split empty"
                )
            for name, image in images.items():
                split = "validation" if name in held_out else "train"
                link = out / split / folder.name / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(image.resolve())
                counts[split] += 1
        if not counts["train"]:
            raise DataError(f"no class folders in {source}")
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
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
