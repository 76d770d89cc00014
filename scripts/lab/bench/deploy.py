"""Networks as they are deployed: own activations against ReLU, in the runtimes and number formats that serve them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import timm
import torch
from timm.data import resolve_model_data_config

from lab.bench.variants import OWN, make_model
from lab.deploy.formats import export
from lab.deploy.int8 import quantize_by
from lab.deploy.runtimes import Images
from timm_sugar.surgery import list_activations

RUNTIMES = {"onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__.split("-")[0]}
VARIANTS = (OWN, "relu")
DTYPES = ("float32", "int8")


def own_activations(base: str) -> str:
    """The types of a network's own hidden activations, e.g. "SiLU"."""
    with torch.device("meta"):
        return ", ".join(sorted({*list_activations(timm.create_model(base)).values()}))


def pixels_of(base: str) -> int:
    """The side of the images that a network is made for."""
    with torch.device("meta"):
        return int(resolve_model_data_config(timm.create_model(base))["input_size"][-1])


def deployed_files(base: str, folder: Path) -> dict[str, dict[str, Path]]:
    """A network of random weights in ONNX files: by number format, then by variant.

    The ranges of int8 are those of two random images, which is enough to measure time. Raises what an export may raise.
    """
    pixels = pixels_of(base)
    found: dict[str, dict[str, Path]] = {dtype: {} for dtype in DTYPES}
    for variant in VARIANTS:
        for dtype in DTYPES:
            found[dtype][variant] = folder / f"{variant}-{dtype}.onnx"
        images = torch.randn(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
        export(make_model(base, variant, {}).eval(), images, found["float32"][variant], "onnx")
        quantize_by("minmax", found["float32"][variant], found["int8"][variant], [images.numpy()])
    return found


def random_images(count: int, pixels: int) -> Images:
    """A batch of images (count, 3, pixels, pixels)."""
    return np.random.default_rng(0).normal(size=(count, 3, pixels, pixels)).astype(np.float32)
