"""Private names of PyTorch's: without any one of them the gradient stays the formula's, or an error says so."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import timm_sugar
from timm_sugar import _torch

CALLS = [
    [argument.value for argument in node.args]  # type: ignore[attr-defined]
    for node in ast.walk(ast.parse(Path(_torch.__file__).read_text()))
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("_find", "_which")
    if all(isinstance(argument, ast.Constant) for argument in node.args)
]
NAMES = sorted(",".join(paths) for paths in CALLS)  # each with what other releases call it

PROGRAM = """
import builtins, importlib, json, logging, sys
import torch
hidden, calls = sys.argv[1], json.loads(sys.argv[2])
def find(path):
    owner, found, name = None, torch, ""
    for name in path.split("."):
        if not hasattr(found, name):
            importlib.import_module(f"{found.__name__}.{name}")
        owner, found = found, getattr(found, name)
    return owner, name
def is_there(path):
    try:
        return bool(find(path))
    except (AttributeError, ImportError):
        return False
absent = {paths[0] for paths in calls if not any(map(is_there, paths))}  # from this release
gone = [find(path) for path in hidden.split(",") if path and is_there(path)]  # as only timm_sugar sees it
get, has = builtins.getattr, builtins.hasattr
def is_gone(owner, name):
    looks = sys._getframe(2).f_code.co_filename.endswith("_torch.py")
    return looks and any(owner is one and name == other for one, other in gone)
def hiding_getattr(owner, name, *default):
    if not is_gone(owner, name):
        return get(owner, name, *default)
    raise AttributeError(name)
def hiding_import(name, package=None):
    if name.removeprefix("torch.") in hidden.split(","):
        raise ImportError(name)
    return import_module(name, package)
import_module = importlib.import_module
if hidden:
    builtins.getattr, importlib.import_module = hiding_getattr, hiding_import
    builtins.hasattr = lambda owner, name: not is_gone(owner, name) and has(owner, name)
lines = []
class Lines(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("timm_sugar").addHandler(Lines())
import timm_sugar
from timm_sugar import _saved_tensors, _torch
for find_later in (_torch._compiler, _torch._refuses_duals, _torch._dynamo_guard):
    find_later()
builtins.getattr, builtins.hasattr, importlib.import_module = get, has, import_module
assert set(_torch.missing) == absent | ({hidden.split(",")[0]} if hidden else set()), _torch.missing
assert len([line for line in lines if "works without" in line]) == len(_torch._lost), lines
_saved_tensors._LEAST = 0

from timm_sugar import _compiled
assert (_torch._compiler() is None) == any("fast gradient" in line for line in lines if "_dispatch_keys" not in line)
if _torch._compiler() is None or not hidden:
    _compiled._CHUNK = _compiled._WORTHWHILE = 7  # all that follows is large enough to be compiled
net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
try:
    timm_sugar.sugarize(net, example=torch.zeros(1, 4))
except RuntimeError as error:
    assert None in (_torch.TorchDispatchMode, _torch.tree_leaves, _torch.tree_map) and "example" in str(error), error
    timm_sugar.sugarize(net)
assert isinstance(net[1], timm_sugar.SUGAR)

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
        assert hidden or absent or (what.startswith("dual") and not _torch._refuses_duals()), error
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
import torch.autograd.forward_ad as forward_ad
def dual(call):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(X, torch.ones_like(X)))).tangent
attempt("dual eager", lambda: dual(f), slope(X))
for name, call in {"compiled": f, "compiled graph": graph}.items():
    call = torch.compile(call, backend="aot_eager")
    call(X)
    attempt(f"dual {name}", lambda: dual(call), slope(X))
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
    "_VF._unpack_dual",
}


QUICK = [""]  # the others take minutes


@pytest.mark.parametrize(
    "hidden", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in QUICK)]
)
def test_without_a_private_name_the_gradient_is_the_formulas(hidden: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-W", "ignore", str(program), hidden, json.dumps(CALLS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    raised = {line.removeprefix("raises ").rpartition(" ")[0] for line in done.stdout.splitlines() if "raises" in line}
    if not _torch._refuses_duals() or hidden == "_dynamo.variables.builder":
        raised -= {"dual compiled", "dual compiled graph"}
    if hidden not in TRANSFORMS:
        assert not raised
    else:
        assert raised.isdisjoint({"grad eager", "vmap eager", "second eager", "compiled", "autograd eager"}), raised


def test_private_names_stand_in_one_file() -> None:
    folder = Path(timm_sugar.__file__).parent
    files = set(folder.rglob("*.py")) - {folder / "_torch.py"}
    assert len(files) > 12
    for file in sorted(files):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.startswith("torch")]
            elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
                names = [ast.unparse(node)]
            elif isinstance(node, ast.Attribute) and node.attr in ("_cdata", "_base", "_forward_hooks"):
                names = [f"torch.{node.attr}"]
            private = [name for name in names if "._" in name and "__" not in name]
            assert not private, (file.name, private)
