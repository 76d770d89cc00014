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

import torch
from lab.cli import Parser, UserError, import_modules
from lab.training.divergence import STATUS, Diverged
from lab.training.options import parse_args
from lab.training.run import Run
from lab.training.runs import measure


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns 0, 3 if the loss stops being finite, or 130 after Ctrl-C.

    A user's mistake exits with status 2 and one line on stderr.
    """
    run: Run | None = None
    try:
        args, resume = parse_args(sys.argv[1:] if argv is None else argv, __doc__ or "")
        import_modules(args.device_modules)
        run = Run(args, resume)
        run.train()
    except UserError as error:
        Parser("train.py").error(str(error))
    except Diverged as error:
        if run and run.folder:
            last = run.folder.path / "last.pth.tar"
            kept = f"; weights of the epoch before: {last}" if last.exists() else ""
            print(f"train.py: error: {error}{kept}", file=sys.stderr)
        return STATUS
    except KeyboardInterrupt:
        if run and run.folder:
            print(f"\ninterrupted; {run.folder.resume_command}", file=sys.stderr)
        return 130
    finally:
        if run:
            run.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if run.folder:
        saver, what = run.folder.saver, measure(args).removeprefix("eval_")
        print(f"done: {run.folder.path}; best {what} {saver.best_metric:.3f} in epoch {saver.best_epoch}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
