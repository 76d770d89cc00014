"""One buffer for a pre-activation and what the next layer saves: how much is saved, and that no gradient changes."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from fgi import injected
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch._dynamo.utils import counters
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


@pytest.mark.needs_sharing
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


@pytest.mark.needs_sharing
def test_without_sharing_more_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("resnet18_sugar")
    shared = saved_bytes(model(images()), model)
    with unshared(monkeypatch):
        assert saved_bytes(model(images()), model) > 1.3 * shared


@pytest.mark.needs_sharing
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("convnext_atto", "swin_tiny_patch4_window7_224")),
    ],
)
def test_a_compiled_network_is_one_graph_that_is_compiled_once(name: str) -> None:
    """As with ReLU: no graph break, and nothing compiled in the steps after the first."""
    for relu in (False, True):
        torch._dynamo.reset()
        model = build(f"{name}_sugar", relu)
        compiled = torch.compile(model, backend="aot_eager")
        counters.clear()
        gradients(compiled)
        graphs = counters["stats"]["unique_graphs"]
        for _ in range(2):
            gradients(compiled)
        assert (sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"] - graphs) == (0, 0)


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


@pytest.mark.needs_sharing
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


@pytest.mark.needs_sharing
def test_nothing_is_replaced_on_the_meta_device() -> None:
    """Where all tensors have the same address, 0."""
    x, weight = (torch.empty(5, 5, device="meta").requires_grad_() for _ in range(2))
    z = sugar(x * 2) @ weight
    sugar(z)
    assert z.grad_fn._raw_saved_mat2.unpack_hook is None


@pytest.mark.needs_sharing
def test_only_the_value_is_replaced_not_the_weights_beside_it() -> None:
    a, b = nn.Linear(5, 5), nn.Linear(5, 5)
    z = b(sugar(a(torch.ones(2, 5))))
    assert z.grad_fn._raw_saved_mat1.unpack_hook is None
    sugar(z)
    assert z.grad_fn._raw_saved_mat1.unpack_hook is not None
    assert z.grad_fn._raw_saved_mat2.unpack_hook is None


# ---- who shares ----


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What layers gave up so far."""
    seen: list[Any] = []
    replace = _saved_tensors._replace
    monkeypatch.setattr(_saved_tensors, "_replace", lambda saved, node: (seen.append(saved), replace(saved, node)))
    return seen


def small_net(*activations: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [module for make in activations for module in (nn.Linear(6, 6), make())]
    return nn.Sequential(*layers, nn.Linear(6, 6)).double()


def run(model: Callable[[Tensor], Tensor]) -> Tensor:
    return model(torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6))


@pytest.mark.needs_sharing
def test_functions_modules_and_sugarized_models_share_only_on_request(replaced: list[Any]) -> None:
    linear = nn.Linear(6, 6).double()
    run(small_net(SUGAR, SUGAR))
    run(timm_sugar.sugarize(small_net(nn.ReLU, nn.GELU)))
    run(lambda x: timm_sugar.sugar(linear(timm_sugar.sugar(linear(x)))))
    assert not replaced
    run(small_net(lambda: SUGAR(save_memory=True), lambda: SUGAR(save_memory=True)))
    assert len(replaced) == 1
    run(timm_sugar.sugarize(small_net(nn.ReLU, nn.GELU), save_memory=True))
    assert len(replaced) == 2
    run(lambda x: sugar(linear(sugar(linear(x)))))
    assert len(replaced) == 3


@pytest.mark.needs_sharing
def test_registered_names_share_unless_told_not_to(replaced: list[Any]) -> None:
    timm.create_model("test_resnet_sugar", save_memory=False)(images())
    timm.create_model("test_resnet_sugar", features_only=True)(images())
    assert not replaced
    timm.create_model("test_resnet_sugar")(images())
    assert replaced


@pytest.mark.needs_sharing
def test_sugarize_switches_sharing_on_and_off_and_to_relu_leaves_no_hooks(replaced: list[Any]) -> None:
    model = timm.create_model("test_resnet_sugar")
    timm_sugar.sugarize(model)
    model(images())
    assert not replaced
    timm_sugar.sugarize(model, save_memory=True)
    model(images())
    assert replaced
    timm_sugar.to_relu(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with timm_sugar.sugarized(model, save_memory=True):
        assert model._forward_hooks
    assert not model._forward_hooks


@pytest.mark.needs_sharing
def test_after_sugarized_a_model_shares_as_it_did_before(replaced: list[Any]) -> None:
    model = timm.create_model("test_resnet_sugar")  # which shares
    outer = torch.nn.Sequential(model)
    model(images())
    ours = len(replaced)
    for surrogate in ("nelu", "bsilu"):  # the second is what the model has
        with timm_sugar.sugarized(outer, surrogate, save_memory=True):
            pass
        replaced.clear()
        model(images())
        assert len(replaced) == ours > 0
        model.forward_features(images())  # a part of the model shares nothing
        assert len(replaced) == ours
    assert not outer._forward_hooks


@pytest.mark.needs_sharing
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("unshare", ["script", "sugarized"])
def test_what_no_longer_shares_shares_nothing_under_hooks(unshare: str, replaced: list[Any]) -> None:
    """A hook writes to values unseen by autograd; gradients are those of a model that never shared."""

    def net() -> torch.nn.Sequential:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))

    model, x = net(), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    if unshare == "script":
        torch.jit.script(timm_sugar.sugarize(model, save_memory=True))
    else:
        timm_sugar.sugarize(model, save_memory=True)
        with timm_sugar.sugarized(model, save_memory=True):
            pass
    expected = timm_sugar.sugarize(net())
    for one in (model, expected):
        one[1].register_forward_hook(lambda module, inputs, y: y.data.mul_(2))
        one(x).square().sum().backward()
    assert not replaced
    assert torch.equal(model[2].weight.grad, expected[2].weight.grad)


@pytest.mark.needs_sharing
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_share_among_themselves(copied: Callable[[Any], Any], replaced: list[Any]) -> None:
    model = timm.create_model("test_resnet_sugar")
    model(images())
    ours = len(replaced)
    twin = copied(model)
    del model
    twin(images())
    assert len(replaced) == 2 * ours > 0


@pytest.mark.needs_sharing
@pytest.mark.parametrize("place", ["layer1.0.act1", "layer1.0.conv2", "layer2.0", "global_pool"])
@pytest.mark.parametrize("before", [True, False])
def test_a_model_that_a_forward_hook_looks_into_shares_nothing(place: str, before: bool, replaced: list[Any]) -> None:
    model = timm.create_model("test_resnet_sugar")
    module = model.get_submodule(place)
    add = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = add(lambda *_: None)
    model(images())
    assert not replaced
    handle.remove()
    model(images())
    assert replaced


@pytest.mark.needs_sharing
def test_a_hook_that_is_added_while_the_model_runs_stops_sharing(replaced: list[Any]) -> None:
    """Hooks of the model itself put one on an activation for one call."""
    model = timm.create_model("test_resnet_sugar")
    handles: list[Any] = []
    act = model.layer1[0].act1
    first = model.register_forward_pre_hook(lambda *_: handles.append(act.register_forward_hook(lambda *_: None)))
    model.register_forward_hook(lambda *_: handles.pop().remove())
    model(images())
    assert not replaced
    first.remove()
    handles.append(first)
    model(images())
    assert replaced


@pytest.mark.needs_sharing
def test_a_call_holds_nothing_when_it_is_over(replaced: list[Any]) -> None:
    """Without the garbage collector, which can't see what autograd holds."""
    model, x = timm.create_model("test_resnet_sugar"), images()
    held, y = weakref.ref(x), model(x)
    assert replaced
    replaced.clear()
    gc.disable()
    try:
        del x, y
        assert held() is None
    finally:
        gc.enable()


def test_a_hook_on_all_modules_stops_sharing(replaced: list[Any]) -> None:
    model = timm.create_model("test_resnet_sugar")
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        model(images())
    finally:
        handle.remove()
    assert not replaced


def test_what_a_caller_received_is_not_shared(replaced: list[Any]) -> None:
    """Between two calls, and between the parts of a model, values are in the caller's hands."""
    model = timm_sugar.sugarize(small_net(nn.ReLU), save_memory=True)
    run(lambda x: model(model[:2](model[:2](x))))
    model[1](model[0](model[1](run(model[0]))))
    assert not replaced
    backbone = timm.create_model("mobilenetv3_small_050_sugar")
    backbone.forward_head(backbone.forward_features(images()))
    assert not replaced


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_forward_mode_over_the_backward_pass_of_a_model_that_shares_memory() -> None:
    """A pre-activation would give the value ReLU's tangent, not the surrogate's."""
    x, tangents = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6), []
    for act in (sugar, injected):
        torch.manual_seed(0)
        a, b, c = (nn.Linear(6, 6).double() for _ in range(3))
        with forward_ad.dual_level():
            h = act(a(forward_ad.make_dual(x, torch.ones_like(x))))
            loss = c(act(b(h))).square().sum()
            grads = torch.autograd.grad(loss, [b.weight, c.weight])
            tangents.append([forward_ad.unpack_dual(grad).tangent for grad in grads])
    torch.testing.assert_close(*tangents, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_call_that_raised_is_over(error: type[BaseException], replaced: list[Any]) -> None:
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 2:
                raise error
            return x

    model = timm_sugar.sugarize(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Raises()), save_memory=True)
    _saved_tensors.share_within(model, [model[1]])
    with pytest.raises(error):
        model(torch.ones(2, 6))
    model[1](model[0](model[1](model[0](torch.ones(2, 6)))))
    assert not replaced
    assert not _saved_tensors._calls.running


@pytest.mark.needs_sharing
def test_a_call_that_was_interrupted_holds_nothing_when_another_model_runs(replaced: list[Any]) -> None:
    model = timm.create_model("test_resnet_sugar")
    x, held = images(), weakref.ref(model)
    handle = model.fc.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    del model
    timm.create_model("test_resnet_sugar")(x)
    gc.collect()
    assert held() is None


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.needs_sharing
def test_small_values_are_not_shared(replaced: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = timm_sugar.sugarize(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()))
    timm_sugar.sugarize(model, save_memory=True)
    for rows, shared in ((1023, False), (1024, True)):  # 64 x 1024 float32 are 256 KiB
        z = model(torch.ones(rows, 64))
        hook = z.grad_fn.next_functions[0][0]._raw_saved_mat1.unpack_hook  # type: ignore[union-attr]
        assert (hook is not None) == shared


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_registered_model_can_be_scripted_and_traced() -> None:
    model, relu = timm.create_model("test_resnet_sugar"), timm.create_model("test_resnet")
    relu.load_state_dict(model.state_dict())
    traced = torch.jit.trace(model.eval(), images())
    for other in (traced, torch.jit.script(model)):
        torch.testing.assert_close(other(images()), relu.eval()(images()))


# ---- what must not be taken for the value ----


def gradients_of(call: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(call(*leaves).square().sum(), leaves))


class Keeps(torch.autograd.Function):
    """The identity, whose gradient is scaled by what it saved of its input."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(make(y))
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (saved,) = ctx.saved_tensors
        return grad * (saved.sum() + 2 * saved.flatten()[-1]).real, None


def quantised(y: Tensor, w: Tensor) -> Tensor:
    y.data = y.data.sign()  # the memory of before is free, and what follows may get it
    return y @ w.clamp(-1, 1)


_kept: list[Tensor] = []


def detached_alias(y: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        y.add_(1)
    _kept[:] = [y]
    return Keeps.apply(y, lambda t: t.data) @ w


def another_dtype(y: Tensor, w: Tensor) -> Tensor:
    return Keeps.apply(y, lambda t: torch.view_as_complex(t.view(3, 3, 2))) @ w


def negated(y: Tensor, w: Tensor) -> Tensor:
    return Keeps.apply(y, torch._neg_view) @ w


def changed_view(y: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        y[1:].mul_(2)
    return y.view(3, 6) @ w


@pytest.mark.parametrize("between", [quantised, detached_alias, another_dtype, negated, changed_view])
def test_other_tensors_in_the_values_memory_are_left_alone(between: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.linspace(-2, 2, 36, dtype=torch.float64).view(6, 6)
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return sugar(between(sugar(x * 1), w) + 0 * x.sum() + 0 * w.sum())

    x.requires_grad_()
    w.requires_grad_()
    results = [gradients_of(loss, x, w) for _ in range(10)]  # memory is reused by chance
    with unshared(monkeypatch):
        expected = gradients_of(loss, x, w)
    assert all(same(result, expected) for result in results)  # type: ignore[arg-type]


@pytest.mark.needs_sharing
def test_memory_that_is_reused_is_not_the_value() -> None:
    """The storage is known by weak reference, so another one at its address is another one."""
    y = sugar(torch.ones(3, 6, requires_grad=True) * 1)
    value = y.grad_fn.sugar_value  # type: ignore[union-attr]
    assert value.is_in(y)
    assert value.is_in(y.t())
    assert not value.is_in(y.clone())
    address = y.data_ptr()
    y.data = torch.ones(3, 6)
    assert not value.is_in(y)
    for _ in range(100):
        other = torch.ones(3, 6)
        assert not value.is_in(other)
        if other.data_ptr() == address:
            break


def test_wrapper_subclasses_beside_the_value_are_left_alone() -> None:
    class Wrapper(Tensor):
        @staticmethod
        def __new__(cls, inner: Tensor) -> Wrapper:
            wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
            wrapper.inner = inner
            return wrapper

        @classmethod
        def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            args = [a.inner if isinstance(a, Wrapper) else a for a in args]
            return function(*args, **(kwargs or {}))

    w = Wrapper(torch.ones(6, 6))
    x = torch.ones(3, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(sugar(sugar(x * 1) @ w).sum(), x)
    assert grad.isfinite().all()


def test_a_graph_that_was_freed_does_not_hinder_the_next_forward_pass() -> None:
    a, b = nn.Linear(5, 5), nn.Linear(5, 5)
    y = sugar(a(torch.ones(2, 5)))
    y.sum().backward()
    z = sugar(b(y))  # a second head, or a metric
    assert torch.equal(z, F.relu(b(y)))
    z = b(y.detach())
    (grad,) = torch.autograd.grad(sugar(z).sum(), b.weight)
    assert grad.isfinite().all()


def test_a_pre_activation_changed_in_place_raises_in_the_backward_pass_and_not_before() -> None:
    a, b = nn.Linear(5, 5), nn.Linear(5, 5)
    x = a(torch.ones(2, 5))
    y = sugar(x)
    with torch.no_grad():
        x.add_(1)
    z = sugar(b(y))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_no_function_of_a_users_is_kept_alive() -> None:
    alive = []
    for _ in range(3):

        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.save_for_backward(x)
                return 2 * x

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return 2 * grad

        sugar(Double.apply(sugar(torch.ones(3, requires_grad=True) * 1)))
        alive.append(weakref.ref(Double))
        del Double
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


# ---- the switch that looks for what can't be told ----


def unseen(x: Tensor) -> Tensor:
    x.data.clamp_(max=0.1)
    return x


class Writes(nn.Module):
    """Writes to its input unseen by autograd."""

    def forward(self, x: Tensor) -> Tensor:
        return unseen(x)


@pytest.mark.needs_sharing
def test_check_names_the_module_whose_value_was_overwritten_before_it_was_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Writes(), nn.Linear(6, 6), nn.ReLU())
    timm_sugar.sugarize(model, save_memory=True)
    model(torch.ones(3, 6))  # wrong in silence, and documented
    monkeypatch.setattr(_saved_tensors, "check_sharing", True)
    with pytest.raises(RuntimeError, match=r"the value of 1, of shape \[3, 6\], was overwritten .* save_memory=False"):
        model(torch.ones(3, 6))
    timm_sugar.sugarize(model)
    model(torch.ones(3, 6)).sum().backward()


@pytest.mark.needs_sharing
def test_check_compares_in_the_backward_pass_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_saved_tensors, "check_sharing", True)
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    x = a(torch.ones(3, 6))
    loss = sugar(b(sugar(x))).sum()
    x.data.add_(1)
    with pytest.raises(RuntimeError, match=r"the value of sugar\(\), of shape"):
        loss.backward()


def test_check_finds_nothing_in_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_saved_tensors, "check_sharing", True)
    gradients(build("test_resnet_sugar"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1", "True"), *(pytest.param(value, "False", marks=pytest.mark.slow) for value in ("0", None))],
)
@pytest.mark.slow
def test_check_is_switched_on_by_the_environment(value: str | None, expected: str) -> None:
    environment = {key: text for key, text in os.environ.items() if key != "TIMM_SUGAR_CHECK_SHARING"}
    if value is not None:
        environment["TIMM_SUGAR_CHECK_SHARING"] = value
    code = "from timm_sugar import _saved_tensors; print(_saved_tensors.check_sharing)"
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert output.strip() == expected
