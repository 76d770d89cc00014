"""What benchmarks time: passes through an activation, training steps and inference of any variant of a timm model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lab.bench.timing import kept_bytes, most_bytes, peak_bytes
from lab.bench.variants import make_model
from timm_sugar._compiled import compile_gradient
from timm_sugar.activation import SUGAR
from timm_sugar.surrogate import surrogate_derivative


def activation_pass(activation: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Callable[[], None]:
    """Forward and backward pass of one activation; x, and the gradient that comes from upstream: any shape."""
    x = x.detach().requires_grad_()

    def work() -> None:
        torch.autograd.grad(activation(x), x, upstream)

    return work


def recorded_forward(activation: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Callable[[], None]:
    """The forward pass of one activation alone, as autograd records it in training; x: any shape."""
    x = x.detach().requires_grad_()

    def work() -> None:
        activation(x)

    return work


# By metric. A small network on a GPU waits for what a forward call costs in Python.
ACTIVATION_PASSES = {"pass": activation_pass, "recorded": recorded_forward}


def backward_loops(x: Tensor, upstream: Tensor, sugar: SUGAR) -> dict[str, Callable[[], Tensor]]:
    """The loops over memory that backward passes are, and, compiled as SUGAR's is, two that do a part of its work: a
    product with x, and one with an exponential of x. x, upstream: dense, one-dimensional, of a CPU, of one dtype;
    `sugar`: what has the surrogate and its values.

    Raises what a compiler may raise.
    """
    factors: dict[str, Callable[[Tensor], Tensor]] = {
        "sugar": lambda x: surrogate_derivative(x, sugar.surrogate, sugar.values),
        "product": lambda x: x.float(),
        "exponential": lambda x: torch.exp(x.float()),
    }
    aten: dict[str, Callable[[], Tensor]] = {
        "relu": lambda: torch.ops.aten.threshold_backward.default(upstream, x, 0),
        "gelu": lambda: torch.ops.aten.gelu_backward.default(upstream, x),
    }
    with torch.no_grad():
        kernels = {name: compile_gradient(factor, x.dtype, x.device) for name, factor in factors.items()}
    matrices = upstream.view(-1, 1), x.view(-1, 1)
    loops = {name: functools.partial(_run, kernel, *matrices) for name, kernel in kernels.items()}
    return aten | loops


def _run(kernel: Callable[[Tensor, Tensor], Tensor], upstream: Tensor, x: Tensor) -> Tensor:
    return kernel(upstream, x).view(-1)


class TrainingStep:
    """A step of training on one random batch: forward pass, cross-entropy, backward pass, SGD with momentum.

    images: (N, C, H, W), on the model's device; dtype: that of autocast, float32 being none.
    """

    def __init__(self, model: nn.Module, images: Tensor, dtype: torch.dtype, classes: int) -> None:
        self.model, self.images, self.dtype = model.train(), images, dtype
        self.labels = torch.arange(len(images), device=images.device) % classes
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def loss(self) -> Tensor:
        """The forward pass."""
        with torch.autocast(self.images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(self.images)
        return F.cross_entropy(logits.float(), self.labels)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def kept_bytes(self) -> int:
        """What the forward pass keeps for the backward pass."""
        self.optimizer.zero_grad()
        return kept_bytes(self.loss, self.images.device.type)


@dataclass(frozen=True)
class Workload:
    """A network and how it is run.

    `settings`: those of SUGAR; `img_size`: pixels a side, None for the model's own; `dtype`: that of autocast, float32
    being none; `compile`: through torch.compile.
    """

    base: str
    settings: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    img_size: int | None = None
    dtype: str = "bfloat16"
    device: str = "cpu"
    compile: bool = False
    channels_last: bool = False

    def pixels(self) -> int:
        """Of an image, a side."""
        return self.img_size or self._config()["input_size"][-1]

    def model(self, variant: str) -> nn.Module:
        """A variant of the network on the device, not compiled. Raises as `make_model` does."""
        sized = {"img_size": self.img_size} if self.img_size and self._config().get("fixed_input_size") else {}
        model = make_model(self.base, variant, self.settings, **sized).to(self.device)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def images(self) -> Tensor:
        """A batch of noise, the same at every call: (batch size, 3, pixels, pixels)."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch_size, 3, self.pixels(), self.pixels(), generator=generator).to(self.device)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def training_step(self, variant: str) -> TrainingStep:
        """A step of training of a variant; over all processes of the default group if there is one."""
        model: Any = self.model(variant)
        wrapped: Any = torch.compile(model) if self.compile else model
        if torch.distributed.is_initialized():
            wrapped = DistributedDataParallel(wrapped)
        return TrainingStep(wrapped, self.images(), getattr(torch, self.dtype), model.num_classes)

    def forward_pass(self, variant: str) -> Callable[[], None]:
        """A forward pass of a variant in eval mode with gradients off."""
        model, images, dtype = self.model(variant).eval(), self.images(), getattr(torch, self.dtype)
        wrapped: Any = torch.compile(model) if self.compile else model

        def work() -> None:
            with torch.no_grad(), torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
                wrapped(images)

        return work

    def exported_graph(self, variant: str) -> str:
        """The graph that torch.export makes of a variant in eval mode with gradients off, as text."""
        with torch.no_grad():
            return str(torch.export.export(self.model(variant).eval(), (self.images(),)).graph)

    def peak_memory(self, variant: str, steps: int) -> dict[str, float]:
        """Bytes. `peak`: the most that this process has held after some steps of training; `added`: how much of that is
        more than before the first of them; `tensors`: the most in tensors, above model and optimizer, during a step."""
        step = self.training_step(variant)
        before = peak_bytes(self.device)
        for _ in range(steps):
            step()
        peak = peak_bytes(self.device)
        found = {"peak": peak, "added": peak - before}
        if torch.device(self.device).type != "mps":
            step.optimizer.zero_grad()
            found["tensors"] = most_bytes(step, self.device)
        return {name: float(value) for name, value in found.items()}

    def _config(self) -> dict[str, Any]:
        config = timm.get_pretrained_cfg(self.base)
        return config.to_dict() if config else {}
