"""The code that inductor writes for GPUs, on machines that have none: one pass over memory, for every surrogate.

The compiler's own source is read, turned into machine code, and run in Triton's interpreter, in processes of their own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fgi import SETTINGS

from timm_sugar import _torch, get_surrogate

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not _torch.compiles(), reason="inductor compiles such kernels from torch 2.8 on"),
    pytest.mark.slow,
]

HERE = Path(__file__).parent
HALF = ("bfloat16", "float16")
TYPES = {"cuda": (*HALF, "float32", "float64"), "mps": (*HALF, "float32")}
KINDS = [(kind, dtype) for kind, dtypes in TYPES.items() for dtype in dtypes]
CODE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
METAL = {"bfloat16": "bfloat", "float16": "half", "float32": "float"}


def run(program: str, *arguments: object, **environment: str) -> str:
    command = [sys.executable, str(HERE / program), *map(str, arguments)]
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what inductor writes: KIND/SURROGATE-DTYPE.py."""
    root = tmp_path_factory.mktemp("sources")
    for kind, dtypes in TYPES.items():
        (root / kind).mkdir()
        run("kernel_source.py", root / kind, kind, 16, ",".join(dtypes), TORCHINDUCTOR_CACHE_DIR=str(root / "cache"))
    return root


def launches(program: str) -> list[str]:
    """The arguments of each kernel that the program of one call launches."""
    call = program[program.index("class Runner") : program.index("def get_args")]
    assert "extern_kernels" not in call
    return re.findall(r"^\s+(?:triton_\w+\.run|generated_kernel_\d+|aten\.\S+)\((.*)\)$", call, re.M)


@pytest.mark.parametrize("surrogate", SETTINGS)
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_gradient_is_one_kernel_of_two_loads_and_one_store(
    surrogate: str, kind: str, dtype: str, sources: Path
) -> None:
    program = (sources / kind / f"{surrogate}-{dtype}.py").read_text()
    parameters = len(get_surrogate(surrogate).parameters)
    (arguments,) = launches(program)
    if kind == "cuda":
        kernel = program[program.rindex("@triton.jit") : program.rindex("async_compile.wait")]
        assert (kernel.count("tl.load("), kernel.count("tl.store(")) == (2, 1)
        assert arguments.count(".item()") == parameters  # passed by value, without waiting for the GPU
        signature = program[program.rindex("'signature'") : program.rindex("'device':")]
        assert signature.count(f"'*{CODE[dtype]}'") == 3
        scalar = "fp64" if dtype == "float64" else "fp32"
        assert signature.count(f"'{scalar}'") == parameters
        assert "float64" not in kernel or dtype == "float64"  # which some GPUs lack
    else:
        kernel = program[program.index("kernel void") : program.rindex("async_compile.wait")]
        assert len(re.findall(r"= (?:static_cast<\w+>\()?in_ptr\d\[x0\]", kernel)) == 2
        assert len(re.findall(r"out_ptr\d\[x0\] =", kernel)) == 1
        assert len(re.findall(rf"constant {METAL[dtype]}\* in_ptr[01],", kernel)) == 2
        assert len(re.findall(r"constant float\* in_ptr[2-9],", kernel)) == parameters
        assert len(re.findall(r"= in_ptr[2-9]\[0\]", kernel)) == parameters
        assert "double" not in kernel


@pytest.mark.parametrize("width", [16, 1])
def test_machine_code_for_cuda_moves_128_bits_at_a_time_in_rows_of_16(width: int, sources: Path) -> None:
    folder = sources / "cuda"
    if width == 1:  # sizes that are no multiple of 16, and proof that this test can fail
        folder = sources / "width1"
        folder.mkdir()
        run("kernel_source.py", folder, "cuda", 1, "bfloat16", TORCHINDUCTOR_CACHE_DIR=str(sources / "cache"))
    paths = [path for path in folder.iterdir() if "-" in path.name]
    found = json.loads(run("kernel_run.py", "ptx", *paths, TRITON_CACHE_DIR=str(sources / "triton")))
    assert len(found) == len(SETTINGS) * (4 if width == 16 else 1)
    expected = [128, 128] if width == 16 else [16, 16]
    assert {name: bits for name, bits in found.items() if bits != expected} == {}


def test_inductors_source_computes_the_formula_in_tritons_interpreter(sources: Path) -> None:
    # Not in float64: the interpreter takes a number for a float32.
    paths = [path for path in (sources / "cuda").glob("*-*.py") if "float64" not in path.name]
    found = json.loads(run("kernel_run.py", "interpret", *paths, TRITON_INTERPRET="1"))
    assert len(found) == 3 * len(SETTINGS)
    for name, units in found.items():
        assert units <= (1 if name.endswith(HALF) else 8), (name, units)
