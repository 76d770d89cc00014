"""Conv2NeXt (Feng, Tan, Li and Xie, CAIT 2022): a ConvNeXt for images of 32 x 32 pixels, which timm lacks.

Registered as timm's own models are: `conv2next_tiny`, `conv2next_base` and `conv2next_large`. One of the four networks
on which SUGAR was tried (arXiv 2505.22074).

TorchScript reads the types, so there is no `from __future__ import annotations` in this file.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from timm.layers import (
    DropPath,
    LayerNorm2d,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    get_act_layer,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from torch import Tensor, nn


class CoordinateAttention(nn.Module):
    """Scales each channel by row and by column (Hou et al. 2021, arXiv 2103.02907). (B, C, H, W) to the same."""

    def __init__(self, dim: int, reduction: int = 2) -> None:
        super().__init__()
        hidden = max(8, dim // reduction)
        self.conv = nn.Conv2d(dim, hidden, 1)
        self.norm = nn.BatchNorm2d(hidden)
        self.act = nn.Hardswish()
        self.conv_h = nn.Conv2d(hidden, dim, 1)
        self.conv_w = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)
        gates = self.act(self.norm(self.conv(torch.cat([rows, columns], 2))))
        h, w = gates.split([x.shape[2], x.shape[3]], 2)
        return x * self.conv_h(h).sigmoid() * self.conv_w(w.transpose(2, 3)).sigmoid()


class SpatialAttention(nn.Module):
    """Scales each position (CBAM, Woo et al. 2018, arXiv 1807.06521). (B, C, H, W) to the same."""

    def __init__(self, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)).sigmoid()


class MixedAttention(nn.Module):
    """Coordinate attention on one half of the channels, spatial attention on the other, then the halves interleaved."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.coordinate = CoordinateAttention(dim // 2)
        self.spatial = SpatialAttention()

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        x = x + torch.cat([self.coordinate(a), self.spatial(b)], 1)
        return x.unflatten(1, (x.shape[1] // 2, 2)).transpose(1, 2).flatten(1, 2)


class Block(nn.Module):
    """Depthwise convolution, inverted bottleneck with layer scale, depthwise convolution; all in one residual."""

    def __init__(self, dim: int, drop_path: float, act_layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv_dw1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.fc1 = nn.Conv2d(dim, 4 * dim, 1)
        self.act = act_layer()
        self.fc2 = nn.Conv2d(4 * dim, dim, 1)
        self.gamma = nn.Parameter(torch.full((dim, 1, 1), 1e-6))
        self.conv_dw2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm1(self.conv_dw1(x))
        v = u + self.gamma * self.fc2(self.act(self.fc1(u)))
        return x + self.drop_path(self.norm2(self.conv_dw2(v)))


class Stage(nn.Module):
    """A transition (`downsample`) and blocks."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class Conv2NeXt(nn.Module):
    """Images (B, in_chans, H, W) to logits (B, num_classes).

    `patch_size` is the stride of the stem: 1 for 32 x 32 pixels, 2 for 64 x 64. The resolution is halved once, between
    the second and the third stage.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: tuple[int, ...] = (3, 3, 6, 3),
        dims: tuple[int, ...] = (96, 96, 192, 192),
        patch_size: int = 1,
        act_layer: str | Callable[[], nn.Module] = "gelu",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        act: Any = get_act_layer(act_layer)
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], patch_size, stride=patch_size), LayerNorm2d(dims[0]))
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages: list[nn.Module] = []
        self.feature_info: list[dict[str, Any]] = []
        for i, dim in enumerate(dims):
            downsample: nn.Module = nn.Identity()
            if i == 2:
                downsample = nn.Sequential(nn.Conv2d(dims[1], dim, 2, stride=2), LayerNorm2d(dim))
            elif i:
                downsample = nn.Sequential(LayerNorm2d(dim), MixedAttention(dim))
            stages.append(Stage(downsample, [Block(dim, rate, act) for rate in rates[i]]))
            reduction = patch_size * (2 if i >= 2 else 1)
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = dims[-1]
        self.head = NormMlpClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.apply(_init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the names of parameters, from the stem to the head, as timm's optimizers ask for them."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        stage: Any
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer with random weights; none for 0 classes."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def _take(self, indices: int | list[int] | None) -> list[int]:
        """Indices of stages, counted from the first: all for None, the last n for an int."""
        count = len(self.stages)
        chosen = range(count)[-indices:] if isinstance(indices, int) else range(count) if indices is None else indices
        assert all(-count <= i < count for i in chosen), f"stages are 0 to {count - 1}, not {indices}"
        return [i % count for i in chosen]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Feature maps of the stages at `indices` (the last n for an int), and the last one unless they alone are asked
        for. `norm` has no effect, since the final norm stands behind the pooling."""
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take = self._take(indices)
        last = max(take)
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages behind the last of `indices`, and the head; returns the indices that were kept."""
        take = self._take(indices)
        last = max(take)
        pruned = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or pruned:
            self.head.norm = nn.Identity()
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the feature map (B, C, H, W) before pooling."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """That feature map to logits, or to what the last layer gets."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_CFG = {
    **{"url": "", "num_classes": 1000, "input_size": (3, 32, 32), "pool_size": (16, 16), "crop_pct": 1.0},
    **{"interpolation": "bicubic", "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)},
    **{"first_conv": "stem.0", "classifier": "head.fc"},
}
default_cfgs = generate_default_cfgs({f"conv2next_{size}.untrained": _CFG for size in ("tiny", "base", "large")})


def _create(name: str, pretrained: bool, device: Any = None, dtype: Any = None, **kwargs: Any) -> Conv2NeXt:
    feature_cfg = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    with torch.device(device) if device else nullcontext():
        model: Any = build_model_with_cfg(Conv2NeXt, name, pretrained, feature_cfg=feature_cfg, **kwargs)
    return model.to(dtype=dtype)


@register_model
def conv2next_tiny(pretrained: bool = False, **kwargs: Any) -> Conv2NeXt:
    """Conv2NeXt with 15 blocks of 96 and 192 channels."""
    return _create("conv2next_tiny", pretrained, **kwargs)


@register_model
def conv2next_base(pretrained: bool = False, **kwargs: Any) -> Conv2NeXt:
    """Conv2NeXt with 18 blocks of 128 and 256 channels."""
    shape = {"depths": (3, 3, 9, 3), "dims": (128, 128, 256, 256)}
    return _create("conv2next_base", pretrained, **{**shape, **kwargs})


@register_model
def conv2next_large(pretrained: bool = False, **kwargs: Any) -> Conv2NeXt:
    """Conv2NeXt with 36 blocks of 196 and 384 channels."""
    shape = {"depths": (3, 3, 27, 3), "dims": (196, 196, 384, 384)}
    return _create("conv2next_large", pretrained, **{**shape, **kwargs})
