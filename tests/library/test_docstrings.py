"""Docstrings of public names: each has an example, which runs and prints what it says."""

from __future__ import annotations

import doctest
import inspect
from typing import Any

import pytest
import timm
import torch
from torch import nn

import timm_sugar
from timm_sugar import surrogate

PUBLIC = [name for name in timm_sugar.__all__ if callable(getattr(timm_sugar, name))]
DOCUMENTED = {name: getattr(timm_sugar, name) for name in PUBLIC}
DOCUMENTED["SUGAR.set_surrogate"] = timm_sugar.SUGAR.set_surrogate


@pytest.mark.parametrize("name", DOCUMENTED)
def test_example_of_a_public_name_prints_what_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surrogate, "_surrogates", dict(surrogate._surrogates))  # an example registers one
    text = inspect.getdoc(DOCUMENTED[name]) or ""
    names: dict[str, Any] = {"torch": torch, "nn": nn, "timm": timm, "timm_sugar": timm_sugar}
    example = doctest.DocTestParser().get_doctest(text.partition("Example:")[2], names, name, None, None)
    assert example.examples
    said: list[str] = []
    assert doctest.DocTestRunner().run(example, out=said.append).failed == 0, "".join(said)
