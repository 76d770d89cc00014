"""Conv2NeXt: equal to the network written out in functions, and a timm model like any other."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import timm_sugar
from timm_sugar.models.conv2next import MixedAttention

SMALL = {"depths": (1, 2, 1, 1), "dims": (16, 16, 24, 24), "num_classes": 5}


def reference(weights: dict[str, Tensor], x: Tensor, depths: tuple[int, ...]) -> Tensor:
    """Logits in inference, from the description of the network alone."""

    def at(name: str) -> tuple[Tensor, Tensor]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def batch_norm(x: Tensor, name: str) -> Tensor:
        mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        scale, shift = at(name)
        return (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt() * scale[:, None, None] + shift[
            :, None, None
        ]

    def layer_norm(x: Tensor, name: str) -> Tensor:
        scale, shift = at(name)
        centred = x - x.mean(1, keepdim=True)
        normal = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return normal * scale[:, None, None] + shift[:, None, None]

    def attention(x: Tensor, name: str) -> Tensor:
        half = x.shape[1] // 2
        first, second = x[:, :half], x[:, half:]
        pooled = torch.cat([first.mean(3), first.mean(2)], 2)[..., None]
        pooled = batch_norm(F.conv2d(pooled, *at(f"{name}.coordinate.conv")), f"{name}.coordinate.norm")
        pooled = pooled * (pooled + 3).clamp(0, 6) / 6
        rows, columns = pooled[:, :, : x.shape[2]], pooled[:, :, x.shape[2] :]
        down = F.conv2d(rows, *at(f"{name}.coordinate.conv_h")).sigmoid()
        across = F.conv2d(columns, *at(f"{name}.coordinate.conv_w")).sigmoid()
        gated = first * down * across.transpose(2, 3)
        maps = torch.stack([second.max(1).values, second.mean(1)], 1)
        attended = second * F.conv2d(maps, *at(f"{name}.spatial.conv"), padding=1).sigmoid()
        x = x + torch.cat([gated, attended], 1)
        order = [group * 2 + k for k in range(2) for group in range(half)]  # one of each pair, then the other
        return x[:, order]

    x = layer_norm(F.conv2d(x, *at("stem.0")), "stem.1")
    for i, depth in enumerate(depths):
        down = f"stages.{i}.downsample"
        if i == 2:
            x = layer_norm(F.conv2d(x, *at(f"{down}.0"), stride=2), f"{down}.1")
        elif i:
            x = attention(layer_norm(x, f"{down}.0"), f"{down}.1")
        for j in range(depth):
            block = f"stages.{i}.blocks.{j}"
            groups = x.shape[1]
            u = batch_norm(F.conv2d(x, *at(f"{block}.conv_dw1"), padding=1, groups=groups), f"{block}.norm1")
            hidden = F.gelu(F.conv2d(u, *at(f"{block}.fc1")))
            v = u + weights[f"{block}.gamma"] * F.conv2d(hidden, *at(f"{block}.fc2"))
            x = x + batch_norm(F.conv2d(v, *at(f"{block}.conv_dw2"), padding=1, groups=groups), f"{block}.norm2")
    pooled = layer_norm(x.mean((2, 3), keepdim=True), "head.norm").flatten(1)
    return F.linear(pooled, *at("head.fc"))


def test_logits_are_those_of_the_network_written_out() -> None:
    torch.manual_seed(0)
    model = timm.create_model("conv2next_tiny", **SMALL).eval().double()
    state = model.state_dict()
    for name, value in state.items():  # so that no layer is close to an identity
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "running_var" in name else torch.randn_like(value) * 0.3)
    x = torch.randn(2, 3, 12, 10, dtype=torch.float64)
    with torch.no_grad():
        expected = reference(state, x, (1, 2, 1, 1))
        torch.testing.assert_close(model(x), expected)
    assert expected.std() > 1e-3


def test_shuffle_puts_neighbours_of_the_two_halves_apart() -> None:
    attention = MixedAttention(32).eval()
    for parameter in attention.parameters():
        torch.nn.init.zeros_(parameter)  # all gates are sigmoid(0)
    x = torch.randn(1, 32, 4, 4)
    gated = torch.cat([x[:, :16] * 1.25, x[:, 16:] * 1.5], 1)
    torch.testing.assert_close(attention(x), torch.cat([gated[:, 0::2], gated[:, 1::2]], 1))


@pytest.mark.parametrize(
    ("size", "depths", "dims"),
    [("tiny", (3, 3, 6, 3), 192), ("base", (3, 3, 9, 3), 256), ("large", (3, 3, 27, 3), 384)],
)
def test_sizes_are_the_published_ones(size: str, depths: tuple[int, ...], dims: int) -> None:
    model: Any = timm.create_model(f"conv2next_{size}", device="meta")
    assert tuple(len(stage.blocks) for stage in model.stages) == depths
    assert model.num_features == dims
    scales = [block.gamma for stage in timm.create_model("conv2next_tiny").stages for block in stage.blocks]
    assert all(torch.equal(scale, torch.full_like(scale, 1e-6)) for scale in scales)
    sugar = timm.create_model(f"conv2next_{size}_sugar", device="meta", surrogate="nelu", alpha=0.1)
    replaced = [module for module in sugar.modules() if isinstance(module, timm_sugar.SUGAR)]
    assert len(replaced) == sum(depths) + 2  # one in each block, and one in each coordinate attention
    assert sugar.state_dict().keys() == model.state_dict().keys()


def test_larger_images_take_larger_patches_and_features_keep_their_strides() -> None:
    model = timm.create_model("conv2next_tiny", patch_size=2, features_only=True, **SMALL)
    shapes = [tuple(features.shape[1:]) for features in model(torch.randn(2, 3, 64, 64))]
    assert shapes == [(16, 32, 32), (16, 32, 32), (24, 16, 16), (24, 16, 16)]
    assert model.feature_info.reduction() == [2, 2, 4, 4]


def test_intermediates_are_chosen_as_in_timm() -> None:
    model: Any = timm.create_model("conv2next_tiny", **SMALL).eval()
    x = torch.randn(2, 3, 8, 8)
    last, every = model.forward_intermediates(x)
    assert len(every) == 4
    assert torch.equal(last, every[-1])
    for indices, expected in ((2, [2, 3]), ([0, -2], [0, 2])):
        taken = model.forward_intermediates(x, indices=indices, intermediates_only=True, stop_early=True)
        assert all(torch.equal(a, every[i]) for a, i in zip(taken, expected, strict=True))
    with pytest.raises(AssertionError, match="stages are 0 to 3"):
        model.forward_intermediates(x, indices=[4])
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert torch.equal(model(x), every[1])
    assert model.num_features == 16


def test_checkpointing_changes_no_gradient() -> None:
    model: Any = timm.create_model("conv2next_tiny", **SMALL)
    x = torch.randn(2, 3, 8, 8)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.eval().zero_grad()
        model(x).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
