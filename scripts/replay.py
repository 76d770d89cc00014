#!/usr/bin/env python3
"""Replay faults that were reported of other projects on SUGAR, each with its source, and say which of them it has.

    python scripts/replay.py              # a line for each case, and results/replay.csv
    python scripts/replay.py hessian      # the cases whose text has this word

Exit status 1 if a case goes wrong. Gradients are compared with formulas in float64.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lab.cli import Parser
from lab.files import environment, write_rows
from torch import Tensor, nn

import timm_sugar
from timm_sugar import SUGAR, sugar, sugarize

RESULTS = Path(__file__).resolve().parents[1] / "results" / "replay.csv"
COLUMNS = ("source", "case", "outcome", "device", "torch", "timm", "timm_sugar", "command")
ALPHA = 1.67


@dataclass(frozen=True)
class Case:
    """A reported fault: where it was reported, what goes wrong there, and a function that raises if it does here."""

    source: str  # owner/repository#number
    what: str
    check: Callable[[], None]


CASES: list[Case] = []


def case(source: str, what: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Add the decorated function to CASES, once for each of the sources that a comma separates."""

    def add(check: Callable[[], None]) -> Callable[[], None]:
        CASES.extend(Case(one.strip(), what, check) for one in source.split(","))
        return check

    return add


def slope(x: Tensor) -> Tensor:
    """B-SiLU's derivative (arXiv 2505.22074, eq. 8)."""
    s = torch.sigmoid(x)
    return s + (x + ALPHA) * s * (1 - s)


def curvature(x: Tensor) -> Tensor:
    """B-SiLU's second derivative."""
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + (x + ALPHA) * (1 - 2 * s))


def points() -> Tensor:
    """Where gradients are compared: no 0, both signs."""
    return torch.tensor([-2.5, -0.5, 0.3, 1.0], dtype=torch.float64)


def same(found: Tensor | None, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Raise AssertionError unless two tensors are there and close."""
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def square_hessian(x: Tensor) -> Tensor:
    """The second derivative of sugar(x)^2: 2 s'^2 + 2 relu(x) s''."""
    return 2 * slope(x) ** 2 + 2 * x.relu() * curvature(x)


@case("pytorch/pytorch#128600, pytorch/pytorch#78961", "forward mode under no_grad has another derivative")
def _no_grad() -> None:
    x = points()
    with torch.no_grad():
        same(torch.func.jvp(sugar, (x,), (torch.ones_like(x),))[1], slope(x))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            same(torch.autograd.forward_ad.unpack_dual(sugar(dual)).tangent, slope(x))


@case("pytorch/pytorch#197867, pytorch/pytorch#192540", "nested forward mode loses the second derivative")
def _nested_forward() -> None:
    x = points()
    f = lambda t: sugar(t).square().sum()  # noqa: E731
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        for inner in (torch.func.jacfwd, torch.func.jacrev):
            same(outer(inner(f))(x).diagonal(), square_hessian(x))


@case("pytorch/pytorch#122198", "torch.func.hessian of a custom Function is zero")
def _hessian() -> None:
    x = points()
    same(torch.func.hessian(lambda t: sugar(t).square().sum())(x).diagonal(), square_hessian(x))
    same(torch.func.hessian(lambda t: sugar(t).sum())(x).diagonal(), curvature(x))


@case("pytorch/pytorch#18619", "a second derivative that is asked for twice differs")
def _twice() -> None:
    x = points().requires_grad_()
    y = sugar(x).square().sum()
    for _ in range(2):
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, retain_graph=True)
        same(second, square_hessian(x.detach()))


@case("pytorch/pytorch#99523, pytorch/pytorch#76185", "what a Function keeps is missing in the second derivative")
def _kept() -> None:
    x = points().requires_grad_()
    (first,) = torch.autograd.grad(sugar(x).sum(), x, create_graph=True)
    same(torch.autograd.grad(first.sum(), x)[0], curvature(x.detach()))


@case("pytorch/pytorch#193279", "torch.func.grad inside torch.compile fails on saved tensors")
def _func_in_compile() -> None:
    x = points()
    compiled = torch.compile(torch.func.grad(lambda t: sugar(t).square().sum()), backend="aot_eager")
    same(compiled(x), 2 * x.relu() * slope(x))


@case("pytorch/pytorch#94701", "a nested or sparse tensor crashes in the backward pass")
def _layouts() -> None:
    try:
        x = points().diag().to_sparse().requires_grad_()
        torch.sparse.sum(sugar(x)).backward()
    except TypeError:  # one clear error, in the forward pass
        return
    assert x.grad is not None
    same(x.grad.to_dense().diagonal(), slope(points()))


@case("pytorch/pytorch#1926, NVIDIA/Megatron-LM#97", "a value written past autograd's sight spoils the next gradient")
def _data() -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    h = x @ a
    y = sugar(h)
    y.detach().mul_(0.5)  # as a collective would
    sugar(y @ b).sum().backward()
    same(b.grad, (0.5 * h.relu()).detach().t() @ slope((0.5 * h.relu() @ b).detach()))


@case("itayhubara/BinaryNet.pytorch#9, itayhubara/BinaryNet.pytorch#25", "a straight-through estimator through .data")
def _straight_through() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(256, 300), torch.randn(300, 300, requires_grad=True)
    for _ in range(20):
        y = sugar(x @ torch.eye(300).requires_grad_())
        y.data = y.data.sign()
        w = weight.detach().clamp(-1, 1).requires_grad_()
        z = y @ w
        sugar(z).sum().backward()
        same(w.grad, y.detach().t() @ slope(z.detach()), 1e-3)


@case("pytorch/pytorch#136833", "threads that compile at once break each other's")
def _threads() -> None:
    x = torch.linspace(-4, 4, 1 << 18, dtype=torch.float32)

    def gradient(_: int) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(sugar(leaf).sum(), leaf)[0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in pool.map(gradient, range(8)):
            same(found, slope(x), 1e-5)


class _Block(nn.Module):
    """A residual block whose first ReLU overwrites what the shortcut adds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        out = self.conv(x)
        return out + x


@case(
    "rosinality/vq-vae-2-pytorch#60, pytorch/pytorch#5687, iduta/iresnet#2, osmr/imgclsmob#13",
    "an in-place ReLU changes the shortcut; once it is exchanged, the model computes something else",
)
def _shortcut() -> None:
    torch.manual_seed(0)
    model, x = _Block(), torch.randn(3, 4)
    expected = copy.deepcopy(model)(x)
    sugarize(model, example=x)
    assert torch.equal(model(x), expected)
    assert torch.equal(timm_sugar.to_relu(model)(x), expected)


class _Shared(nn.Module):
    default_act = nn.SiLU()  # of the class, shared by all of its instances

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), self.default_act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.b(self.act(self.a(x))))


@case("ultralytics/ultralytics#6014, ultralytics/yolov5#3013", "SiLU is replaced in the code and stays in the model")
def _default_act() -> None:
    model = sugarize(nn.Sequential(_Shared(), _Shared()))
    assert not [m for m in model.modules() if isinstance(m, nn.SiLU)]
    assert model[0].act is model[1].act


@case("huggingface/pytorch-image-models#1967", "act_layer doesn't reach all activations of FastViT")
def _fastvit() -> None:
    model: Any = timm.create_model("fastvit_t8_sugar", num_classes=2, device="meta")
    assert not [m for m in model.modules() if isinstance(m, (nn.GELU, nn.ReLU, nn.SiLU))]
    assert [m for m in model.modules() if isinstance(m, SUGAR)]


@case(
    "qualcomm/aimet#1327, pytorch/pytorch#158012", "nn.TransformerEncoderLayer's fast path computes another activation"
)
def _transformer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=F.gelu, batch_first=True, dtype=torch.float64)
    layer = sugarize(layer).eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        same(layer(x), layer.train()(x))


@case("meta-pytorch/captum#578, meta-pytorch/captum#914", "backward hooks fail on a reused or in-place activation")
def _hooks() -> None:
    act, seen = nn.ReLU(inplace=True), []
    model = sugarize(nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act).double())
    model[1].register_full_backward_hook(lambda _m, grad_in, _out: seen.append(grad_in[0]))
    model(torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    assert len(seen) == 2


@case("meta-pytorch/captum#1082", "attributions are not those of the deployed network")
def _attributions() -> None:
    """Integrated gradients add up to the difference of the outputs with ReLU's own gradient."""
    torch.manual_seed(0)
    model = sugarize(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)).double())
    x, steps = torch.randn(1, 4, dtype=torch.float64), 20_000
    way = (torch.linspace(0, 1, steps, dtype=torch.float64)[:, None] * x).requires_grad_()
    with timm_sugar.relu_gradient():
        (gradient,) = torch.autograd.grad(model(way).sum(), way)
    attributed = (x * gradient.mean(0)).sum()
    same(attributed, (model(x) - model(torch.zeros_like(x))).sum().detach(), 1e-3)


@case("huggingface/transformers#16874, Unbabel/COMET#189", "an activation chosen by a name of a table is not exchanged")
def _table() -> None:
    table: dict[str, Any] = {"gelu": F.gelu, "tanh": nn.Tanh()}

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.gate = table["gelu"], table["tanh"]

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x)

    model = sugarize(Chosen())
    assert torch.equal(model(points()), points().relu())
    assert isinstance(model.gate, nn.Tanh)


def replay(word: str = "") -> list[dict[str, Any]]:
    """Run the cases whose source or text has a word; a row of results for each."""
    rows = []
    for one in CASES:
        if word.lower() in f"{one.source} {one.what}".lower():
            try:
                one.check()
                outcome = "right"
            except Exception as error:  # whatever goes wrong is the outcome
                outcome = f"wrong: {type(error).__name__}: {' '.join(str(error).split())[:80]}"
            rows.append({"source": one.source, "case": one.what, "outcome": outcome, **environment("cpu")})
            rows[-1]["command"] = "python scripts/replay.py"
            print(f"{outcome:6} {one.source:40} {one.what}", flush=True)
    return rows


def run(args: argparse.Namespace) -> None:
    """Replay, say how many went wrong, and keep the rows of all cases."""
    rows = replay(args.word)
    wrong = sum(row["outcome"] != "right" for row in rows)
    print(f"{len(rows)} cases, {wrong} wrong")
    if not args.word:
        write_rows(args.results, rows, COLUMNS)
    args.wrong = wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if a case went wrong, 130 after Ctrl-C."""
    parser = Parser("replay.py", description=__doc__)
    parser.add_argument("word", nargs="?", default="", metavar="WORD", help="of the source or the text (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="(default: results/replay.csv)")
    status = {"wrong": 0}

    def do(args: argparse.Namespace) -> None:
        run(args)
        status["wrong"] = args.wrong

    return parser.run(do, argv) or int(status["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
