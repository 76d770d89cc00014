"""Private names of PyTorch's: without any one of them the gradient stays the formula's, or an error says so."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import timm_sugar
from timm_sugar import _torch

NAMES = sorted(
    node.args[0].value  # type: ignore[attr-defined]
    for node in ast.walk(ast.parse(Path(_torch.__file__).read_text()))
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_find"
)

PROGRAM = """
import importlib, logging, sys
import torch
hidden = sys.argv[1]
if hidden:
    path = hidden.split(".")
    owner = torch
    for name in path[:-1]:
        owner = getattr(owner, name) if hasattr(owner, name) else importlib.import_module(f"{owner.__name__}.{name}")
    if not hasattr(owner, path[-1]):
        importlib.import_module(f"{owner.__name__}.{path[-1]}")

    class Missing:  # a module or a type that lacks the name, as only timm_sugar sees it
        def __init__(self, of):
            self.of, self.__name__ = of, getattr(of, "__name__", "")
        def __getattr__(self, name):
            if name == path[-1]:
                raise AttributeError(name)
            return getattr(self.of, name)

    import builtins
    get, has, stand_in = builtins.getattr, builtins.hasattr, Missing(owner)
    def looks(*arguments):
        return sys._getframe(2).f_code.co_filename.endswith("_torch.py") and arguments[0] is owner
    builtins.getattr = lambda *a: get(stand_in, *a[1:]) if looks(*a) and a[1] == path[-1] else get(*a)
    builtins.hasattr = lambda o, n: False if looks(o) and n == path[-1] else has(o, n)
lines = []
class Lines(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("timm_sugar").addHandler(Lines())
import timm_sugar
from timm_sugar import _saved_tensors, _torch
if hidden:
    builtins.getattr, builtins.hasattr = get, has
assert _torch.missing == ([hidden] if hidden else []), _torch.missing
assert len([line for line in lines if "works without" in line]) == len(_torch.missing), lines
_saved_tensors._LEAST = 0

X = torch.linspace(-3, 3, 12, dtype=torch.float64).view(3, 4)
def slope(x):
    s = torch.sigmoid(x)
    return s + (x + 1.67) * s * (1 - s)
def check(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
for save_memory in (False, True):
    f = timm_sugar.SUGAR(save_memory=save_memory)
    leaf = X.clone().requires_grad_()
    w = torch.eye(4, dtype=torch.float64).requires_grad_()
    z = f(f(leaf * 1) @ w)
    a, b = torch.autograd.grad(z.sum(), (leaf, w))
    y = torch.relu(X)
    check(a, slope(y) * slope(X))
    check(b, y.T @ slope(y))
f = timm_sugar.SUGAR()
second = torch.autograd.grad(slope(leaf).sum(), leaf)[0]
hessian = 2 * (slope(X).square() + torch.relu(X) * second)
def attempt(what, call, expected):
    try:
        got = call()
    except Exception as error:
        assert hidden, error
        print("raises", what, type(error).__name__)
    else:
        check(got, expected)
        print("right", what)
loss = lambda t: f(t).square().sum()
graph = torch.fx.symbolic_trace(f)
for name, call in {"eager": f, "graph": graph}.items():
    square = lambda t, c=call: c(t).square().sum()
    attempt(f"grad {name}", lambda: torch.func.grad(square)(X), 2 * torch.relu(X) * slope(X))
    attempt(f"vmap {name}", lambda: torch.func.vmap(torch.func.grad(square))(X), 2 * torch.relu(X) * slope(X))
    attempt(f"second {name}", lambda: torch.func.grad(lambda t: torch.func.grad(square)(t).sum())(X), hessian)
    attempt(f"jvp {name}", lambda: torch.func.jvp(call, (X,), (torch.ones_like(X),))[1], slope(X))
    with torch.no_grad():
        attempt(f"jvp no_grad {name}", lambda: torch.func.jvp(call, (X,), (torch.ones_like(X),))[1], slope(X))
    attempt(f"autograd {name}", lambda: torch.autograd.grad(square(leaf), leaf)[0], 2 * torch.relu(X) * slope(X))
compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
attempt("compiled", lambda: torch.autograd.grad(compiled(leaf).sum(), leaf)[0], slope(X))
def decomposed():
    module = torch.export.export(f, (X,)).run_decompositions().module()
    return torch.autograd.grad(module(leaf).sum(), leaf)[0]
attempt("decomposed", decomposed, slope(X))
from torch.fx.experimental.proxy_tensor import make_fx
attempt("make_fx", lambda: torch.autograd.grad(make_fx(f)(X)(leaf).sum(), leaf)[0], slope(X))
with torch.no_grad():
    assert torch.equal(f(X), torch.relu(X))
"""

TRANSFORMS = {
    "autograd.function._SingleLevelFunction",
    "_functorch.utils.enable_single_level_autograd_function",
    "_C._are_functorch_transforms_active",
    "_C._AutoDispatchBelowAutograd",
    "autograd.forward_ad._set_fwd_grad_enabled",
}


QUICK = ["", "_C._autograd.SavedTensor.data"]  # the others take minutes


@pytest.mark.parametrize(
    "hidden", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in QUICK)]
)
def test_without_a_private_name_the_gradient_is_the_formulas(hidden: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-W", "ignore", str(program), hidden]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    raised = {line.removeprefix("raises ").rpartition(" ")[0] for line in done.stdout.splitlines() if "raises" in line}
    if hidden not in TRANSFORMS:
        assert not raised
    else:
        assert raised.isdisjoint({"grad eager", "vmap eager", "second eager", "compiled", "autograd eager"}), raised


def test_private_names_stand_in_one_file() -> None:
    folder = Path(timm_sugar.__file__).parent
    for name in ("activation", "surrogate", "_operator", "_saved_tensors"):
        file = folder / f"{name}.py"
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                private = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                assert not any(name.startswith("_") for name in private), (file.name, private)
            if isinstance(node, ast.Attribute):
                assert not ast.unparse(node).startswith(("torch._", "torch.autograd._")), (file.name, ast.unparse(node))
