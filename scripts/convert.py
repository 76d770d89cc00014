#!/usr/bin/env python3
"""Turn a trained network into a ReLU network: exchange its activations, then train with the original as the teacher.

    python scripts/convert.py --checkpoint output/train/RUN --epochs 10 --lr 0.01
    python scripts/convert.py --model mobilenetv3_small_100 --pretrained --data-dir DATA --epochs 10 --lr 0.01
    python scripts/convert.py --checkpoint output/train/RUN --distill 0 --blend-epochs 3 --blend-order output
    python scripts/convert.py --resume output/train/RUN

Options are those of scripts/train.py and a few more. A run is a folder of the same kind, which evaluate.py,
diagnose.py, export.py and publish.py take. Prints what the exchange of activations alone costs, what training won back,
and, with the packages of `pip install -e ".[deploy]"`, what int8 gives.
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.cli import Parser, UserError
from lab.training import options
from lab.training.conversion import Conversion, add_options, parse_conversion
from lab.training.run import run_command

EXPORT = Path(__file__).with_name("export.py")
INT8 = "model-int8.onnx"


def build_parser() -> Parser:
    """All options: those of scripts/train.py, and those of a conversion."""
    parser = options.build_parser(__doc__ or "", "convert.py")
    add_options(parser)
    return parser


class ConversionToInt8(Conversion):
    """A conversion whose network is quantised at the end, where that can be done."""

    def train(self) -> None:
        """Train, then export; an int8 file of weights before goes."""
        if self.folder and self.start_epoch < self.epochs:
            (self.folder.path / INT8).unlink(missing_ok=True)
        super().train()
        if self.folder and not self.args.no_int8:
            self.export(self.folder.path)

    def is_whole(self, folder: Path) -> bool:
        """Whether the int8 file is there, too, if it can be made."""
        wanted = not self.args.no_int8 and importlib.util.find_spec("onnxruntime") and self.has_images()
        return super().is_whole(folder) and (not wanted or (folder / INT8).exists())

    def has_images(self) -> bool:
        """Whether there is a folder of images to calibrate on, and a split to score on."""
        return bool(self.args.val_split) and (Path(self.args.data_dir or "") / "train").is_dir()

    def export(self, folder: Path) -> None:
        """Write model-int8.onnx, calibrated on training images; prints its top-1 and latency. Raises UserError."""
        data = Path(self.args.data_dir or "")
        command = ["--checkpoint", str(folder / "last.pth.tar"), "--format", "onnx-int8", "--data-dir", str(data)]
        command += ["--calibration", str(data), "--output", str(folder / INT8)]
        command += ["--workers", str(self.args.workers)]
        command += ["--original", self.args.checkpoint] if self.args.checkpoint else []
        if not self.has_images():
            print("no int8: it needs a --data-dir with train/ to calibrate on, and a --val-split to score on")
        elif not importlib.util.find_spec("onnxruntime"):
            print('int8 needs `pip install -e ".[deploy]"`, then:', "python scripts/export.py", shlex.join(command))
        elif subprocess.run([sys.executable, EXPORT, *command], check=False).returncode:
            again = f"python scripts/export.py {shlex.join(command)}"
            raise UserError(f"{folder} is converted, but not to int8, see above; try again with: {again}")


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns 0, 3 if the loss stops being finite, or 130 after Ctrl-C.

    A user's mistake exits with status 2 and one line on stderr.
    """
    words = sys.argv[1:] if argv is None else argv
    return run_command("convert.py", ConversionToInt8, lambda: parse_conversion(words, build_parser()))


if __name__ == "__main__":
    sys.exit(main())
