"""What inductor would run on a GPU, made on a machine without one: the real compiler, followed up to its source.

To run in a process of its own, since torch remembers which devices are there:

    python kernel_source.py FOLDER cuda 16 bfloat16,float32

writes FOLDER/SURROGATE-DTYPE.py for every surrogate, in rows of 16 elements. Nothing of the compiler is
replaced but what it asks of a device.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.config
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering

from timm_sugar import _torch, get_surrogate, list_surrogates
from timm_sugar._compiled import trace_gradient

A100 = SimpleNamespace(
    name="A100", major=8, minor=0, multi_processor_count=108, regs_per_multiprocessor=65536, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=2**36, gcnArchName="",
)  # fmt: skip


class Source(BaseException):
    """What ends a compilation once its source is there. (Inductor wraps an Exception.)"""


def stop_at(source: str) -> None:
    """End the compilation."""
    raise Source(source)


def pretend_cuda(stack: ExitStack) -> None:
    """Answer what inductor asks of a GPU before it has written its source."""
    import triton
    from triton.backends.compiler import GPUTarget

    answers = {
        "is_available": True, "_get_device_properties": A100, "get_device_properties": A100, "current_device": 0,
        "get_device_capability": (8, 0), "device_count": 1, "_lazy_init": None, "_exchange_device": 0,
        "_maybe_exchange_device": 0, "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
    }  # fmt: skip
    for name, answer in answers.items():
        stack.enter_context(mock.patch.object(torch.cuda, name, mock.Mock(return_value=answer), create=True))
    driver = mock.Mock()
    driver.get_current_target.return_value = GPUTarget("cuda", 80, 32)
    driver.get_active_torch_device.return_value = torch.device("cuda", 0)
    triton.runtime.driver.set_active(driver)
    stack.enter_context(mock.patch.object(PythonWrapperCodegen, "generate_and_run_autotune_block"))


def source(surrogate: str, kind: str, dtype: torch.dtype, width: int) -> str:
    """The program that inductor writes for the gradient of a surrogate on a device."""
    with ExitStack() as stack:
        if kind == "cuda":
            pretend_cuda(stack)
        stack.enter_context(mock.patch.object(GraphLowering, "save_output_code", stop_at))
        stack.enter_context(mock.patch.object(joint_graph, "lazy_init"))  # patterns of attention
        stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        chosen = get_surrogate(surrogate)
        with torch.no_grad():
            graph, examples = trace_gradient(
                chosen.derivative, dtype, torch.device(kind, 0), width, len(chosen.parameters)
            )
            try:
                _torch.compile_graph(graph, examples)
            except Source as found:
                return str(found)
    raise RuntimeError("the compiler wrote no source")


if __name__ == "__main__":
    folder, kind, width, dtypes = sys.argv[1:]
    for surrogate in list_surrogates():
        for dtype in dtypes.split(","):
            text = source(surrogate, kind, getattr(torch, dtype), int(width))
            Path(folder, f"{surrogate}-{dtype}.py").write_text(text)
