"""Diagnosis of one architecture of every family of timm's."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm
import torch
from scripting import load_script

from timm_sugar import diagnose, models
from timm_sugar._places import is_activation

FAMILIES = load_script("acceptance").FAMILIES
HEAVY = {"beit", "convmixer", "deepseek_vit", "gemma4_vit", "mobilenetv5", "naflexvit", "nasnet", "pnasnet"}
HEAVY |= {"qwen3_vit", "rdnet", "vision_transformer_sam", "xception_aligned", "volo", "davit", "hiera"}
HEAVY |= {"inception_resnet_v2"}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - HEAVY))
def test_every_family_of_timm_can_be_diagnosed(family: str) -> None:
    """As SUGAR and as it is: all activation modules that ran are there, with all numbers."""
    base = FAMILIES[family].split()[0]
    for name in (base, base + models.SUFFIX):
        if models.is_left_out(base) and name != base:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the base models, about themselves
            model: Any = timm.create_model(name, num_classes=2)
        images = torch.randn(2, *model.pretrained_cfg["input_size"])
        ran: list[str] = []
        hooks = [
            module.register_forward_hook(lambda m, x, y, key=key, ran=ran: ran.append(key))
            for key, module in model.named_modules()
            if is_activation(module)
        ]
        with torch.no_grad():
            model.eval()(images)
        for hook in hooks:
            hook.remove()
        if not ran:
            continue
        report = diagnose(model, [(images, torch.tensor([0, 1]))])
        assert {key.partition("#")[0] for key in report.layers} == set(ran)
        assert len(report.layers) == len(ran)
        for row in report.rows()[:-1]:
            for key in ("dead", "dormant", "zeros"):
                assert 0 <= row[key] <= 1, (row, key)
            assert row["spread"] >= 0, row
