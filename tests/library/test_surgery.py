"""`sugarize` and `to_relu`: what is replaced, what never, what is kept, and that outputs and gradients are right."""

from __future__ import annotations

import copy
import functools
import pickle
from collections import OrderedDict
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

from timm_sugar import SUGAR, sugarize, to_relu
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
    *[nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Hardtanh, nn.Softmax, nn.LogSoftmax, nn.PReLU, nn.Softplus, nn.GLU],
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

    def forward(self, x: Tensor) -> Tensor:
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


def types(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules()]


# --- which types


@pytest.mark.parametrize("kind", HIDDEN, ids=name_of)
def test_hidden_activation_is_replaced(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), build(kind))
    original = type(model[1]).__name__
    assert sugarize(model) == {"1": original}
    assert type(model[1]) is SUGAR


@pytest.mark.parametrize("kind", NEVER, ids=name_of)
def test_gate_is_never_replaced(kind: Any) -> None:
    model = nn.Sequential(OrderedDict(gate=build(kind), act=nn.ReLU()))
    gate = model.gate
    assert sugarize(model) == {"act": "ReLU"}
    assert model.gate is gate
    with pytest.raises(ValueError, match="nothing to replace"):
        sugarize(nn.Sequential(build(kind)))


@pytest.mark.parametrize("function", FUNCTIONS, ids=name_of)
@pytest.mark.parametrize("partial", [False, True])
def test_function_kept_as_an_attribute_is_replaced(function: Callable[..., Tensor], partial: bool) -> None:
    model = net(functools.partial(function) if partial else function)
    name = getattr(function, "__name__", "")
    assert sugarize(model, filter=lambda place, _: place == "act_fn") == {"act_fn": name}
    x = torch.tensor([-1.5, 2.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(model.act_fn(x, inplace=True).sum(), x)
    torch.testing.assert_close(grad, slope(x))
    assert type(model.act_fn) is FunctionalSUGAR


@pytest.mark.parametrize("function", NEVER_FUNCTIONS, ids=name_of)
def test_function_that_is_a_gate_is_never_replaced(function: Callable[..., Tensor]) -> None:
    model = net(function)
    assert sugarize(model) == {"act": "SiLU"}
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
    report = sugarize(model, "nelu", alpha=0.3)
    assert report == {"act": "SiLU", "act_fn": "gelu"}
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
    assert sugarize(model) == {"a": "ReLU", "block.1": "ReLU", "b.0": "ReLU", "own": "ReLU"}
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
    assert sugarize(model, "nelu", alpha=0.05) == {}
    assert [model.act, model.act_fn] == before


@pytest.mark.parametrize("settings", [{"surrogate": "nelu", "alpha": 0.05}, {"surrogate": "gelu"}, {"alpha": 1.0}])
def test_surrogate_is_set_again(settings: dict[str, Any]) -> None:
    model = net()
    sugarize(model)
    kinds = type(model.act), type(model.act_fn)
    assert sugarize(model, **settings) == {"act": "SUGAR", "act_fn": "FunctionalSUGAR"}
    assert repr(model.act) == repr(SUGAR(**settings))
    assert (type(model.act), type(model.act_fn)) == kinds
    x = torch.tensor([-0.7, 0.4], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(model.act_fn(x).sum(), x)
    torch.testing.assert_close(grad, slope(x, **settings))


def test_filter_takes_name_and_activation() -> None:
    seen = []
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.GELU(), nn.ReLU()))

    def only_gelu(name: str, activation: Any) -> bool:
        seen.append((name, activation))
        return isinstance(activation, nn.GELU)

    assert sugarize(model, filter=only_gelu) == {"1.0": "GELU"}
    assert [name for name, _ in seen] == ["0", "1.0", "1.1"]
    assert [type(m) for m in (model[0], model[1][0], model[1][1])] == [nn.ReLU, SUGAR, nn.ReLU]


def test_filter_that_leaves_nothing_raises() -> None:
    with pytest.raises(ValueError, match=r"nothing to replace in Net.*filter"):
        sugarize(net(), filter=lambda *_: False)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Sigmoid(), nn.Tanh()), nn.ModuleList()])
def test_nothing_to_replace_raises(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"nothing to replace in {type(model).__name__}"):
        sugarize(model)
    with pytest.raises(ValueError, match="there is no SUGAR activation"):
        to_relu(model)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.GELU(), timm_layers.GELU(), SUGAR()])
def test_model_that_is_an_activation_itself_raises(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="activation itself"):
        sugarize(model)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"surrogate": "nope"}, ValueError),
        ({"alpha": float("nan")}, ValueError),
        ({"alpha": "1"}, TypeError),
        ({"beta": 1.0}, TypeError),
        ({"filter": lambda *_: 1 / 0}, ZeroDivisionError),
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
    assert set(sugarize(model).values()) == expected
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
    assert list(sugarize(model)) == ["0.act_fn"]
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

    def forward(self, x: Tensor) -> Tensor:
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
    report = sugarize(traced, "nelu", alpha=0.3)
    assert sorted(report.values()) == ["SiLU", "gelu", "relu", "relu", "relu", "relu_"]
    oracle = calls(OracleCalls)
    torch.testing.assert_close(traced(x), oracle(x), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(gradients(traced, x), gradients(oracle, x), rtol=1e-9, atol=1e-12)
    assert sugarize(traced, "nelu", alpha=0.3) == {}


def test_traced_graph_inside_a_model_is_reached() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4).double(), torch.fx.symbolic_trace(calls())), calls_input()
    report = sugarize(model, "nelu", alpha=0.3)
    assert all(name.startswith("1.") for name in report)
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
    assert sugarize(torch.fx.symbolic_trace(Alone())) == {"relu": "relu"}


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


def test_report_of_to_relu_names_what_was_replaced() -> None:
    model = net()
    sugarize(model)
    assert to_relu(model) == ["act", "act_fn"]
    assert type(model.act) is nn.ReLU
    assert model.act_fn is F.relu


def test_round_trip_gives_the_surrogate_back() -> None:
    model, x = net(), net_input()
    sugarize(model, "nelu", alpha=0.3)
    expected = gradients(model, x)
    to_relu(model)
    assert sugarize(model, "nelu", alpha=0.3) == {"act": "ReLU", "act_fn": "relu"}
    torch.testing.assert_close(gradients(model, x), expected, rtol=0, atol=0)
