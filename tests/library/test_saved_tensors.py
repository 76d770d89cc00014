"""One buffer for a pre-activation and what the next layer saves: how much is saved, and that no gradient changes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from lab.bench.timing import count_compilation
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import timm_sugar
from timm_sugar import SUGAR, _saved_tensors, activation

# Families whose activation feeds a convolution, a linear layer (of three and four dimensions), a gate, several layers.
NETS: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "resnet18": {},
    "convnext_atto": {},
    "test_vit": {},
    "mobilenetv3_small_050": {},
    "densenet121": {"block_config": (2, 2)},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1, 2, 1)},
    "vgg11": {"mlp_ratio": 0.02},
}


@pytest.fixture(autouse=True)
def small_values_are_shared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_saved_tensors, "_LEAST", 0)


def sugar(x: Tensor) -> Tensor:
    return timm_sugar.sugar(x, save_memory=True)


@contextmanager
def unshared(patch: pytest.MonkeyPatch) -> Iterator[None]:
    with patch.context() as patched:
        patched.setattr(activation, "find_call", lambda x, scope: None)
        yield


def nodes(output: Tensor) -> list[Any]:
    """All nodes of the graph behind a tensor."""
    found: list[Any] = []
    stack: list[Any] = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found.append(node)
            stack += [before for before, _ in node.next_functions]
    return found


def saved_bytes(output: Tensor, model: nn.Module) -> int:
    """Bytes that the graph behind an output keeps alive, each storage once, those of the model's own tensors not."""
    kept: dict[int, int] = {}
    for node in nodes(output):
        for name in dir(node):
            if not name.startswith("_raw_saved_"):
                continue
            value = getattr(node, name)
            for saved in value if isinstance(value, tuple) else (value,):
                tensor = saved.data if saved.unpack_hook is None else reference(saved)
                if isinstance(tensor, Tensor):
                    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    return sum(size for address, size in kept.items() if address not in own)


def reference(saved: Any) -> Tensor:
    """The pre-activation that a replaced tensor refers to, as found in the closure of its hook."""
    (tensor,) = [c.cell_contents for c in saved.unpack_hook.__closure__ if isinstance(c.cell_contents, Tensor)]
    return tensor


def build(name: str, relu: bool = False) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name.removesuffix("_sugar") if relu else name, num_classes=5, **NETS[name[:-6]]).train()
    if relu:
        timm_sugar.sugarize(model)
        timm_sugar.to_relu(model)
    return model


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, loss: Callable[[Tensor], Tensor] = lambda y: y.square().mean()) -> list[Tensor | None]:
    torch.manual_seed(2)  # dropout
    model.zero_grad()
    loss(model(images())).backward()
    return [parameter.grad for parameter in model.parameters()]


def same(ours: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


# ---- how much ----


@pytest.mark.parametrize("name", NETS)
def test_saves_what_relu_saves(name: str) -> None:
    """But for the value of the last activation, if a layer that saves it follows, and no other activation."""
    model, relu = build(f"{name}_sugar"), build(f"{name}_sugar", relu=True)
    values: list[int] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, y: values.append(y.numel() * y.element_size()))
        for module in model.modules()
        if isinstance(module, SUGAR)
    ]
    model(images())
    for hook in hooks:
        hook.remove()
    extra = saved_bytes(model(images()), model) - saved_bytes(relu(images()), relu)
    assert extra == 0 if name in ("resnet18", "densenet121", "vgg11") else 0 <= extra <= values[-1]


def test_without_sharing_more_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("resnet18_sugar")
    shared = saved_bytes(model(images()), model)
    with unshared(monkeypatch):
        assert saved_bytes(model(images()), model) > 1.3 * shared


def test_value_is_freed_once_the_next_activation_has_run() -> None:
    y = sugar(nn.Linear(4, 4)(torch.randn(3, 4)))
    memory = StorageWeakRef(y.untyped_storage())
    z = nn.Linear(4, 4)(y)
    del y
    gc.collect()
    assert not memory.expired()
    z = sugar(z)
    gc.collect()
    assert memory.expired()
    z.sum().backward()


def test_backward_frees_pre_activations_though_the_loss_is_kept() -> None:
    x = nn.Linear(4, 4)(torch.randn(3, 4))
    memory = StorageWeakRef(x.untyped_storage())
    loss = sugar(nn.Linear(4, 4)(sugar(x))).sum()
    del x
    gc.collect()
    assert not memory.expired()
    loss.backward()
    gc.collect()
    assert memory.expired()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_compiled_graph_saves_no_more_than_relus(name: str) -> None:
    """aot_eager_decomp_partition decides what to save as inductor does, and needs no C++ compiler."""
    torch._dynamo.reset()
    saved = []
    for relu in (False, True):
        model = build(f"{name}_sugar", relu)
        output = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)(images())
        (node,) = [node for node in nodes(output) if hasattr(node, "saved_tensors")]
        saved.append(sum(tensor.numel() * tensor.element_size() for tensor in node.saved_tensors))
    assert saved[0] <= saved[1]


@pytest.mark.parametrize("name", ["test_resnet", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_a_compiled_network_is_one_graph_that_is_compiled_once(name: str) -> None:
    """As with ReLU: no graph break, and nothing compiled in the steps after the first."""
    for relu in (False, True):
        torch._dynamo.reset()
        model = build(f"{name}_sugar", relu)
        compiled = torch.compile(model, backend="aot_eager")
        assert count_compilation(lambda: gradients(compiled)) == (0, 0)  # noqa: B023  called here and now


# ---- the same gradient ----


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_those_without_sharing_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = gradients(build(f"{name}_sugar"))
    with unshared(monkeypatch):
        assert same(ours, gradients(build(f"{name}_sugar")))


def test_gradients_under_autocast_are_those_without_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(build("resnet18_sugar"))
        with unshared(monkeypatch):
            assert same(ours, gradients(build("resnet18_sugar")))


def test_distributed_training_and_moving_average_are_those_without_sharing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One process of DistributedDataParallel, whose hooks and buckets are those of any number; three steps."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)

    def train() -> list[Tensor | None]:
        model = build("resnet18_sugar")
        wrapped, average = DistributedDataParallel(model), ModelEmaV3(model, decay=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            gradients(wrapped)
            optimizer.step()
            average.update(model)
        average.module.train()
        return [*average.module.state_dict().values(), *gradients(average.module.requires_grad_())]

    try:
        ours = train()
        with unshared(monkeypatch):
            assert same(ours, train())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_run_twice_and_have_the_same_gradients(reentrant: bool, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
    runs = []

    def inner(x: Tensor) -> Tensor:
        runs.append(x)
        return sugar(layers[2](sugar(layers[1](x))))

    def loss() -> Tensor:
        x = sugar(layers[0](torch.ones(2, 6)))
        x = checkpoint(inner, x, use_reentrant=reentrant)
        return sugar(layers[3](x)).square().sum()

    ours_loss = loss()
    assert len(runs) == 1
    ours_loss.backward()
    ours = [parameter.grad for parameter in layers.parameters()]
    assert len(runs) == 2
    with unshared(monkeypatch):
        layers.zero_grad()
        loss().backward()
    assert same(ours, [parameter.grad for parameter in layers.parameters()])


def test_double_backward_is_that_without_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), SUGAR(), nn.Linear(8, 8), SUGAR(), nn.Linear(8, 1)).double()

    def penalty(x: Tensor) -> list[Tensor]:
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return list(torch.autograd.grad(slope.square().sum(), [x, *model.parameters()], allow_unused=True))

    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    ours = penalty(x)
    with unshared(monkeypatch):
        assert same(ours, penalty(x))
    assert ours[0] is not None
    assert ours[0].abs().sum() > 0


def test_two_layers_on_one_value_and_a_value_that_outlives_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    a, b, c = (nn.Linear(5, 5) for _ in range(3))

    def run() -> tuple[list[Tensor | None], Tensor]:
        x = torch.linspace(-1, 1, 15).view(3, 5).requires_grad_()
        y = sugar(a(x))
        z = sugar(b(y) * c(y.t().contiguous().t()) + y)
        for layer in (a, b, c):
            layer.zero_grad()
        z.sum().backward()
        return [x.grad, a.weight.grad, b.weight.grad, c.weight.grad], y

    ours, y = run()
    assert torch.equal(y, F.relu(y))
    assert y.requires_grad
    with unshared(monkeypatch):
        assert same(ours, run()[0])


# ---- changes in place ----


@pytest.mark.parametrize("recorded", [True, False])
def test_value_changed_in_place_before_the_next_layer(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    a, b = nn.Linear(5, 5), nn.Linear(5, 5)

    def run() -> list[Tensor | None]:
        y = sugar(a(torch.ones(2, 5)))
        with torch.set_grad_enabled(recorded):
            y.add_(1)  # for example a residual connection
        return [*torch.autograd.grad(sugar(b(y)).sum(), [a.weight, b.weight])]

    ours = run()
    with unshared(monkeypatch):
        assert same(ours, run())


@pytest.mark.parametrize("view", [False, True])
def test_value_changed_in_place_after_the_next_layer_is_detected(view: bool) -> None:
    a, b = nn.Linear(5, 5), nn.Linear(5, 5)
    y = sugar(a(torch.ones(2, 5)))
    loss = sugar(b(y)).sum()
    with torch.no_grad():
        (y[0] if view else y).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_pre_activation_changed_in_place_is_detected_even_if_only_the_next_layer_asks() -> None:
    a, b = nn.Linear(5, 5), nn.Linear(5, 5)
    x = a(torch.ones(2, 5))
    loss = sugar(b(sugar(x))).sum()
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, b.weight)


# ---- what is left alone ----


def test_tensors_that_somebody_else_keeps_are_left_to_them() -> None:
    """saved_tensors_hooks is how checkpointing and offloading work."""
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    a, b = nn.Linear(5, 5), nn.Linear(5, 5)
    y = sugar(a(torch.ones(2, 5)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z = b(y)
    assert any(tensor is y for tensor in packed)
    sugar(z).sum().backward()
    assert b.weight.grad is not None


def test_nothing_is_replaced_on_the_meta_device() -> None:
    """Where all tensors have the same address, 0."""
    x, weight = (torch.empty(5, 5, device="meta").requires_grad_() for _ in range(2))
    z = sugar(x * 2) @ weight
    sugar(z)
    assert z.grad_fn._raw_saved_mat2.unpack_hook is None


def test_only_the_value_is_replaced_not_the_weights_beside_it() -> None:
    a, b = nn.Linear(5, 5), nn.Linear(5, 5)
    z = b(sugar(a(torch.ones(2, 5))))
    assert z.grad_fn._raw_saved_mat1.unpack_hook is None
    sugar(z)
    assert z.grad_fn._raw_saved_mat1.unpack_hook is not None
    assert z.grad_fn._raw_saved_mat2.unpack_hook is None
