"""What a test needs of PyTorch beyond its floor, as markers: where it is missing, the test is skipped and says what."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from timm_sugar import _compiled, _torch
from timm_sugar.surrogate import get_surrogate

# Warnings of older releases of PyTorch about their own code.
WARNINGS = [
    "ignore:Skipping serialization of skipfiles_inline_module_allowlist:UserWarning",
    "ignore:Attempted to insert a get_attr Node with no underlying reference:UserWarning",
    "ignore:Node .* does not reference an nn.Module, nn.Parameter, or buffer:UserWarning",
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:.*isinstance.treespec, LeafSpec:FutureWarning",
    "ignore:remat_using_tags_for_fwd_loss_bwd_graph:UserWarning",
    "ignore:The given buffer is not writable:UserWarning",
    "ignore:.*Profiler clears events at the end of each cycle:UserWarning",
]


@functools.cache
def lacks_compiled_gradient() -> str:
    if _torch._compiler() is not None:
        return ""
    return "no torch._inductor.standalone_compile: gradients are computed by the formula"


@functools.cache
def lacks_compiled_numbers() -> str:
    if lacks_compiled_gradient():
        return lacks_compiled_gradient()
    derivative = get_surrogate("bsilu").derivative
    with torch.no_grad():
        graph = _compiled.trace_gradient(derivative, torch.float32, torch.device("cpu"), parameters=1)
        try:
            _torch.compile_graph(*graph)
        except KeyError:
            return "torch._inductor.standalone_compile takes no float32 number: each value has a kernel of its own"
    return ""


def lacks_sharing() -> str:
    return "" if _torch.can_share else "no torch._C._autograd.SavedTensor.data and .unpack_hook: memory is not shared"


@functools.cache
def lacks_forward_mode_in_inference_mode() -> str:
    with torch.inference_mode():
        x = torch.ones(1)
        tangent = torch.func.jvp(torch.sin, (x,), (x,))[1]
    return "" if tangent == x.cos() else "torch.func.jvp of torch.sin is 0 in inference mode"


NEEDS: dict[str, Callable[[], str]] = {
    "needs_compiled_gradient": lacks_compiled_gradient,
    "needs_compiled_numbers": lacks_compiled_numbers,
    "needs_sharing": lacks_sharing,
    "needs_forward_mode_in_inference_mode": lacks_forward_mode_in_inference_mode,
}


def pytest_configure(config: pytest.Config) -> None:
    for name in NEEDS:
        config.addinivalue_line("markers", f"{name}: skipped with a reason where this PyTorch lacks it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for line in WARNINGS:
            item.add_marker(pytest.mark.filterwarnings(line))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, lacks in NEEDS.items():
        if item.get_closest_marker(name) and (reason := lacks()):
            pytest.skip(f"this PyTorch has {reason}" if reason.startswith("no ") else reason)
