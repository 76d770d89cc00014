"""Counting dead units and zeros gives what the whole activations, collected and counted by hand, give."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_sugar  # noqa: F401
from timm_sugar.activation import SUGAR
from timm_sugar.diagnose import watch


def by_hand(model: nn.Module, batches: list[Tensor], dims: dict[str, int]) -> dict[str, tuple[float, float]]:
    """Dead share and sparsity by activation name, from all of its outputs at once."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in dims}
    modules = dict(model.named_modules())
    hooks = [modules[n].register_forward_hook(lambda m, x, y, n=n: outputs[n].append(y.detach())) for n in dims]
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    result = {}
    for name, dim in dims.items():
        units = torch.cat(outputs[name]).movedim(dim, 0).flatten(1)
        result[name] = ((units <= 0).all(1).double().mean().item(), (units == 0).double().mean().item())
    return result


def convnet() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), SUGAR(), nn.Conv2d(8, 4, 3), nn.GELU(),
        nn.Flatten(), nn.Linear(64, 5), nn.ReLU(),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[0].weight[:3].zero_()  # three units that no image can wake
        model[1].bias[:3].fill_(-1.0)
        model[6].bias[0] = -100.0
    return model


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(3)]


def test_counts_equal_the_collected_activations(batches: list[Tensor]) -> None:
    model = convnet()
    with watch(model) as activations:
        for batch in batches:
            model(batch)
    expected = by_hand(model, batches, {"2": 1, "4": 1, "7": 1})
    assert list(activations.layers) == ["2", "4", "7"]
    for name, (dead, sparsity) in expected.items():
        assert activations.layers[name].dead == pytest.approx(dead)
        assert activations.layers[name].sparsity == pytest.approx(sparsity)
    assert activations.layers["2"].dead == pytest.approx(3 / 8)
    assert activations.layers["4"].sparsity == 0  # GELU has no exact zeros


def test_totals_weigh_units_and_elements(batches: list[Tensor]) -> None:
    model = convnet()
    with watch(model) as activations:
        for batch in batches:
            model(batch)
    layers = activations.layers.values()
    alive = sum(int(layer.active.sum()) for layer in layers)
    assert activations.dead == pytest.approx(1 - alive / (8 + 4 + 5))
    zeros = sum(layer.sparsity * layer.elements for layer in layers)
    assert activations.sparsity == pytest.approx(zeros / (6 * (8 * 36 + 4 * 16 + 5)))


def test_a_unit_is_dead_only_if_no_batch_wakes_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    model[0].weight.data = torch.eye(2)
    with watch(model) as activations:
        model(torch.tensor([[1.0, -1.0]]))
        assert activations.dead == 0.5
        model(torch.tensor([[-1.0, 1.0]]))
        assert activations.dead == 0
    assert activations.sparsity == 0.5


class Permuting(nn.Module):
    """A convolution whose output the activation sees with the channels last, as tokens, and one before any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ReLU()
        self.conv = nn.Conv2d(3, 6, 1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.first(x))
        return self.act(x.permute(0, 2, 3, 1)) if self.training else self.act(x.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("training", [True, False])
def test_units_are_found_where_the_channels_were_moved(training: bool) -> None:
    model = Permuting().train(training)
    with watch(model) as activations:
        model(torch.randn(2, 3, 4, 4))
    assert activations.layers["act"].active.shape == (6,)
    assert activations.layers["first"].active.shape == (3,)


@pytest.mark.parametrize("name", ["test_convnext_sugar", "swin_tiny_sugar", "test_vit_sugar", "test_resnet_sugar"])
def test_units_are_the_features_of_the_layer_before(name: str) -> None:
    """In token and feature map networks alike; the oracle is the size of the fully connected or convolution layer."""
    options = {"img_size": 32, "window_size": 4, "patch_size": 2} if "swin" in name else {}
    model = timm.create_model(name, **options).eval()
    last, expected = [0], []
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            size = module.weight.shape[0]
            module.register_forward_hook(lambda m, x, y, size=size: last.__setitem__(0, size))
        elif isinstance(module, SUGAR):
            module.register_forward_hook(lambda m, x, y: expected.append(last[0]))
    size = 32 if "swin" in name else 160
    with torch.no_grad(), watch(model) as activations:
        model(torch.randn(1, 3, size, size))
    assert expected
    assert [layer.active.numel() for layer in activations.layers.values()] == expected


def test_a_module_called_twice_has_two_entries() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 3), act, nn.Linear(3, 5), act)
    with watch(model) as activations:
        for _ in range(2):
            model(torch.randn(2, 4))
    shapes = {name: layer.active.numel() for name, layer in activations.layers.items()}
    assert shapes == {"1": 3, "1#2": 5}


def test_the_model_is_left_as_it_was(batches: list[Tensor]) -> None:
    model = convnet()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    plain = model(batches[0])
    with watch(model):
        assert torch.equal(model(batches[0]), plain)
    with pytest.raises(RuntimeError, match="Expected"), watch(model):
        model(torch.randn(1, 7))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not model.training


def test_memory_does_not_grow_with_the_data(batches: list[Tensor]) -> None:
    model = convnet()
    sizes = []
    with watch(model) as activations:
        for batch in batches:
            model(batch)
            sizes.append(sum(layer.active.numel() + layer.zeros.numel() for layer in activations.layers.values()))
    assert sizes == [17 + 3] * 3


def test_no_gradient_is_changed(batches: list[Tensor]) -> None:
    model = convnet()
    model(batches[0]).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with watch(model):
        model(batches[0]).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))


def test_nothing_seen_is_not_a_number() -> None:
    with watch(nn.Linear(2, 2)) as activations:
        pass
    assert activations.dead != activations.dead
    assert activations.sparsity != activations.sparsity
