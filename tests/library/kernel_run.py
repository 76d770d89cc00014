"""Two uses of inductor's Triton source on a machine without a GPU, in a process of its own:

    python kernel_run.py ptx FOLDER/SURROGATE-DTYPE.py ...

prints, for each, the bits of the widest load and store of the machine code, and of the narrowest, as JSON;

    TRITON_INTERPRET=1 python kernel_run.py interpret FOLDER/SURROGATE-DTYPE.py ...

runs each in Triton's interpreter, and prints the largest difference from the formula, in units of the last place.
"""

from __future__ import annotations

import json
import math
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_sugar import get_surrogate
from timm_sugar.surrogate import surrogate_derivative

HEADER = """
import triton
import triton.language as tl
from kernel_run import Pointwise as triton_heuristics
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math
from torch._inductor.runtime.hints import AutotuneHint, DeviceProperties, ReductionHint, TileHint
"""


class Pointwise:
    """A place in which inductor puts what it knows of a kernel, instead of its launcher."""

    @staticmethod
    def pointwise(**settings: Any) -> Any:
        def keep(function: Any) -> Any:
            function.settings = settings
            return function

        return keep


class Libdevice:
    """CUDA's library of functions, by PyTorch's: Triton's interpreter has none."""

    def __getattr__(self, name: str) -> Any:
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        functions = {"mul_rn": torch.mul, "isnan": torch.isnan, "pow": torch.pow, "rsqrt": torch.rsqrt}

        def apply(*arguments: Any) -> Any:
            function = functions.get(name) or getattr(torch, name)
            result = function(*(torch.from_numpy(argument.handle.data) for argument in arguments)).numpy()
            kind = tl.int1 if result.dtype == bool else arguments[0].dtype
            block = tl.block_type(kind, list(result.shape)) if result.shape else kind
            return tl.tensor(TensorHandle(result, kind), block)

        return apply


def load(path: Path) -> Any:
    """The kernel of a program that inductor wrote."""
    name, text = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", path.read_text(), re.S)[-1]
    file = path.with_name(f"{path.stem.replace('-', '_')}_kernel.py")
    file.write_text(HEADER + text[text.index("@triton_heuristics") :])
    spec = spec_from_file_location(file.stem, file)
    module = module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return getattr(module, name)


def widths(path: Path) -> list[int]:
    """Bits of the narrowest and of the widest access to memory in the code for an A100."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = load(path)
    meta = kernel.settings["triton_meta"]
    source = ASTSource(kernel, meta["signature"], {"XBLOCK": 1024}, meta["configs"][0])
    ptx = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4}).asm["ptx"]
    found = re.findall(r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)\s", ptx)
    bits = [int(times or 1) * int(size) for times, size in found]
    return [min(bits), max(bits)]


def difference(path: Path) -> float:
    """How far a kernel's results are from the formula, in units of the last place of 1."""
    surrogate, dtype = path.stem.split("-")
    kernel, kind = load(path), getattr(torch, dtype)
    kernel.fn.__globals__["libdevice"] = Libdevice()
    chosen = get_surrogate(surrogate)
    points = [*torch.linspace(-12, 12, 1019).tolist(), math.inf, -math.inf, math.nan, 6e4, -6e4]
    x, result = torch.tensor(points, dtype=kind), torch.empty(1024, dtype=kind)
    most = 0.0
    for factor in (1.0, 0.3):
        values = [factor * value for value in chosen.values]
        direction = torch.full_like(x, 0.5)
        kernel[(2,)](direction, x, *values, result, 1024, XBLOCK=512)
        expected: Tensor = (direction * surrogate_derivative(x, surrogate, values)).to(kind)
        assert torch.equal(result.isnan(), expected.isnan()), path
        most = max(most, float((result - expected).nan_to_num().abs().max()) / torch.finfo(kind).eps)
    return most


if __name__ == "__main__":
    use, *paths = sys.argv[1:]
    print(json.dumps({Path(path).stem: {"ptx": widths, "interpret": difference}[use](Path(path)) for path in paths}))
