"""What has to hold on a device: gradients against the formula in float64 on the CPU, in every way of running them."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from timm_sugar import SUGAR, get_surrogate, list_surrogates, set_surrogate, sugar

Activation = Callable[[Tensor], Tensor]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "odd size": lambda x: x.flatten()[: x.numel() - 3].clone(),
    "slice of a buffer": lambda x: x.flatten()[1:-6],  # not aligned
    "with gaps": lambda x: x[..., ::2],
}
EXTREMES = [math.inf, -math.inf, math.nan, 0.0, -0.0, 6e4, -6e4, 1e-7]


class Skipped(Exception):
    """A check that this machine can't run; the message says why."""


def dtypes_of(device: torch.device) -> list[torch.dtype]:
    """The floating-point types that a device computes with."""
    types = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return [dtype for dtype in types if _computes(dtype, device)]


def _computes(dtype: torch.dtype, device: torch.device) -> bool:
    try:
        torch.ones(2, dtype=dtype, device=device).mul(2).sum().item()
    except (RuntimeError, TypeError):  # MPS has no float64
        return False
    return True


def assert_rounded(found: Tensor, expected: Tensor, what: str) -> None:
    """Compare a result with the exact one: it may be some units in the last place of its type away."""
    eps = torch.finfo(found.dtype).eps
    half = found.dtype in (torch.bfloat16, torch.float16)  # computed in float32, rounded once
    rtol, atol = (eps, 1e-5) if half else (16 * eps, 64 * eps)
    torch.testing.assert_close(
        found.cpu().double(), expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def slope(x: Tensor, surrogate: str, **parameters: float) -> Tensor:
    """The formula in float64 on the CPU."""
    chosen = get_surrogate(surrogate, **parameters)
    return chosen.derivative(x.detach().cpu().double(), *chosen.values)


def check_gradient(surrogate: str, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    """The value is ReLU's bit for bit, the gradient the formula's, also where infinities and NaN are."""
    base = 3 * torch.randn(4, 16, 65, 64, generator=torch.Generator().manual_seed(0))
    base.view(-1)[: 11 * len(EXTREMES) : 11] = torch.tensor(EXTREMES)
    x = LAYOUTS[layout](base.to(device, dtype)).detach().requires_grad_()
    y = sugar(x, surrogate)
    torch.testing.assert_close(y.detach(), F.relu(x.detach()), rtol=0, atol=0, equal_nan=True)
    for upstream in (torch.full_like(y, 0.5), torch.tensor(0.5, dtype=dtype, device=device).expand(y.shape)):
        (grad,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
        assert_rounded(grad, 0.5 * slope(x, surrogate), f"{surrogate}, {dtype}, {layout}")


def check_gradients(device: torch.device) -> str:
    """Every surrogate, type and layout."""
    dtypes = dtypes_of(device)
    for surrogate, dtype, layout in itertools.product(list_surrogates(), dtypes, LAYOUTS):
        check_gradient(surrogate, dtype, layout, device)
    return f"{len(list_surrogates())} surrogates x {len(dtypes)} types x {len(LAYOUTS)} layouts"


def injected(x: Tensor, alpha: float = 1.67) -> Tensor:
    """relu(x) with B-SiLU's gradient by autograd alone (FGI)."""
    primitive = (x + alpha) * torch.sigmoid(x) - alpha / 2
    return primitive - primitive.detach() + F.relu(x).detach()


def network(activation: Activation, device: torch.device) -> Any:
    """A small network that is the same at each call, its activations large enough to be compiled."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Linear(32, 5)
            self.activation = activation

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.activation(self.second(self.activation(self.first(x)))).mean((2, 3)))

    torch.manual_seed(0)
    return Network().to(device)


def images(device: torch.device) -> Tensor:
    """A batch of noise, the same at each call."""
    return torch.randn(8, 3, 36, 36, generator=torch.Generator().manual_seed(1)).to(device)


def gradients(model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Gradients of the weights; `run`: what calls the model."""
    loss = (model if run is None else run)(x).float().square().sum()
    return list(torch.autograd.grad(loss, list(model.parameters())))


def assert_near(found: list[Tensor], expected: list[Tensor], relative: float) -> None:
    """Compare gradients by the size of their difference."""
    for a, b in zip(found, expected, strict=True):
        off = float((a.double().cpu() - b.double().cpu()).norm() / b.double().cpu().norm())
        assert off < relative, f"gradients are {off:.2g} of their size apart, expected below {relative:g}"


def check_amp(device: torch.device) -> str:
    """Autocast with GradScaler, against autograd of the primitive in float32."""
    expected = gradients(network(injected, device), images(device))
    dtypes = [torch.bfloat16] if device.type == "cpu" else [torch.float16, torch.bfloat16]
    for dtype in dtypes:
        model = network(SUGAR(), device)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16, init_scale=2.0**10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with torch.autocast(device.type, dtype):
            loss = model(images(device)).float().square().sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert_near([weight.grad for weight in model.parameters()], expected, 0.05)
        scaler.step(optimizer)
        scaler.update()
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_compile(device: torch.device) -> str:
    """torch.compile in its modes, with a parameter that changes: at most two graphs each."""
    modes = (
        ["default"] if device.type in ("cpu", "mps") else ["default", "reduce-overhead", "max-autotune-no-cudagraphs"]
    )
    for mode in modes:
        torch.compiler.reset()
        counters.clear()
        model = network(SUGAR(), device)
        compiled: Any = torch.compile(model, mode=mode, fullgraph=True)
        for alpha in (1.67, 0.5, 0.5, 1.1, 0.2):
            set_surrogate(model, alpha=alpha)
            torch.compiler.cudagraph_mark_step_begin()
            found = [grad.clone() for grad in gradients(model, images(device), compiled)]
            reference = network(partial(injected, alpha=alpha), device)
            assert_near(found, gradients(reference, images(device)), 1e-2)
        graphs = counters["stats"]["unique_graphs"]
        assert graphs <= 2, f"{mode}: {graphs} graphs for 4 values of alpha"
    return ", ".join(modes)


def check_cuda_graphs(device: torch.device) -> str:
    """A captured step, replayed with other images, after the kernels were made and before."""
    if device.type != "cuda":
        raise Skipped("needs CUDA")
    model, static = network(SUGAR(surrogate="silu"), device), images(device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients(model, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(model, static)
    other = images(device).flip(0) * 0.7
    static.copy_(other)
    graph.replay()
    assert_near(captured, gradients(model, other), 1e-2)
    return "a captured step"


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """A group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def check_ddp(device: torch.device) -> str:
    """DistributedDataParallel over one process, whose hooks run in autograd's threads."""
    if not dist.is_available() or device.type == "mps":
        raise Skipped("needs torch.distributed on this device")
    expected = gradients(network(SUGAR(), device), images(device))
    with process_group(device):
        model = network(SUGAR(), device)
        DistributedDataParallel(model)(images(device)).float().square().sum().backward()
        assert_near([weight.grad for weight in model.parameters()], expected, 1e-2)
    return "one process"


def count_kernels(activation: Activation, x: Tensor) -> int:
    """The kernels that the backward pass of an activation launches on a GPU."""
    leaf = x.detach().requires_grad_()
    upstream = torch.ones_like(x)
    torch.autograd.grad(activation(leaf), leaf, upstream)  # compiles
    y = activation(leaf)
    torch.accelerator.synchronize()
    kinds = [ProfilerActivity.CPU, ProfilerActivity.XPU if x.device.type == "xpu" else ProfilerActivity.CUDA]
    with profile(activities=kinds) as seen:
        torch.autograd.grad(y, leaf, upstream)
        torch.accelerator.synchronize()
    # what the GPU did is an event of its device, copies and fills of memory included
    return sum(event.device_type != torch.autograd.DeviceType.CPU for event in seen.events())


def check_kernels(device: torch.device) -> str:
    """One kernel in the backward pass, as ReLU has, for every surrogate and type."""
    if device.type not in ("cuda", "xpu"):
        raise Skipped("needs a GPU whose kernels PyTorch's profiler counts (CUDA, ROCm, XPU)")
    for dtype in dtypes_of(device):
        x = torch.randn(2**18, device=device).to(dtype)
        for surrogate in list_surrogates():
            found = count_kernels(SUGAR(surrogate=surrogate), x)
            assert found == 1, f"{surrogate}, {dtype}: {found} kernels (ReLU has {count_kernels(F.relu, x)})"
    return "one kernel each"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "gradients": check_gradients,
    "AMP with GradScaler": check_amp,
    "torch.compile, alpha changing": check_compile,
    "CUDA graphs": check_cuda_graphs,
    "DDP": check_ddp,
    "kernels of the backward pass": check_kernels,
}
