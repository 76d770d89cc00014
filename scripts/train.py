#!/usr/bin/env python3
"""Train any timm model, SUGAR or not, on images; options as in timm's own train script, so one YAML drives both.

    python scripts/train.py --data-dir DATA --model resnet18_sugar --num-classes 10 --epochs 20
    python scripts/train.py --config scripts/recipes/resnet18_cifar10.yaml --data-dir DATA
    torchrun --nproc_per_node=2 scripts/train.py --data-dir DATA --model convnext_tiny_sugar
    python scripts/train.py --resume output/train/RUN

DATA holds train/CLASS/*.png and validation/CLASS/*.png, or use --dataset for timm's other data sets. A run is a folder:
args.yaml, train.log, summary.csv, curves.png, last.pth.tar, model_best.pth.tar and the best checkpoint-N.pth.tar.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lab.training.options import build_parser, parse_args
from lab.training.run import Run, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns 0, 3 if the loss stops being finite, or 130 after Ctrl-C.

    A user's mistake exits with status 2 and one line on stderr.
    """
    words = sys.argv[1:] if argv is None else argv
    return run_command("train.py", Run, lambda: parse_args(words, build_parser(__doc__ or "")))


if __name__ == "__main__":
    sys.exit(main())
