"""`sugarize` and `to_relu`: what is replaced, what never, what is kept, and that outputs and gradients are right."""

from __future__ import annotations

import copy
import functools
import pickle
from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers.activations as timm_layers
import timm.layers.activations_me as timm_layers_me
import torch
import torch.nn.functional as F
import torchvision
from fgi import FGI, inject, slope
from timm.models.nfnet import GammaAct
from torch import Tensor, nn

from timm_sugar import (
    SUGAR,
    get_surrogate,
    list_activations,
    replace_activations,
    set_surrogate,
    sugar,
    sugarize,
    sugarized,
    to_relu,
)
from timm_sugar._places import find_places
from timm_sugar.activation import FunctionalSUGAR

JIT_IS_DEPRECATED = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
HIDDEN = [
    *[nn.ReLU, nn.ReLU6, nn.RReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish],
    functools.partial(nn.GELU, approximate="tanh"),
    *[timm_layers.Swish, timm_layers.Mish, timm_layers.HardSwish, timm_layers.HardMish],
    *[timm_layers.GELU, timm_layers.GELUTanh, timm_layers.QuickGELU],
    *[timm_layers_me.SwishMe, timm_layers_me.MishMe, timm_layers_me.HardSwishMe, timm_layers_me.HardMishMe],
]
NEVER = [
    *[nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Hardtanh, nn.Softmax, nn.LogSoftmax, nn.PReLU, nn.GLU],
    *[nn.Identity, nn.LogSigmoid, nn.Softsign, nn.Threshold, nn.Tanhshrink],
    *[timm_layers.Sigmoid, timm_layers.HardSigmoid, timm_layers.Tanh, timm_layers.PReLU],
    timm_layers_me.HardSigmoidMe,
]
FUNCTIONS = [
    *[F.relu, torch.relu, F.relu6, F.rrelu, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish],
    *[torch.relu_, torch.selu, torch.celu, torch.rrelu, F.relu_, F.leaky_relu_, F.elu_],
    *[timm_layers.swish, timm_layers.mish, timm_layers.hard_swish, timm_layers.hard_mish],
    *[timm_layers.gelu, timm_layers.gelu_tanh, timm_layers.quick_gelu],
    *[timm_layers_me.swish_me, timm_layers_me.mish_me, timm_layers_me.hard_swish_me, timm_layers_me.hard_mish_me],
]
NEVER_FUNCTIONS = [
    *[torch.sigmoid, F.sigmoid, F.hardsigmoid, torch.tanh, F.tanh, F.softmax, F.softplus, F.prelu, F.glu],
    *[timm_layers.sigmoid, timm_layers.hard_sigmoid, timm_layers.tanh],
]


def name_of(kind: Any) -> str:
    if isinstance(kind, functools.partial):
        return f"partial_{kind.func.__name__}"
    return f"{kind.__module__ or 'torch'}.{kind.__name__}"


def build(kind: Any) -> nn.Module:
    return kind(0.1, 0.0) if kind is nn.Threshold else kind()


class Net(nn.Module):
    """A user's own network: a module, a gate, and a function kept as an attribute."""

    def __init__(self, act_fn: Callable[..., Tensor] = F.gelu) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.act = nn.SiLU()
        self.gate = nn.Sigmoid()
        self.act_fn = act_fn

    def forward(self, x):  # type: ignore[no-untyped-def]  # torch 2.6 and 2.8 pickle no graph with types as strings
        x = self.act(self.first(x))
        x = self.act_fn(self.second(x)) * self.gate(x)
        return self.last(x)


def net(*arguments: Any) -> Net:
    torch.manual_seed(0)
    return Net(*arguments).double()


def net_input() -> Tensor:
    return 2 * torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def report(model: nn.Module, *arguments: Any, **options: Any) -> dict[str, str]:
    """What `sugarize` replaced: type by name."""
    before = {place.name: place for place in find_places(model)}
    kinds = list_activations(model)
    nodes = {name: place.key.target for name, place in before.items() if isinstance(place.key, torch.fx.Node)}
    assert sugarize(model, *arguments, **options) is model
    after = {place.name: place.activation for place in find_places(model)}
    return {
        name: kinds[name]
        for name, place in before.items()
        if (place.key.target is not nodes[name] if name in nodes else after[name] is not place.activation)
    }


# --- which types


@pytest.mark.parametrize("kind", HIDDEN, ids=name_of)
def test_hidden_activation_is_replaced(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), build(kind))
    original = type(model[1]).__name__
    assert report(model) == {"1": original}
    assert type(model[1]) is SUGAR


@pytest.mark.parametrize("kind", NEVER, ids=name_of)
def test_gate_is_never_replaced(kind: Any) -> None:
    model = nn.Sequential(OrderedDict(gate=build(kind), act=nn.ReLU()))
    gate = model.gate
    assert report(model) == {"act": "ReLU"}
    assert model.gate is gate
    with pytest.raises(ValueError, match="nothing to replace"):
        sugarize(nn.Sequential(build(kind)))


@pytest.mark.parametrize("function", FUNCTIONS, ids=name_of)
@pytest.mark.parametrize("partial", [False, True])
def test_function_kept_as_an_attribute_is_replaced(function: Callable[..., Tensor], partial: bool) -> None:
    model = net(functools.partial(function) if partial else function)
    name = getattr(function, "__name__", "")
    assert report(model, filter_fn=lambda _, place: place == "act_fn") == {"act_fn": name}
    x = torch.tensor([-1.5, 2.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(model.act_fn(x, inplace=True).sum(), x)
    torch.testing.assert_close(grad, slope(x))
    assert type(model.act_fn) is FunctionalSUGAR


@pytest.mark.parametrize("function", NEVER_FUNCTIONS, ids=name_of)
def test_function_that_is_a_gate_is_never_replaced(function: Callable[..., Tensor]) -> None:
    model = net(function)
    assert report(model) == {"act": "SiLU"}
    assert model.act_fn is function


def test_subclass_of_an_activation_that_may_compute_something_else_is_left() -> None:
    class Doubled(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="nothing to replace"):
        sugarize(nn.Sequential(Doubled()))


# --- what a user's own model becomes


def test_own_model_computes_relu_and_has_the_surrogates_gradient() -> None:
    model, x = net(), net_input()
    replaced = report(model, "nelu", alpha=0.3)
    assert replaced == {"act": "SiLU", "act_fn": "gelu"}
    assert type(model.gate) is nn.Sigmoid
    oracle = net()
    oracle.act = FGI("nelu", alpha=0.3)
    oracle.act_fn = FGI("nelu", alpha=0.3)
    torch.testing.assert_close(gradients(model, x), gradients(oracle, x), rtol=1e-10, atol=1e-12)
    relu = net(F.relu)
    relu.act = nn.ReLU()
    assert torch.equal(model(x), relu(x))


def test_weights_and_their_names_stay() -> None:
    model = net()
    before = {name: id(p) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    sugarize(model)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys


def test_shared_instance_is_replaced_once_and_everywhere() -> None:
    act = nn.ReLU(inplace=True)
    block = nn.Sequential(nn.Linear(2, 2), act)
    model = nn.ModuleDict({"a": act, "block": block, "again": block, "b": nn.Sequential(act), "own": nn.ReLU()})
    assert report(model) == {"a": "ReLU", "block.1": "ReLU", "b.0": "ReLU", "own": "ReLU"}
    assert model["a"] is model["block"][1] is model["b"][0]
    assert model["again"] is model["block"]
    assert model["own"] is not model["a"]
    to_relu(model)
    assert model["a"] is model["block"][1] is model["b"][0]
    assert model["own"] is not model["a"]
    assert type(model["a"]) is nn.ReLU


@pytest.mark.parametrize("training", [True, False])
def test_train_mode_is_kept(training: bool) -> None:
    model = net().train(training)
    model.act.train(not training)
    sugarize(model)
    assert model.training == training
    assert model.act.training is (not training)
    to_relu(model)
    assert model.act.training is (not training)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_device_and_dtype_are_kept(device: str, dtype: torch.dtype) -> None:
    model = Net().to(device, dtype)
    sugarize(model)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device, dtype)}
    y = model(torch.randn(5, 3, device=device, dtype=dtype))
    assert (y.device.type, y.dtype) == (device, dtype)


@pytest.mark.parametrize("convert", [sugarize, lambda model: (sugarize(model), to_relu(model))])
def test_hooks_are_kept_and_can_still_be_removed(convert: Callable[[nn.Module], object]) -> None:
    model, calls = net(), []

    def note(what: str) -> Callable[..., None]:
        return lambda *_, **__: calls.append(what)

    act = model.act
    handles = [
        act.register_forward_hook(note("forward")),
        act.register_forward_hook(note("forward_kwargs"), with_kwargs=True),
        act.register_forward_hook(note("forward_always"), always_call=True),
        act.register_forward_pre_hook(note("pre")),
        act.register_full_backward_hook(note("backward")),
        act.register_full_backward_pre_hook(note("backward_pre")),
        act.register_state_dict_post_hook(note("state_dict")),
        act.register_state_dict_pre_hook(note("state_dict_pre")),
        act.register_load_state_dict_pre_hook(note("load_pre")),
        act.register_load_state_dict_post_hook(note("load_post")),
    ]
    convert(model)
    assert model.act is not act
    model(net_input().requires_grad_()).sum().backward()
    model.load_state_dict(model.state_dict())
    expected = {"forward", "forward_kwargs", "forward_always", "pre", "backward", "backward_pre"}
    assert set(calls) == expected | {"state_dict", "state_dict_pre", "load_pre", "load_post"}
    assert len(calls) == len(handles)
    for handle in handles:
        handle.remove()
    calls.clear()
    model(net_input().requires_grad_()).sum().backward()
    model.load_state_dict(model.state_dict())
    assert calls == []


def test_a_forward_hook_sees_the_output_of_relu() -> None:
    model, seen = net(), []
    model.act.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output)))
    sugarize(model)
    model(net_input())
    assert torch.equal(F.relu(seen[0][0]), seen[0][1])


def test_second_call_changes_nothing() -> None:
    model = net()
    sugarize(model, "nelu", alpha=0.05)
    before = [model.act, model.act_fn]
    assert report(model, "nelu", alpha=0.05) == {}
    assert [model.act, model.act_fn] == before


@pytest.mark.parametrize("settings", [{"surrogate": "nelu", "alpha": 0.05}, {"surrogate": "gelu"}, {"alpha": 1.0}])
def test_surrogate_is_set_again(settings: dict[str, Any]) -> None:
    model = net()
    sugarize(model)
    kinds = type(model.act), type(model.act_fn)
    assert report(model, **settings) == {"act": "SUGAR", "act_fn": "FunctionalSUGAR"}
    assert repr(model.act) == repr(SUGAR(**settings))
    assert (type(model.act), type(model.act_fn)) == kinds
    x = torch.tensor([-0.7, 0.4], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(model.act_fn(x).sum(), x)
    torch.testing.assert_close(grad, slope(x, **settings))


def test_filter_takes_name_and_activation() -> None:
    seen = []
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.GELU(), nn.ReLU()))

    def only_gelu(activation: Any, name: str) -> bool:
        seen.append((name, activation))
        return isinstance(activation, nn.GELU)

    assert report(model, filter_fn=only_gelu) == {"1.0": "GELU"}
    assert [name for name, _ in seen] == ["0", "1.0", "1.1"]
    assert [type(m) for m in (model[0], model[1][0], model[1][1])] == [nn.ReLU, SUGAR, nn.ReLU]


def test_filter_that_leaves_nothing_raises() -> None:
    with pytest.raises(ValueError, match=r"nothing to replace in Net.*filter"):
        sugarize(net(), filter_fn=lambda *_: False)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Sigmoid(), nn.Tanh()), nn.ModuleList()])
def test_nothing_to_replace_raises(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"nothing to replace in {type(model).__name__}"):
        sugarize(model)
    with pytest.raises(ValueError, match="there is no SUGAR activation"):
        to_relu(model)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.GELU(), timm_layers.GELU(), SUGAR(surrogate="selu")])
def test_model_that_is_an_activation_itself_comes_back_as_a_new_module(model: nn.Module) -> None:
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    new = sugarize(model.eval(), "nelu", alpha=0.3)
    assert new is not model
    assert (new.surrogate, new.values, new.training) == ("nelu", [0.3], False)
    new(torch.zeros(1))
    assert calls == [1]
    assert type(to_relu(new)) is nn.ReLU


def test_relu_has_no_attribute_that_sugar_has_and_keeps_others() -> None:
    model = nn.Sequential(SUGAR(surrogate="nelu", alpha=0.3))
    model[0].note = "mine"  # type: ignore[assignment]
    to_relu(model)
    assert vars(model[0]).keys() == vars(nn.ReLU()).keys() | {"note"}


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"surrogate": "nope"}, ValueError),
        ({"alpha": float("nan")}, ValueError),
        ({"alpha": "1"}, TypeError),
        ({"beta": 1.0}, TypeError),
        ({"filter_fn": lambda *_: 1 / 0}, ZeroDivisionError),
    ],
)
def test_bad_settings_leave_the_model_unchanged(bad: dict[str, Any], error: type[Exception]) -> None:
    model = net()
    before = [model.act, model.act_fn]
    with pytest.raises(error):
        sugarize(model, **bad)
    assert [model.act, model.act_fn] == before


# --- other people's models


VISION: dict[str, tuple[Callable[[], nn.Module], int, set[str]]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=3), 32, {"ReLU"}),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=3), 32, {"Hardswish", "ReLU"}),
    "swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=3),
        32,
        {"GELU"},
    ),
    "vit": (lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3), 16, {"GELU"}),
}


@pytest.mark.parametrize("name", VISION)
def test_torchvision_models_have_the_gradients_of_forward_gradient_injection(name: str) -> None:
    create, size, expected = VISION[name]
    torch.manual_seed(0)
    model = create().double().eval()
    oracle = inject(copy.deepcopy(model), (nn.ReLU, nn.GELU, nn.Hardswish))
    gates = [m for m in model.modules() if isinstance(m, (nn.Hardsigmoid, nn.Sigmoid))]
    assert set(report(model).values()) == expected
    assert [m for m in model.modules() if isinstance(m, (nn.Hardsigmoid, nn.Sigmoid))] == gates
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    torch.testing.assert_close(model(x), oracle(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(model, x), gradients(oracle, x), rtol=1e-8, atol=1e-10)


def test_model_of_plain_relu_keeps_its_outputs_bit_for_bit() -> None:
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(num_classes=3), torch.randn(2, 3, 32, 32)
    for mode in (True, False):
        expected = copy.deepcopy(model).train(mode)(x)
        sugared = copy.deepcopy(model).train(mode)
        sugarize(sugared)
        assert torch.equal(sugared(x), expected)


# --- PyTorch's transformer, which has a fused path that knows only ReLU and GELU


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.GELU(), F.silu])
@pytest.mark.parametrize("convert", ["sugarize", "to_relu"])
def test_transformer_encoder_computes_the_same_fast_and_slow(activation: Any, convert: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    oracle = copy.deepcopy(model)
    for block in oracle.layers:
        block.activation, block.activation_relu_or_gelu = FGI(), 0
    sugarize(model)
    if convert == "to_relu":
        to_relu(model)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    slow = oracle(x)
    torch.testing.assert_close(model(x), slow, rtol=1e-10, atol=1e-12)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fast = model(x)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    used = {event.key for event in profile.key_averages()}
    assert "aten::_transformer_encoder_layer_fwd" in used  # else the fast path was not tried
    if convert == "sugarize":
        torch.testing.assert_close(gradients(model, x), gradients(oracle, x), rtol=1e-9, atol=1e-11)


# --- timm's NFNet keeps its activation as a function


@pytest.mark.parametrize("name", ["relu", "gelu", "silu"])
def test_gamma_act_of_timm_keeps_its_scale(name: str) -> None:
    model = nn.Sequential(GammaAct(name, gamma=1.7))
    assert list(report(model)) == ["0.act_fn"]
    x = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
    y = model(x)
    assert torch.equal(y, F.relu(x) * 1.7)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], 1.7 * slope(x))


@JIT_IS_DEPRECATED
def test_gamma_act_of_timm_can_be_scripted() -> None:
    model = nn.Sequential(GammaAct("gelu", gamma=1.7))
    sugarize(model)
    scripted = torch.jit.script(model)
    x = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(scripted(x).sum(), x)[0], 1.7 * slope(x))


# --- torch.fx graphs: calls that surgery on modules can't reach


class Calls(nn.Module):
    """Activations that a hand-written forward calls by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(6)])
        self.act = nn.SiLU()

    def forward(self, x):  # type: ignore[no-untyped-def]  # torch 2.6 and 2.8 pickle no graph with types as strings
        x = F.gelu(self.layers[0](x), approximate="tanh")
        x = F.relu(self.layers[1](x), inplace=True)
        x = self.layers[2](x).relu()
        x = torch.relu(input=self.layers[3](x))
        x = self.act(self.layers[4](x)) * torch.sigmoid(x)
        return F.softmax(self.layers[5](x).relu_(), dim=-1)


class OracleCalls(Calls):
    def forward(self, x: Tensor) -> Tensor:
        act = FGI("nelu", alpha=0.3)
        for i in range(4):
            x = act(self.layers[i](x))
        x = act(self.layers[4](x)) * torch.sigmoid(x)
        return F.softmax(act(self.layers[5](x)), dim=-1)


def calls(kind: type[Calls] = Calls) -> Calls:
    torch.manual_seed(3)
    return kind().double()


def calls_input() -> Tensor:
    return 2 * torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def test_calls_in_a_traced_graph_are_replaced() -> None:
    traced, x = torch.fx.symbolic_trace(calls()), calls_input()
    replaced = report(traced, "nelu", alpha=0.3)
    assert sorted(replaced.values()) == ["SiLU", "gelu", "relu", "relu", "relu", "relu_"]
    oracle = calls(OracleCalls)
    torch.testing.assert_close(traced(x), oracle(x), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(gradients(traced, x), gradients(oracle, x), rtol=1e-9, atol=1e-12)
    assert report(traced, "nelu", alpha=0.3) == {}


def test_traced_graph_inside_a_model_is_reached() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4).double(), torch.fx.symbolic_trace(calls())), calls_input()
    replaced = report(model, "nelu", alpha=0.3)
    assert all(name.startswith("1.") for name in replaced)
    oracle = nn.Sequential(model[0], calls(OracleCalls))
    torch.testing.assert_close(gradients(model, x), gradients(oracle, x), rtol=1e-9, atol=1e-12)


def test_surrogate_of_a_traced_sugar_model_is_set_again() -> None:
    model = calls()
    model.act = SUGAR()
    traced = torch.fx.symbolic_trace(model)
    sugarize(traced, "nelu", alpha=0.3)
    x = calls_input()
    torch.testing.assert_close(gradients(traced, x), gradients(calls(OracleCalls), x), rtol=1e-9, atol=1e-12)


def test_model_with_calls_alone_raises() -> None:
    class Alone(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x)

    with pytest.raises(ValueError, match="nothing to replace in Alone"):
        sugarize(Alone())
    assert report(torch.fx.symbolic_trace(Alone())) == {"relu": "relu"}


# --- deployment


def sugared_models() -> dict[str, Callable[[], nn.Module]]:
    def sugared(model: nn.Module) -> nn.Module:
        sugarize(model, "nelu", alpha=0.05)
        return model

    def vision(name: str) -> nn.Module:
        torch.manual_seed(0)
        return sugared(VISION[name][0]().double())

    return {
        "own": lambda: sugared(net()),
        "resnet18": lambda: vision("resnet18"),
        "mobilenet_v3_small": lambda: vision("mobilenet_v3_small"),
        "fx_of_sugar": lambda: torch.fx.symbolic_trace(sugared(net())),
        "sugar_of_fx": lambda: sugared(torch.fx.symbolic_trace(net())),
        "sugar_of_fx_of_calls": lambda: sugared(torch.fx.symbolic_trace(Calls().double())),
        "fx_copied": lambda: copy.deepcopy(torch.fx.symbolic_trace(sugared(net()))),
        "inner_fx_of_sugar": lambda: nn.Sequential(torch.fx.symbolic_trace(sugared(net()))),
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", sugared_models())
def test_relu_model_has_bit_equal_outputs_and_the_gradient_of_relu(name: str, training: bool) -> None:
    model = sugared_models()[name]().train(training)
    if name in VISION:
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    else:
        x = calls_input() if "calls" in name else net_input()
    twin = copy.deepcopy(model)
    for module in [*model.modules(), *twin.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    to_relu(twin)
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
    assert torch.equal(twin(x), model(x))
    relus, surrogates = gradients(twin, x), gradients(model, x)
    assert relus.keys() == surrogates.keys()
    assert any(not torch.equal(relus[key], surrogates[key]) for key in relus)


@pytest.mark.parametrize("name", sugared_models())
def test_relu_model_holds_nothing_of_this_package(name: str) -> None:
    model = sugared_models()[name]()
    assert b"timm_sugar" in pickle.dumps(model)
    to_relu(model)
    assert not [type(m) for m in model.modules() if type(m).__module__.startswith("timm_sugar")]
    assert b"timm_sugar" not in pickle.dumps(model)
    with pytest.raises(ValueError, match="there is no SUGAR activation"):
        to_relu(model)


def test_relu_model_has_relu_where_modules_were_and_what_is_called_like_a_function_where_functions_were() -> None:
    model = net()
    sugarize(model)
    assert to_relu(model) is model
    assert type(model.act) is nn.ReLU
    assert list_activations(model) == {"act": "ReLU", "act_fn.relu": "relu"}
    x = net_input()
    for further in ({}, {"approximate": "tanh"}, {"inplace": True}, {"negative_slope": 0.2}):
        assert torch.equal(model.act_fn(x, **further), F.relu(x))
    assert torch.equal(model.act_fn(x, 0.2), F.relu(x))
    assert (x < 0).any()  # it was not overwritten
    assert "timm_sugar" not in model.act_fn.code


@JIT_IS_DEPRECATED
@pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support instance-level annotations:UserWarning")
def test_relu_model_with_a_function_can_be_scripted_and_pickled() -> None:
    model, x = to_relu(sugarize(net())), net_input()
    assert torch.equal(torch.jit.script(model.act_fn)(x), F.relu(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        *[(F.leaky_relu, (0.2,), {}), (F.elu, (1.0,), {}), (F.silu, (True,), {}), (F.relu, (), {"inplace": True})],
        *[
            (F.leaky_relu, (), {"negative_slope": 0.2}),
            (F.gelu, (), {"approximate": "tanh"}),
            (F.rrelu, (0.1, 0.2), {}),
        ],
    ],
)
def test_relu_model_computes_what_sugar_did_however_the_function_is_called(
    function: Callable[..., Tensor], args: Any, kwargs: Any
) -> None:
    model, x = OverwritesByFunction(function, *args, **kwargs), torch.randn(5, 4)
    expected = sugarize(model)(x)
    assert torch.equal(to_relu(model)(x), expected)


def test_round_trip_gives_the_surrogate_back() -> None:
    model, x = net(), net_input()
    sugarize(model, "nelu", alpha=0.3)
    expected = gradients(model, x)
    to_relu(model)
    assert report(model, "nelu", alpha=0.3) == {"act": "ReLU", "act_fn.relu": "relu"}
    torch.testing.assert_close(gradients(model, x), expected, rtol=0, atol=0)


# --- which surrogate


def settings(model: nn.Module) -> dict[str, tuple[str, list[float]]]:
    return {place.name: (place.settings() or ("", []))[:2] for place in find_places(model)}


def test_patterns_choose_by_name_and_the_first_match_wins() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.ReLU(), nn.Linear(2, 2), nn.GELU())

    model = nn.ModuleDict({"early": block(), "late": block(), "head": nn.ReLU()})
    sugarize(model, {"late.*": get_surrogate("nelu", alpha=0.05), "*.2": "gelu", "early*": "bsilu"})
    nelu = ("nelu", [0.05])
    expected = {"early.0": ("bsilu", [1.67]), "early.2": ("gelu", []), "late.0": nelu, "late.2": nelu, "head": ("", [])}
    assert settings(model) == expected
    assert type(model["head"]) is nn.ReLU


def test_an_instance_that_is_shared_under_two_patterns_has_the_surrogate_of_each() -> None:
    act = nn.ReLU()
    model = nn.ModuleDict({"early": nn.Sequential(act, act), "late": nn.Sequential(act), "last": nn.Sequential(act)})
    patterns = {"late.*": get_surrogate("nelu", alpha=0.3), "last.*": get_surrogate("nelu", alpha=0.7), "*": "bsilu"}
    x = torch.linspace(-3, 3, 20, dtype=torch.float64, requires_grad=True)
    for _ in range(2):  # the second call changes nothing
        sugarize(model, patterns)
        assert model["early"][0] is model["early"][1]
        for name, expected in (("late", slope(x, "nelu", alpha=0.3)), ("last", slope(x, "nelu", alpha=0.7))):
            torch.testing.assert_close(torch.autograd.grad(model[name](x).sum(), x)[0], expected)
        torch.testing.assert_close(torch.autograd.grad(model["early"][1](x).sum(), x)[0], slope(x, "bsilu"))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"surrogate": {"layer9.*": "nelu"}}, ValueError, "layer9"),
        ({"surrogate": {"act": "nope"}}, ValueError, "unknown surrogate 'nope'"),
        ({"surrogate": {"act": "nelu"}, "alpha": 1.0}, TypeError, "values of the patterns"),
        ({"surrogate": "same", "alpha": 1.0}, TypeError, "'same' takes its parameters from the activations"),
    ],
)
def test_bad_patterns_are_named(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    model = net()
    with pytest.raises(error, match=message):
        sugarize(model, **bad)
    assert type(model.act) is nn.SiLU


SAME = [
    *[(nn.ReLU(), ("relu", [1.0])), (nn.ReLU6(), ("relu", [1.0])), (nn.LeakyReLU(0.3), ("leaky_relu", [0.3]))],
    *[(nn.RReLU(0.1, 0.3), ("leaky_relu", [0.2])), (nn.ELU(0.5), ("elu", [0.5])), (nn.SELU(), ("selu", []))],
    *[(nn.GELU(), ("gelu", [])), (nn.SiLU(), ("silu", [])), (nn.Hardswish(), ("silu", [])), (nn.Mish(), ("mish", []))],
    *[(timm_layers.QuickGELU(), ("gelu", [])), (timm_layers_me.HardMishMe(), ("mish", []))],
]


@pytest.mark.parametrize(("activation", "expected"), SAME, ids=lambda value: type(value).__name__)
def test_same_keeps_the_derivative_of_what_it_replaces(
    activation: nn.Module, expected: tuple[str, list[float]]
) -> None:
    model = sugarize(nn.Sequential(activation), "same")
    assert settings(model) == {"0": (expected[0], pytest.approx(expected[1]))}
    sugarize(model, "same")
    assert settings(model) == {"0": (expected[0], pytest.approx(expected[1]))}


@pytest.mark.parametrize(
    "activation", [F.gelu, functools.partial(F.leaky_relu, negative_slope=0.3), F.silu, F.elu, F.rrelu]
)
def test_same_keeps_the_gradient_of_a_smooth_function(activation: Callable[..., Tensor]) -> None:
    model, x = net(activation), torch.linspace(-3, 3, 14, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(activation(x).sum(), x)
    sugarize(model, "same")
    (grad,) = torch.autograd.grad(model.act_fn(x).sum(), x)
    torch.testing.assert_close(grad, expected)


def test_same_reaches_calls_in_a_graph() -> None:
    traced = torch.fx.symbolic_trace(calls())
    sugarize(traced, "same")
    kinds = [module.surrogate for module in traced.modules() if isinstance(module, SUGAR)]
    assert sorted(kinds) == ["gelu", "relu", "relu", "relu", "relu", "silu"]


FUNCTION_CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "leaky_relu_": lambda x: F.leaky_relu_(x, 0.2),
    "elu": lambda x: F.elu(x, alpha=0.5),
    "rrelu": F.rrelu,
    "torch.rrelu": lambda x: torch.rrelu(x, 0.1, 0.3),
    "relu": lambda x: F.relu(x, True),
}


@pytest.mark.parametrize("name", FUNCTION_CALLS)
@pytest.mark.parametrize("by_name", [True, False])
def test_same_takes_the_arguments_of_calls_in_a_graph(name: str, by_name: bool) -> None:
    class Call(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return FUNCTION_CALLS[name](x * 1)

    x = torch.linspace(-3, 3, 14, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(Call()(x).sum(), x)
    traced = torch.fx.symbolic_trace(Call())
    if not by_name:  # as dynamo's graphs have them
        for node in traced.graph.nodes:
            node.args, node.kwargs = (*node.args, *node.kwargs.values()), {}
    (grad,) = torch.autograd.grad(sugarize(traced, "same")(x).sum(), x)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("name", ["silu", "leaky_relu", "rrelu"])
def test_a_call_in_a_graph_is_in_place_by_position_too(name: str) -> None:
    before = {"silu": (), "leaky_relu": (0.2,), "rrelu": (0.1, 0.3, False)}[name]
    graph = torch.fx.Graph()
    x = graph.call_function(torch.neg, (graph.placeholder("x"),))
    y = graph.call_function(getattr(F, name), (x, *before, True))
    graph.output(graph.call_function(torch.add, (x, y)))
    data = torch.randn(8)
    assert torch.equal(sugarize(torch.fx.GraphModule({}, graph))(data), 2 * F.relu(-data))


# --- undo, exchange, list


@pytest.mark.parametrize("make", [net, lambda: torch.fx.symbolic_trace(calls())])
def test_sugarized_gives_the_very_activations_back(make: Callable[[], nn.Module]) -> None:
    model = make()
    x = calls_input() if isinstance(model, torch.fx.GraphModule) else net_input()
    before, modules, expected = list_activations(model), list(model.modules()), model(x)
    with sugarized(model, "nelu", alpha=0.3) as inside:
        assert inside is model
        assert not torch.equal(model(x), expected)
    with pytest.raises(ZeroDivisionError), sugarized(model):
        raise ZeroDivisionError
    assert list_activations(model) == before
    assert list(model.modules()) == modules
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("make", [net, lambda: torch.fx.symbolic_trace(calls())])
def test_a_setting_changed_inside_sugarized_does_not_outlast_it(make: Callable[[], nn.Module]) -> None:
    model = sugarize(make(), "bsilu", alpha=1.2)
    before = {place.name: place.settings() for place in find_places(model)}
    with sugarized(model, "bsilu", alpha=1.2):
        set_surrogate(model, alpha=0.4)
    assert {place.name: place.settings() for place in find_places(model)} == before


def test_list_names_type_of_every_activation_replaced_or_not() -> None:
    model = net()
    assert list_activations(model) == {"act": "SiLU", "act_fn": "gelu"}
    sugarize(model, filter_fn=lambda module, _: module is F.gelu)
    assert list_activations(model) == {"act": "SiLU", "act_fn": "FunctionalSUGAR"}
    assert list_activations(nn.Linear(2, 2)) == {}


def test_replacing_keeps_shared_instances_shared_and_knows_the_fused_path_of_transformers() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64).eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    replace_activations(sugarize(layer), lambda: nn.Tanh())
    slow = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), slow)
    act = SUGAR()
    shared = replace_activations(nn.Sequential(act, nn.Linear(2, 2), act), nn.GELU)
    assert type(shared[0]) is nn.GELU
    assert shared[0] is shared[2]
    with pytest.raises(ValueError, match="no SUGAR module"):
        replace_activations(shared, nn.GELU)


@pytest.mark.parametrize("function", [sugarize, to_relu, list_activations])
@pytest.mark.parametrize("bad", ["resnet18", None, 3, F.relu, nn.ReLU])
def test_what_is_no_module_is_a_type_error(function: Callable[..., Any], bad: Any) -> None:
    with pytest.raises(TypeError, match=r"needs an nn.Module, not"):
        function(bad)


# --- the fused path of nn.TransformerEncoderLayer belongs to its attribute `activation` alone


class OwnActivation(nn.TransformerEncoderLayer):
    def __init__(self) -> None:
        super().__init__(8, 2, 16, activation=nn.PReLU(dtype=torch.float64), batch_first=True, dtype=torch.float64)
        self.own = nn.ReLU()


@pytest.mark.parametrize("make", [OwnActivation, lambda: nn.TransformerEncoderLayer(
    8, 2, 16, activation="gelu", batch_first=True, dtype=torch.float64)])  # fmt: skip
def test_fused_path_computes_what_the_slow_one_does_if_another_activation_is_replaced(make: Any) -> None:
    torch.manual_seed(0)
    layer = make().eval()
    model = nn.ModuleDict({"layer": layer, "act": nn.ReLU()})
    sugarize(model, filter_fn=lambda module, name: name in ("act", "layer.own"))
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    slow = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), slow, rtol=1e-10, atol=1e-12)


# --- nn.TransformerDecoderLayer takes F.relu for a copy, where PyTorch finds no activation among its attributes

COPIES: list[Callable[[nn.Module], nn.Module]] = [
    copy.deepcopy,
    copy.copy,
    lambda model: pickle.loads(pickle.dumps(model)),
]


def decoder(activation: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(8, 2, 16, 0.0, activation, batch_first=True, dtype=torch.float64)
    return nn.TransformerDecoder(layer, 2)


def decoder_gradient(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    x, memory = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    (grad,) = torch.autograd.grad(model(x, memory).square().sum(), model.layers[0].linear1.weight)
    return grad


@pytest.mark.parametrize("copied", COPIES, ids=("deepcopy", "copy", "pickle"))
@pytest.mark.parametrize("activation", [F.relu, F.gelu, nn.GELU()], ids=("relu", "gelu", "module"))
def test_a_copy_of_a_decoder_has_the_surrogate_too(copied: Callable[[nn.Module], nn.Module], activation: Any) -> None:
    reference, model = decoder(F.relu), sugarize(decoder(activation), "elu")
    for layer in reference.layers:
        layer.activation = FGI("elu")
    expected = decoder_gradient(reference)
    torch.testing.assert_close(decoder_gradient(model), expected)
    torch.testing.assert_close(decoder_gradient(copied(model)), expected)
    again = to_relu(copied(sugarize(copied(model), "nelu")))
    torch.testing.assert_close(decoder_gradient(again), decoder_gradient(decoder(F.relu)))


def test_a_decoder_gets_its_activation_back_and_names_nothing_as_left() -> None:
    model = decoder(F.gelu)
    expected = decoder_gradient(model)
    with sugarized(model):
        assert not torch.equal(decoder_gradient(model), expected)
        sugarize(model, "nelu")  # a warning is an error here
    torch.testing.assert_close(decoder_gradient(copy.deepcopy(model)), expected)
    assert [vars(layer)["activation"] for layer in model.layers] == [F.gelu, F.gelu]


def test_sugar_that_pytorch_hid_is_no_activation_and_sugarize_brings_it_back() -> None:
    model = decoder(SUGAR(surrogate="elu"))  # nn.TransformerDecoder copies the layer
    assert set(list_activations(model).values()) == {"relu"}
    with pytest.raises(
        ValueError, match=r"layers.0.activation of TransformerDecoder never runs.*sugarize\(\) the model"
    ):
        set_surrogate(model, alpha=0.5)
    torch.testing.assert_close(
        decoder_gradient(sugarize(model, "elu")), decoder_gradient(sugarize(decoder(F.relu), "elu"))
    )
    set_surrogate(model, alpha=0.5)


# --- what can't be replaced is named, and all of it is replaced or none


class Holder(nn.Module):
    acts_of_class = (nn.ReLU(),)
    default_act = nn.SiLU()
    of_class = staticmethod(F.gelu)

    def __init__(self) -> None:
        super().__init__()
        self.in_list, self.in_dict, self.in_tuple = [nn.ReLU()], {"a": F.relu}, (F.gelu,)
        self.in_lambda = lambda x: F.relu(x)
        self.bound = self.own_method
        self.smooth = Smooth()
        self.act = self.default_act
        object.__setattr__(self, "beside", self.act)
        self.of_act, self.in_partial = self.act.forward, functools.partial(apply, act=self.act)
        self.in_closure = lambda x, act=self.act: act(x)
        self.act_name = "silu"  # as in Mamba of transformers

    def own_method(self, x: Tensor) -> Tensor:
        return F.silu(x)


def apply(x: Tensor, act: Any) -> Any:
    return act(x)


class Smooth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(4 * x)


class Nothing(nn.GELU):
    """A subclass that adds nothing."""


@JIT_IS_DEPRECATED
def test_what_is_left_is_named_in_one_warning() -> None:
    model = nn.ModuleDict({"h": Holder(), "scripted": torch.jit.script(nn.ReLU())})
    with pytest.warns(UserWarning, match="left activations of ModuleDict") as caught:
        sugarize(model)
    assert len(caught) == 1
    text = str(caught[0].message)
    for name in ("in_list", "in_dict", "in_tuple", "in_lambda", "bound", "of_class", "acts_of_class", "smooth"):
        assert f"h.{name} (" in text
    for name, why in {"beside": "not among the modules", "of_act": "in a method", "in_partial": "in a partial"}.items():
        assert f"h.{name} ({why})" in text
    assert "h.in_closure (in a function)" in text
    assert "h.act_name (named 'silu')" in text
    assert "scripted (a scripted ReLU)" in text
    assert "types=(Smooth,)" in text
    assert "default_act" not in text  # it is the instance that was replaced
    assert type(model["h"].act) is SUGAR


def test_sugar_in_a_graph_keeps_its_settings_under_same() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return sugar(F.silu(sugar(x, "nelu", alpha=0.3)))

    x = torch.linspace(-3, 3, 50, dtype=torch.float64, requires_grad=True)
    model = sugarize(torch.fx.symbolic_trace(Net()), "same")
    (grad,) = torch.autograd.grad(model(x).sum(), x)
    (expected,) = torch.autograd.grad(sugar(sugar(sugar(x, "nelu", alpha=0.3), "silu")).sum(), x)
    torch.testing.assert_close(grad, expected)


def test_a_compiled_activation_is_replaced_and_nothing_of_it_is_left() -> None:
    model, x = nn.Sequential(torch.compile(nn.ReLU(), backend="eager")), torch.linspace(-1, 1, 8, requires_grad=True)
    sugarize(model, "nelu", alpha=0.3)  # a warning is an error here
    (grad,) = torch.autograd.grad(model(x).sum(), x)
    (expected,) = torch.autograd.grad(sugar(x, "nelu", alpha=0.3).sum(), x)
    torch.testing.assert_close(grad, expected)


def test_types_of_ones_own_and_subclasses_that_add_nothing_are_replaced() -> None:
    model = nn.Sequential(Smooth(), Nothing())
    sugarize(model, types=(Smooth,))
    assert [type(module) for module in model] == [SUGAR, SUGAR]
    with pytest.raises(ValueError, match="no surrogate has the derivative of Smooth"):
        sugarize(nn.Sequential(Smooth()), "same", types=(Smooth,))


def test_error_names_what_was_seen_and_the_way_through_a_graph() -> None:
    with pytest.raises(ValueError, match=r"0 \(Smooth behaves like a ReLU.*symbolic_trace"):
        sugarize(nn.Sequential(Smooth()))


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.closed = True

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "closed", False):
            raise AttributeError("closed")
        super().__setattr__(name, value)


def test_a_module_that_refuses_leaves_the_whole_model_as_it_was() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.GELU()), Stubborn(), nn.SiLU())
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"2.act can't be replaced \(closed\)"):
        sugarize(model)
    assert list(model.modules()) == before


def test_attributes_of_an_activation_carry_over_and_a_wrapped_forward_is_refused() -> None:
    model = nn.Sequential(nn.ELU(0.5), nn.ReLU())
    model[0].note = "mine"  # type: ignore[assignment]
    sugarize(model, "nelu", alpha=0.3)
    assert model[0].note == "mine"
    assert repr(model[0]) == "SUGAR(surrogate='nelu', alpha=0.3)"
    wrapped = nn.Sequential(nn.GELU(), nn.ReLU())
    wrapped[1].forward = functools.partial(nn.ReLU.forward, wrapped[1])  # as accelerate's add_hook_to_module
    with pytest.raises(ValueError, match="1: its forward was replaced"):
        sugarize(wrapped)
    assert type(wrapped[0]) is nn.GELU


def test_a_parameter_of_a_type_of_ones_own_does_not_hide_the_surrogates() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha, self.negative_slope, self.note = 0.3, 0.1, "mine"

        def forward(self, x: Tensor) -> Tensor:
            return F.elu(x, self.alpha)

    model = sugarize(nn.Sequential(Own()), types=[Own])
    assert (model[0].alpha, model[0].note) == (1.67, "mine")
    model[0].alpha = 0.5
    x = torch.linspace(-3, 3, 14, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(grad, slope(x, "bsilu", alpha=0.5))
    model[0].set_surrogate("leaky_relu", negative_slope=0.2)
    model[0].negative_slope = 0.4
    (grad,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(grad, slope(x, "leaky_relu", negative_slope=0.4))


CALLS = [
    *[
        (F.leaky_relu, (), {"negative_slope": 0.2}),
        (F.leaky_relu, (0.2, True), {}),
        (F.elu, (0.5,), {"inplace": False}),
    ],
    *[(F.rrelu, (0.1, 0.3, False, False), {}), (F.rrelu, (), {"lower": 0.1, "upper": 0.3, "training": False})],
    *[(F.gelu, (), {"approximate": "tanh"}), (F.celu, (0.5, False), {}), (F.celu, (), {"alpha": 0.5})],
]


@pytest.mark.parametrize(("function", "arguments", "options"), CALLS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_replaced_function_is_called_like_the_function(
    function: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    model, x = net(function), torch.tensor([-1.0, 2.0])
    function(x.clone(), *arguments, **options)
    sugarize(model)
    assert torch.equal(model.act_fn(x, *arguments, **options), F.relu(x))
    assert torch.equal(model.act_fn(input=x, **options), F.relu(x))
    assert torch.equal(model.act(input=x), F.relu(x))


# --- in-place activations, and what an example shows


class ReadAgain(nn.Module):
    """Blocks as in MiDaS (the input of the in-place ReLU is the shortcut) and VQ-VAE (its result is ignored)."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.midas, self.vqvae, self.harmless = nn.ReLU(inplace), nn.ReLU(inplace), nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.b(self.midas(x))
        h = self.c(x)
        self.vqvae(h)
        return self.harmless(x) + h


class OracleReadAgain(ReadAgain):
    """What an in-place ReLU means, written out of place."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.midas(self.a(x))
        x = x + self.b(x)
        h = self.vqvae(self.c(x))
        return self.harmless(x) + h


def read_again(kind: type[ReadAgain] = ReadAgain, inplace: bool = True) -> ReadAgain:
    torch.manual_seed(5)
    return kind(inplace).double()


def test_with_an_example_sugar_overwrites_its_input_where_the_model_reads_it_again() -> None:
    x, model = calls_input(), read_again()
    expected = read_again()(x)
    kept = x.clone()
    sugarize(model, "nelu", alpha=0.3, example=x)
    assert torch.equal(x, kept)
    assert model.training
    assert torch.equal(model(x), expected)
    assert [m.overwrites for m in (model.midas, model.vqvae, model.harmless)] == [True, True, False]
    oracle = sugarize(read_again(OracleReadAgain, inplace=False), "nelu", alpha=0.3)
    torch.testing.assert_close(gradients(model, x), gradients(oracle, x), rtol=1e-10, atol=1e-12)
    for loaded in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        torch.testing.assert_close(gradients(loaded, x), gradients(oracle, x), rtol=1e-10, atol=1e-12)
    assert torch.equal(to_relu(model)(x), expected)


class ReturnsIt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        self.act(x)
        return self.returns(x)

    def returns(self, x: Tensor) -> Any:
        return {"out": x}


class Output:
    """An output of one's own, which PyTorch can't look into."""

    def __init__(self, x: Tensor) -> None:
        self.out, self.itself = [x], self


@pytest.mark.parametrize("returns", [lambda x: {"out": [x]}, lambda x: UserDict(out=[x]), Output])
def test_an_input_that_is_returned_is_read_again(returns: Callable[[Tensor], Any]) -> None:
    model, x = ReturnsIt(), torch.randn(3, 4)
    model.returns = returns
    sugarize(model, example=x)
    output = model(x)
    (out,) = output.out if isinstance(output, Output) else output["out"]
    assert torch.equal(out, F.relu(model.first(x)))


class Slots:
    """One without a dictionary of its attributes."""

    __slots__ = ("out",)

    def __init__(self, x: Tensor) -> None:
        self.out = [x]


def test_an_input_that_an_object_with_slots_returns_is_read_again() -> None:
    model, x = ReturnsIt(), torch.randn(3, 4)
    model.returns = Slots
    sugarize(model, example=x)
    assert torch.equal(model(x).out[0], F.relu(model.first(x)))


def test_an_example_of_any_mapping_is_copied() -> None:
    x = torch.randn(3, 4)
    kept = x.clone()
    sugarize(nn.Sequential(nn.ReLU(inplace=True)), example=UserDict(input=x))
    assert torch.equal(x, kept)


def test_an_example_shows_a_view_of_what_a_call_in_a_graph_overwrites() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        h = model.first(x)
        view = h.view(-1)
        F.relu(h, inplace=True)
        return view

    kind = type("Views", (nn.Module,), {"forward": forward})
    model = kind()
    model.first = nn.Linear(4, 4)
    x, traced = torch.randn(3, 4), torch.fx.symbolic_trace(model)
    expected = F.relu(model.first(x)).view(-1)
    sugarize(traced, example=x)
    assert torch.equal(traced(x), expected)


class HidesMethods(nn.ReLU):
    """An activation with attributes whose names are those of methods and properties of SUGAR."""

    def __init__(self) -> None:
        super().__init__()
        self._relu, self.set_surrogate, self.extra_repr = F.relu, None, F.gelu
        self.values, self.beta = [0.1], 1


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_attributes_of_what_was_replaced_hide_nothing_of_sugar(copied: Callable[[Any], Any]) -> None:
    model, x = sugarize(nn.Sequential(HidesMethods()), alpha=0.5), torch.linspace(-3, 3, 7).double().requires_grad_()
    model = copied(model)
    torch.testing.assert_close(torch.autograd.grad(model(x).sum(), x)[0], slope(x, alpha=0.5))
    assert (repr(model[0]), model[0].values) == ("SUGAR(surrogate='bsilu', alpha=0.5)", [0.5])
    model[0].set_surrogate("nelu")


class TwiceSugar(SUGAR):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_subclass_of_sugar_that_computes_something_else_is_left_and_named() -> None:
    model, x = nn.Sequential(TwiceSugar(), SUGAR()), torch.randn(3)
    expected = model(x)
    with pytest.warns(UserWarning, match=r"0 \(TwiceSugar computes something else\)"):
        to_relu(model)
    assert torch.equal(model(x), expected)
    assert list_activations(model) == {"1": "ReLU"}
    with pytest.raises(ValueError, match="nothing to replace"):
        sugarize(nn.Sequential(TwiceSugar()))


class KeepsAFunction(nn.Module):
    """An activation as those of transformers are, which keep the function that they call."""

    def __init__(self) -> None:
        super().__init__()
        self.act = F.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def test_what_an_activation_kept_is_no_activation_of_sugar() -> None:
    model = sugarize(nn.Sequential(KeepsAFunction()), types=(KeepsAFunction,))
    assert list_activations(model) == {"0": "SUGAR"}


def test_an_out_of_place_model_is_the_same_with_and_without_an_example() -> None:
    x = calls_input()
    model = sugarize(read_again(inplace=False), example=x)
    assert not any(m.overwrites for m in (model.midas, model.vqvae, model.harmless))
    assert torch.equal(model(x), read_again(inplace=False)(x))


class CallsReadAgain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.b(F.relu(x, inplace=True))
        h = self.c(x)
        torch.relu_(h)
        z = self.d(h)
        F.relu(z, True)
        return h + x.relu_() + z + x


def test_in_place_calls_in_a_graph_keep_their_meaning() -> None:
    torch.manual_seed(6)
    model, x = CallsReadAgain().double(), calls_input()
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    expected = model(x)
    with sugarized(traced, "nelu", alpha=0.3):
        assert torch.equal(traced(x), expected)
    assert torch.equal(traced(x), expected)
    sugarize(traced, "nelu", alpha=0.3)
    relu = FGI("nelu", alpha=0.3)

    def oracle(t: Tensor) -> Tensor:
        t = relu(model.a(t))
        t = t + model.b(t)
        h = relu(model.c(t))
        z = relu(model.d(h))
        t = relu(t)
        return h + t + z + t

    got = torch.autograd.grad(traced(x).square().sum(), list(traced.parameters()))
    want = torch.autograd.grad(oracle(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.block = nn.ReLU(), nn.Sequential(Calls())

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return F.relu(self.block(self.act(scale * x)))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": x, "scale": 2.0}])
def test_an_example_shows_what_is_computed_without_sugar(wrap: Callable[[Tensor], Any]) -> None:
    model = Mixed()
    with pytest.warns(UserWarning, match="computes activations without SUGAR") as caught:
        sugarize(model, example=wrap(torch.randn(2, 4)))
    (text,) = [str(warning.message) for warning in caught]
    assert "relu in forward" in text
    assert "gelu, relu, relu_ in block.0" in text
    assert "act" not in text.partition("SUGAR:")[2].replace("activations", "").partition(". Sugarize")[0]


def test_an_example_through_a_whole_model_warns_of_nothing() -> None:
    model = sugarize(torchvision.models.mobilenet_v3_small(num_classes=3), example=torch.randn(2, 3, 32, 32))
    assert model.training
    with pytest.warns(UserWarning, match="relu_ in forward"):  # its last ReLU is a call
        sugarize(torchvision.models.DenseNet(4, (1, 1), 8), example=torch.randn(2, 3, 32, 32))


# --- activations that were compiled by themselves


def compiled_by_itself(how: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2)).double()
    if how == "compile(module)":
        model[1] = torch.compile(model[1], backend="eager")
    else:
        model[1].compile(backend="eager")
    model(net_input())  # is compiled now
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo reads it
@pytest.mark.parametrize("how", ["compile(module)", "module.compile()"])
def test_an_activation_that_was_compiled_by_itself_runs_no_more(how: str) -> None:
    x = net_input()
    plain = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2)).double()
    model = compiled_by_itself(how)
    plain.load_state_dict({name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()})
    as_gelu = plain(x)
    as_relu = nn.Sequential(plain[0], nn.ReLU(), plain[2])(x)
    injected = gradients(sugarize(copy.deepcopy(plain), "nelu", alpha=0.3), x)
    with sugarized(model, "nelu", alpha=0.3):
        assert torch.equal(model(x), as_relu)
        torch.testing.assert_close(gradients(model, x), injected)
    assert torch.equal(model(x), as_gelu)
    sugarize(model, "bsilu")
    sugarize(model, "nelu", alpha=0.3)  # once more, with SUGAR there
    torch.testing.assert_close(gradients(model, x), injected)
    replace_activations(model, nn.GELU)
    assert torch.equal(model(x), as_gelu)
    to_relu(sugarize(model))
    assert torch.equal(model(x), as_relu)
    assert set(list_activations(model).values()) == {"ReLU"}


@pytest.mark.parametrize(
    "compiled",
    [
        lambda f: torch.compile(f, backend="eager"),
        functools.partial,
        lambda f: functools.partial(torch.compile(f, backend="eager")),
        lambda f: torch.compile(functools.partial(f, approximate="tanh"), backend="eager"),
    ],
)
def test_a_function_that_was_compiled_is_known(compiled: Callable[..., Any]) -> None:
    model = net(compiled(F.gelu))
    assert report(model) == {"act": "SiLU", "act_fn": "gelu"}
    assert type(model.act_fn) is FunctionalSUGAR


# --- SUGAR that was written by hand


another_name = sugar


def closed_over() -> Callable[..., Tensor]:
    inner = sugar

    def forward(self: Any, x: Tensor) -> Tensor:
        return inner(x)

    return forward


class ByHand(nn.Module):
    """Calls SUGAR in each way that `to_relu` can't replace, and in two that it can."""

    in_class = SUGAR()

    def __init__(self) -> None:
        super().__init__()
        self.act, self.function = SUGAR(), functools.partial(another_name, surrogate="nelu", alpha=0.3)
        self.bare = sugar
        self.in_list, self._private, self.nested = [SUGAR()], [SUGAR()], [[SUGAR()]]
        self._function = lambda x: sugar(x)
        self.of_act = self.act.forward
        self.relus = [nn.ReLU()]  # these are no business of to_relu

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.function(self.in_list[0](F.relu(x))))

    def block(self, x: Tensor) -> Tensor:
        return next(sugar(y) for y in (x,))

    def renamed(self, x: Tensor) -> Tensor:
        return another_name(x)

    def default(self, x: Tensor, act: Any = sugar) -> Tensor:
        return act(x)

    @property
    def value(self) -> Tensor:
        return sugar(torch.ones(1))

    closed = closed_over()


def test_an_attribute_that_the_class_has_too_is_left_and_named() -> None:
    """A module would be registered, and hidden by the attribute of the class."""

    class Block(nn.Module):
        act: Any = staticmethod(F.relu)
        other: Any = None

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.act, self.other, self.own = F.gelu, F.silu, F.relu

        def forward(self, x: Tensor) -> Tensor:
            return self.own(self.other(self.act(self.fc(x))))

    model, x = Block(), torch.randn(3, 4)
    expected = F.relu(F.silu(F.gelu(model.fc(x))))
    with pytest.warns(UserWarning, match=r"act \(an attribute of the class\).*other \(an attribute of the class\)"):
        sugarize(model)
    assert list(list_activations(model)) == ["own"]
    assert (model.act, model.other) == (F.gelu, F.silu)
    torch.testing.assert_close(model(x), expected)


@JIT_IS_DEPRECATED
def test_to_relu_names_the_sugar_that_it_cannot_replace() -> None:
    model = nn.ModuleDict({"h": ByHand(), "scripted": torch.jit.script(nn.Sequential(SUGAR()))})
    with pytest.warns(UserWarning, match="to_relu\\(\\) left SUGAR of ModuleDict") as caught:
        to_relu(model)
    assert len(caught) == 1
    text = str(caught[0].message)
    for found in (
        *("h.in_list (in a list)", "h.in_class (an attribute of the class)", "scripted (scripted)"),
        *(f"h.{name} (calls sugar())" for name in ("block", "renamed", "default", "value", "closed")),
        *("h._private (in a list)", "h.nested (in a list)", "h._function (called inside a function)"),
        "h.of_act (in a method)",
    ):
        assert found in text
    assert text.count("(") - text.count("()") == 12  # and names nothing else
    assert {type(act) for act in (model["h"].act, model["h"].function, model["h"].bare)} == {nn.ReLU}
    with pytest.raises(ValueError, match=r"no SUGAR activation below ByHand.*block \(calls sugar\(\)\)"):
        to_relu(model["h"])


def test_sugar_kept_as_a_function_is_an_activation_with_its_settings() -> None:
    x, model = net_input(), net(functools.partial(sugar, surrogate="nelu", alpha=0.3))
    assert list_activations(model) == {"act": "SiLU", "act_fn": "sugar"}
    expected = gradients(sugarize(net(F.relu), "nelu", alpha=0.3), x)
    sugarize(model, {"act": get_surrogate("nelu", alpha=0.3), "act_fn": "same"})
    torch.testing.assert_close(gradients(model, x), expected)
    sugarize(model, "bsilu", alpha=0.7)
    torch.testing.assert_close(gradients(model, x), gradients(sugarize(net(F.relu), "bsilu", alpha=0.7), x))


class RefusesSugar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.act, SUGAR):
            raise RuntimeError("no SUGAR here")
        return self.act(x)


@pytest.mark.parametrize("options", [{}, {"save_memory": True}], ids=str)
def test_a_warning_that_is_an_error_leaves_the_model_as_it_was(options: dict[str, Any]) -> None:
    model = Holder()
    with pytest.raises(UserWarning, match="left activations"):  # so it is in all tests here
        sugarize(model, **options)
    assert "SUGAR" not in list_activations(model).values()
    by_hand = ByHand()
    with pytest.raises(UserWarning, match="left SUGAR"):
        to_relu(by_hand)
    assert type(by_hand.act) is SUGAR


def test_a_model_that_fails_on_the_example_is_as_it_was() -> None:
    model = RefusesSugar()
    with pytest.raises(RuntimeError, match="no SUGAR here"):
        sugarize(model, example=torch.ones(2))
    assert type(model.act) is nn.GELU


# --- functions that overwrite their input


class OverwritesByFunction(nn.Module):
    def __init__(self, act: Callable[..., Tensor], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.act, self.args, self.kwargs = act, args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        h = x + 0
        self.act(h, *self.args, **self.kwargs)
        return self.last(x - h)


def test_a_function_that_overwrites_its_input_does_so_with_an_example() -> None:
    x = torch.randn(5, 4)
    for act in (F.relu_, functools.partial(F.relu, inplace=True)):
        model = OverwritesByFunction(act)
        expected = model(x)
        sugarize(model, example=x)
        assert torch.equal(model(x), expected)
        oracle = OverwritesByFunction(lambda h: h.copy_(sugar(h.clone())))
        torch.testing.assert_close(gradients(model, x), gradients(oracle, x))
        assert torch.equal(to_relu(model)(x), expected)


@pytest.mark.parametrize(("args", "kwargs"), [((True,), {}), ((), {"inplace": True})])
def test_an_example_shows_a_call_that_asks_a_function_to_overwrite(args: Any, kwargs: Any) -> None:
    model = OverwritesByFunction(F.relu, *args, **kwargs)
    with pytest.warns(UserWarning, match="computes something else"):
        sugarize(model, example=torch.randn(5, 4))


def test_what_overwrites_its_input_does_so_after_later_surgery() -> None:
    x, model = torch.randn(3, 4), ReturnsIt()
    expected = copy.deepcopy(model)(x)["out"]
    sugarize(model, example=x)
    sugarize(model, "nelu")
    assert torch.equal(model(x)["out"], expected)
    with sugarized(model, "bsilu"):
        assert torch.equal(model(x)["out"], expected)
    replace_activations(model, SUGAR)
    assert torch.equal(model(x)["out"], expected)
    with pytest.raises(ValueError, match="act overwrites its input, which GELU can't"):
        replace_activations(model, nn.GELU)
    alone = copy.deepcopy(model)
    alone.act = to_relu(alone.act.eval())
    assert (alone.act.inplace, alone.act.training) == (True, False)
    assert torch.equal(alone(x)["out"], expected)
    replace_activations(model, nn.ReLU)
    assert torch.equal(model(x)["out"], expected)


def test_an_input_that_the_next_activation_reads_is_read_again() -> None:
    class Chained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.ReLU(inplace=True), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            h = x + 0
            self.a(h)
            return self.b(h)

    x = torch.tensor([2.0, -1.0], requires_grad=True)
    model = sugarize(Chained(), example=x.detach())
    assert model.a.overwrites
    model(x).sum().backward()
    derivative = get_surrogate("bsilu").derivative
    torch.testing.assert_close(x.grad, derivative(x.detach(), 1.67) * derivative(F.relu(x.detach()), 1.67))


def test_replace_activations_takes_modules_alone() -> None:
    model = sugarize(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    for bad in (lambda: F.gelu, lambda: nn.GELU):
        with pytest.raises(TypeError, match="has to return a new module"):
            replace_activations(model, bad)
        assert type(model[1]) is SUGAR


def test_a_sparse_output_is_compared_too() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), Sparse())
    sugarize(model, example=torch.randn(3, 4))
    assert type(model[0]) is SUGAR


class Sparse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to_sparse()


def test_a_filter_holds_for_a_model_that_is_an_activation() -> None:
    with pytest.raises(ValueError, match="the filter leaves the activation"):
        sugarize(nn.ReLU(), filter_fn=lambda module, name: False)


# --- what looks like an activation of ours and isn't


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.RNN(2, 2, nonlinearity="relu"), "computes ReLU itself"),
        (nn.RNNCell(2, 2, nonlinearity="relu"), "computes ReLU itself"),
        (nn.Threshold(0.0, 0.0), "types=\\(Threshold,\\)"),
        (nn.Hardtanh(0.0, 6.0), "types=\\(Hardtanh,\\)"),
        (torch.ao.nn.intrinsic.ConvReLU2d(nn.Conv2d(1, 1, 1), nn.ReLU()), "sugarize before fuse_modules"),
        (torch.ao.nn.intrinsic.qat.LinearReLU(2, 2, qconfig=torch.ao.quantization.default_qconfig), "fuse_modules"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_that_computes_relu_itself_is_named(module: nn.Module, why: str) -> None:
    with pytest.warns(UserWarning, match=rf"left activations of Sequential: 1 \(.*{why}"):
        sugarize(nn.Sequential(nn.ReLU(), module))


def test_same_gives_celu_a_slope_of_1_at_0() -> None:
    model = sugarize(nn.Sequential(nn.CELU(2.0)), "same")
    x = torch.tensor([-1e-6, 1.0], requires_grad=True)
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(2))


torch.fx.wrap("sugar")


def test_a_call_of_sugar_in_a_graph_has_its_settings_and_can_be_replaced() -> None:
    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return sugar(x, "nelu", alpha=0.05)

    def gradient(model: nn.Module) -> Tensor:
        x = torch.tensor([-1.0, 1.0], requires_grad=True)
        return torch.autograd.grad(model(x).sum(), x)[0]

    graph, x = torch.fx.symbolic_trace(Calls()), torch.tensor([-1.0, 1.0])
    nelu = get_surrogate("nelu", alpha=0.05).derivative(x, 0.05)
    with sugarized(graph, "bsilu"):
        torch.testing.assert_close(gradient(graph), get_surrogate("bsilu").derivative(x, 1.67))
    torch.testing.assert_close(gradient(graph), nelu)
    torch.testing.assert_close(gradient(sugarize(graph, "same")), nelu)
    torch.testing.assert_close(gradient(to_relu(graph)), torch.tensor([0.0, 1.0]))
    assert "wrap" not in graph.code
    assert torch.fx.symbolic_trace(Functional())(x).shape == x.shape  # tracing works as before


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)
