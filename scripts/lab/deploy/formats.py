"""A trained network in the files that runtimes read: ONNX, OpenVINO, torch.export; whole or not at all."""

from __future__ import annotations

import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SUFFIXES = {"onnx": ".onnx", "onnx-int8": ".onnx", "openvino": ".xml", "torch-export": ".pt2"}


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file of the same name in a folder beside `path`; what stands in that folder at the end takes its place."""
    with tempfile.TemporaryDirectory(prefix="tmp-export-", dir=path.parent) as folder:
        yield Path(folder) / path.name
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):  # the named one last
            os.replace(file, path.with_name(file.name))


def _to_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
    """ONNX for batches of any size, with its batch norms folded into the convolutions before them."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    unfolded = path.with_name(f"unfolded-{path.name}")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # warns of decompositions for opsets that aren't asked for
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program: Any = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
        program.save(unfolded, external_data=False)
    quant_pre_process(str(unfolded), str(path), skip_symbolic_shape=True)  # onnxruntime's own optimisations
    unfolded.unlink()


def _to_openvino(model: nn.Module, images: Tensor, path: Path) -> None:
    import openvino

    onnx = path.with_suffix(".onnx")
    _to_onnx(model, images, onnx)
    openvino.save_model(openvino.convert_model(onnx), path, compress_to_fp16=False)
    onnx.unlink()


def _to_program(model: nn.Module, images: Tensor, path: Path) -> None:
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    content = io.BytesIO()  # since torch, writing to a full disk by itself, ends the process
    torch.export.save(program, content)
    path.write_bytes(content.getvalue())


_WRITERS: dict[str, Callable[[nn.Module, Tensor, Path], None]] = {
    "onnx": _to_onnx,
    "openvino": _to_openvino,
    "torch-export": _to_program,
}


def export(model: nn.Module, images: Tensor, path: Path, form: str) -> None:
    """Write a model to a file of one of the formats; `onnx-int8` is made from `onnx` by `lab.deploy.int8.quantize`.

    Args:
        model: on the CPU, in eval mode, without SUGAR in it (`to_relu`).
        images: (batch, channels, height, width) of at least 2; the file takes batches of any size of such images.
        path: ends in the format's suffix (`SUFFIXES`), in a folder that there is.
        form: onnx, openvino or torch-export.

    Raises:
        ImportError: without the packages of the extra `deploy`.
        RuntimeError, ValueError: for a network that can't be exported.
    """
    with written_whole(path) as partial:
        _WRITERS[form](model, images, partial)
