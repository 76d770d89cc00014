"""What `import timm_sugar` brings along."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import timm_sugar

CODE = """
import json, sys, timm
before = set(sys.modules)
import timm_sugar
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def test_import_brings_nothing_that_timm_has_not_brought() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True, check=True)
    brought = set(json.loads(done.stdout)) - set(sys.stdlib_module_names)
    assert brought == {"timm_sugar"}


def test_every_public_name_is_there_documented_and_typed() -> None:
    assert sorted(timm_sugar.__all__) == timm_sugar.__all__
    for name in set(timm_sugar.__all__) - {"__version__"}:
        assert getattr(timm_sugar, name).__doc__, name
    assert (Path(timm_sugar.__file__).parent / "py.typed").exists()


FIRST_USE = """
import torch, timm_sugar
x = torch.tensor([-1.0, 2.0], dtype=torch.float64)
s = torch.sigmoid(x)
expected = s + (x + 1.67) * s * (1 - s)
torch.testing.assert_close(torch.func.jacrev(timm_sugar.sugar)(x).diagonal(), expected)
"""


def test_the_first_use_of_all_may_be_inside_a_transform() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", FIRST_USE], capture_output=True, text=True, check=True)
