"""int8: ranges of activations measured on calibration images, by the method that keeps the network's outputs best.

ReLU has no upper bound, so a single large value can stretch a range that is taken from minimum and maximum. Which
method serves a network is measured, on images that no range was taken from.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from lab.deploy.formats import written_whole
from lab.deploy.runtimes import Images, open_file

# onnxruntime's calibration methods; a percentile leaves out the largest values.
METHODS: dict[str, tuple[str, dict[str, float]]] = {
    "minmax": ("MinMax", {}),
    "percentile-99.99": ("Percentile", {"CalibPercentile": 99.99}),
    "percentile-99.9": ("Percentile", {"CalibPercentile": 99.9}),
    "entropy": ("Entropy", {}),
}


def quantize_by(method: str, float_file: Path, path: Path, batches: Sequence[Images]) -> None:
    """Quantise an ONNX file by one of the METHODS: QDQ, int8, per channel. `batches`: what ranges are taken from."""
    from onnxruntime import quantization

    class Batches(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, Images] | None:
            images = next(self.left, None)
            return None if images is None else {"images": images}

    kind, options = METHODS[method]
    with redirect_stdout(io.StringIO()):  # it prints how many bins its histograms have
        quantization.quantize_static(
            str(float_file),
            str(path),
            Batches(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            calibrate_method=getattr(quantization.CalibrationMethod, kind),
            extra_options=options,
        )


def output_error(found: Images, expected: Images) -> float:
    """Squared distance of logits over the variance of the expected ones: 0 for equal ones, 1 for a constant."""
    spread: Any = np.square(expected - expected.mean(axis=0)).mean()
    if not spread:
        raise ValueError("its outputs are the same for all calibration images that judge a method: use others")
    return float(np.square(found - expected).mean() / spread)


def quantize(float_file: Path, path: Path, batches: Sequence[Images], methods: Sequence[str] = ()) -> dict[str, float]:
    """Quantise an ONNX file by each method, and keep the file whose outputs differ least.

    Args:
        float_file: what `lab.deploy.formats.export` wrote as `onnx`.
        path: where the int8 file goes.
        batches: at least two batches of calibration images. The first three quarters of them give the ranges, the
            others choose the method.
        methods: some of METHODS; all if empty.

    Returns:
        The error of each method's outputs (`output_error`), the chosen method first.
    """
    split = max(1, len(batches) * 3 // 4)
    judged = batches[split:]
    expected = np.concatenate([*map(open_file(float_file), judged)])
    errors: dict[str, float] = {}
    with written_whole(path) as partial, tempfile.TemporaryDirectory(dir=path.parent, prefix="tmp-int8-") as folder:
        files = {method: Path(folder) / f"{method}.onnx" for method in methods or METHODS}
        for method, file in files.items():
            quantize_by(method, float_file, file, batches[:split])
            errors[method] = output_error(np.concatenate([*map(open_file(file), judged)]), expected)
        errors = dict(sorted(errors.items(), key=lambda item: item[1]))
        files[next(iter(errors))].rename(partial)
    return errors
