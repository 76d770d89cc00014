"""The compiled gradient of large tensors: the formula's, wherever a compiler is; the plain one's where none is."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fgi import SETTINGS, slope

from timm_sugar import _compiled as compiled
from timm_sugar import sugar

pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler: install g++"
)
ROUNDING = {  # half a unit in the last place, and the last bits of float32
    torch.float64: {"rtol": 1e-12, "atol": 1e-15},
    torch.float32: {"rtol": 1e-5, "atol": 5e-7},
    torch.bfloat16: {"rtol": 0.51 * 2**-7, "atol": 2e-7},
    torch.float16: {"rtol": 0.51 * 2**-10, "atol": 2e-7},
}
EXTREMES = [0.0, -0.0, 1e-8, -1e-8, 88.0, -88.0, 1e4, -1e4, 6e4, -6e4]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "slice": lambda x: x.view(-1)[1:4002],
}


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes every tensor of more than 7 elements a large one; the sizes that compiled code was called with."""
    sizes: list[int] = []
    compiled_gradient = compiled.compiled_gradient

    def count(*key):  # type: ignore[no-untyped-def]
        kernel = compiled_gradient(*key)
        assert kernel is not None

        def call(direction, x):  # type: ignore[no-untyped-def]
            sizes.append(x.numel())
            result = kernel(direction, x)
            assert (result.shape, result.stride()) == (x.shape, x.stride())
            return result

        return call

    monkeypatch.setattr(compiled, "_CHUNK", 7)
    monkeypatch.setattr(compiled, "_WORTHWHILE", 7)
    monkeypatch.setattr(compiled, "compiled_gradient", count)
    return sizes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", SETTINGS)
def test_compiled_gradient_is_the_formula(name: str, dtype: torch.dtype, layout: str, calls: list[int]) -> None:
    base = 3 * torch.randn(3, 8, 20, 10, generator=torch.Generator().manual_seed(0))
    base.view(-1)[: 11 * len(EXTREMES) : 11] = torch.tensor(EXTREMES)
    base = base.to(dtype).requires_grad_()
    x = LAYOUTS[layout](base)
    y = sugar(x, name)
    upstream = torch.empty_like(y).copy_(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    (grad,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(grad.double(), upstream.double() * slope(x, name), **ROUNDING[dtype])
    assert grad.stride() == y.stride()
    assert calls == [x.numel()]


@pytest.mark.parametrize("name", SETTINGS)
def test_infinities_and_nan_are_those_of_the_plain_formula(
    name: str, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38] * 20, requires_grad=True)
    (fast,) = torch.autograd.grad(sugar(x, name), x, torch.ones_like(x))
    assert calls == [100]
    monkeypatch.setattr(compiled, "_CHUNK", 10**6)
    (plain,) = torch.autograd.grad(sugar(x, name), x, torch.ones_like(x))
    torch.testing.assert_close(fast, plain, equal_nan=True)


def test_every_setting_has_its_own_kernel_and_every_size_the_same(calls: list[int]) -> None:
    for alpha in (1.67, 0.5, 3.0):
        for size in (8, 100, 4097):
            x = torch.randn(size, requires_grad=True)
            (grad,) = torch.autograd.grad(sugar(x, alpha=alpha), x, torch.ones_like(x))
            torch.testing.assert_close(grad.double(), slope(x, "bsilu", alpha=alpha), **ROUNDING[torch.float32])
    before = len(compiled._gradients)
    for size in (9, 5000):
        x = torch.randn(size, requires_grad=True)
        torch.autograd.grad(sugar(x, alpha=0.5), x, torch.ones_like(x))
    assert len(compiled._gradients) == before
    assert len(calls) == 11


def test_a_large_activation_brings_the_kernel_for_smaller_ones_before_the_backward_pass(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So all steps of a training are alike, also the first one, whose backward pass begins with the small ones."""
    alpha = 1.2345  # no other test has it
    monkeypatch.setattr(compiled, "_CHUNK", 99)

    def run(sizes: list[int]) -> list[int]:
        calls.clear()
        xs = [torch.randn(size, requires_grad=True) for size in sizes]
        outputs = [sugar(x * 1, alpha=alpha) for x in xs]
        assert calls == []
        for x, y in reversed(list(zip(xs, outputs, strict=True))):
            (grad,) = torch.autograd.grad(y, x, torch.ones_like(x))
            torch.testing.assert_close(grad.double(), slope(x, "bsilu", alpha=alpha), **ROUNDING[torch.float32])
        return calls

    assert run([99, 50, 8]) == []
    assert not compiled.is_compiled("bsilu", (alpha,), torch.float32)
    assert run([100, 50, 8, 7]) == [8, 50, 100]
    assert run([50]) == [50]


def test_second_derivatives_are_not_compiled(calls: list[int]) -> None:
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(sugar, x)
    assert calls == []


PROGRAM = """
import os, sys, torch
from fgi import slope
from timm_sugar import sugar
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["CACHE"]  # now, since torchvision's import asks for the folder, too
x = torch.linspace(-9, 9, 2**18, requires_grad=True)
for _ in range(2):
    (grad,) = torch.autograd.grad(sugar(x), x, torch.ones_like(x))
    torch.testing.assert_close(grad.double(), slope(x, "bsilu"), rtol=1e-5, atol=5e-7)
"""


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CXX": "no-such-compiler"}, ["compiling", "not compiled"]),
        ({"CXX": "false"}, ["compiling", "not compiled"]),
        ({"CACHE": "/dev/null/cache"}, ["compiling", "not compiled"]),
        ({"TORCH_COMPILE_DISABLE": "1"}, []),
    ],
    ids=["no_compiler", "broken_compiler", "cache_cannot_be_written", "switched_off"],
)
def test_without_a_compiler_the_gradient_is_the_same(
    environment: dict[str, str], said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if "SUGAR" in line]
    assert len(lines) == len(said), done.stderr
    assert all(word in line for word, line in zip(said, lines, strict=True)), done.stderr


def test_next_process_finds_the_kernel_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    kernels = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
        assert "Traceback" not in done.stderr  # torch logs one where it can't make a key for its cache
        kernels.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.so")})
    assert kernels[0]
    assert kernels[0] == kernels[1]
