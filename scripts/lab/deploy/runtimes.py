"""Runtimes that run exported files, each as a function from images to logits (NumPy, float32)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

Images = np.ndarray[Any, np.dtype[np.float32]]
Network = Callable[[Images], Images]


def _open_onnxruntime(path: Path, threads: int) -> Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _open_openvino(path: Path, threads: int) -> Network:
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = _openvino_core().compile_model(str(path), "CPU", settings)
    return lambda images: np.array(compiled(images)[0])


@cache
def _openvino_core() -> Any:
    """One for all networks: a process with several crashed when it ended (OpenVINO 2026.4.1)."""
    import openvino

    return openvino.Core()


def _open_program(path: Path, threads: int) -> Network:
    module = torch.export.load(path).module()

    def run(images: Images) -> Images:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return module(torch.from_numpy(images)).numpy()

    return run


_RUNTIMES = {"onnxruntime": _open_onnxruntime, "openvino": _open_openvino, "torch": _open_program}
RUNTIME_OF = {".onnx": "onnxruntime", ".xml": "openvino", ".pt2": "torch"}


def open_file(path: Path, threads: int = 1, runtime: str | None = None) -> Network:
    """An exported file as a function of images (batch, channels, height, width), which returns logits (batch, classes).

    `runtime`: onnxruntime, openvino (which reads .onnx, too) or torch; by the file's suffix if None.
    """
    return _RUNTIMES[runtime or RUNTIME_OF[path.suffix]](path, threads)
