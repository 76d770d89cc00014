"""A pytest plugin that points timm's own tests, from its sdist, at SUGAR models: `pytest -p timm_plugin ...`.

Its tests run over what timm.list_models() returns. This narrows that to the architectures in TIMM_SUGAR_BASES (base
names, separated by commas), each with TIMM_SUGAR_SUFFIX: `_sugar`, or nothing to see how the base models fare.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import timm

import timm_sugar  # noqa: F401  registers the models

BASES = set(os.environ["TIMM_SUGAR_BASES"].split(","))
SUFFIX = os.environ["TIMM_SUGAR_SUFFIX"]
NEEDS_NETWORK = ("test_model_inference", "test_model_load_pretrained", "test_model_features_pretrained")

_list_models = timm.list_models


def list_models(*args: Any, **kwargs: Any) -> list[str]:
    """timm.list_models, asked about base models, for those in BASES; so filters and modules mean what they say."""
    parts = (full.partition(".") for full in _list_models(*args, **kwargs))
    return [base + SUFFIX + dot + tag for base, dot, tag in parts if base in BASES]


def list_pretrained(*args: Any, **kwargs: Any) -> list[str]:
    """timm.list_pretrained, narrowed to nothing: pretrained weights would need the network."""
    return []


timm.list_models = timm.models.list_models = list_models
timm.list_pretrained = timm.models.list_pretrained = list_pretrained


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that take one of our models; the others are about base models that timm names in its tests."""
    chosen, rest = [], []
    for item in items:
        callspec = getattr(item, "callspec", None)
        name = str(callspec.params.get("model_name", "")) if callspec else ""
        ours = name.partition(".")[0] in {base + SUFFIX for base in BASES}
        by_network = getattr(item, "originalname", "") in NEEDS_NETWORK
        (chosen if ours and not by_network else rest).append(item)
    items[:] = chosen
    config.hook.pytest_deselected(items=rest)
