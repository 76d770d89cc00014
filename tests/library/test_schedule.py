"""Parameters that change while a model trains: the gradient is the formula's with the value in force, and is not
compiled anew."""

from __future__ import annotations

import copy
import functools
import gc
import io
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fgi import SETTINGS, slope
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from timm_sugar import SUGAR, SurrogateSchedule, _compiled, _torch, register_surrogate, set_surrogate, sugar
from timm_sugar import surrogate as surrogate_module
from timm_sugar.surgery import sugarize, to_relu

EXACT = {"rtol": 1e-12, "atol": 1e-15}
ALPHAS = (1.67, 0.5, 0.0, 1.0, 0.123456789, 3.0)


def points(dtype: torch.dtype = torch.float64, size: int = 41) -> Tensor:
    return torch.linspace(-5.1, 5, size, dtype=dtype)


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


@pytest.fixture
def graphs() -> Callable[[], int]:
    """The number of graphs that torch.compile has made since."""
    torch.compiler.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


# --- set_surrogate


def test_module_shows_its_surrogate_and_parameters_as_attributes() -> None:
    for name, parameters in SETTINGS.items():
        module = SUGAR(surrogate=name, **parameters)
        assert module.surrogate == name
        for key, value in parameters.items():
            assert getattr(module, key) == value
    assert not hasattr(SUGAR(surrogate="gelu"), "alpha")
    assert not hasattr(SUGAR(), "negative_slope")
    with pytest.raises(AttributeError, match="no attribute 'beta'"):
        SUGAR().beta  # noqa: B018


def test_attributes_can_be_set_and_are_checked() -> None:
    module = SUGAR()
    module.alpha = 0.5
    assert (module.alpha, module.values, repr(module)) == (0.5, [0.5], "SUGAR(surrogate='bsilu', alpha=0.5)")
    torch.testing.assert_close(gradient(module, points()), slope(points(), alpha=0.5), **EXACT)
    module.surrogate = "nelu"
    torch.testing.assert_close(gradient(module, points()), slope(points(), "nelu"), **EXACT)
    with pytest.raises(ValueError, match="alpha"):
        module.alpha = -1
    with pytest.raises(ValueError, match="unknown surrogate"):
        module.surrogate = "nope"
    assert (module.surrogate, module.alpha) == ("nelu", 0.01)


def test_set_surrogate_reaches_every_module_with_the_parameter() -> None:
    model = nn.Sequential(nn.ReLU(), nn.GELU(), nn.Sequential(nn.SiLU()), SUGAR(surrogate="elu"))
    sugarize(model, surrogate={"0": "bsilu", "1": "gelu", "2.0": "nelu", "3": "elu"})
    assert set_surrogate(model, alpha=0.3) is model
    assert [module.values for module in model.modules() if isinstance(module, SUGAR)] == [[0.3], [], [0.3], [0.3]]
    set_surrogate(model, "leaky_relu", negative_slope=0.2)
    for module in (model[0], model[1], model[2][0], model[3]):
        torch.testing.assert_close(
            gradient(module, points()), slope(points(), "leaky_relu", negative_slope=0.2), **EXACT
        )


def test_set_surrogate_takes_a_module_and_a_compiled_and_a_wrapped_model() -> None:
    module = SUGAR()
    set_surrogate(module, alpha=0.1)
    set_surrogate(torch.compile(nn.Sequential(module)), alpha=0.2)
    assert module.alpha == 0.2


@pytest.mark.parametrize(
    ("parameters", "error", "text"),
    [
        ({"beta": 1.0}, TypeError, "no surrogate of the model"),
        ({"alpha": -1.0}, ValueError, "alpha"),
        ({"alpha": math.nan}, ValueError, "alpha"),
        ({"alpha": "1"}, TypeError, "number"),
        ({"surrogate": "nope"}, ValueError, "unknown surrogate"),
        ({"surrogate": "gelu", "alpha": 1.0}, TypeError, "alpha"),
        ({}, TypeError, "needs a surrogate"),
    ],
)
def test_bad_settings_change_nothing(parameters: dict[str, Any], error: type[Exception], text: str) -> None:
    model = nn.Sequential(SUGAR(), SUGAR(surrogate="elu"))
    with pytest.raises(error, match=text):
        set_surrogate(model, **parameters)
    assert [module.alpha for module in model] == [1.67, 1.0]


def test_what_holds_no_sugar_module_is_refused() -> None:
    with pytest.raises(ValueError, match="no SUGAR module"):
        set_surrogate(nn.ReLU(), alpha=1.0)
    with pytest.raises(ValueError, match=r"torch\.fx"):
        set_surrogate(torch.fx.symbolic_trace(nn.Sequential(SUGAR())), alpha=1.0)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        set_surrogate("resnet18_sugar", alpha=1.0)  # type: ignore[arg-type]


# --- eager mode


def test_backward_pass_has_the_values_of_its_forward_pass() -> None:
    module, x = SUGAR(alpha=1.0), points().requires_grad_()
    y = module(x)
    module.alpha = 0.2
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], slope(x, alpha=1.0), **EXACT)


@pytest.mark.needs_compiled_gradient
@pytest.mark.parametrize("surrogate", [name for name, parameters in SETTINGS.items() if parameters])
def test_eager_mode_compiles_nothing_for_new_values(surrogate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.dtype] = []

    def compile_graph(graph: Any, examples: list[Tensor]) -> Any:
        made.append(examples[0].dtype)
        return graph

    monkeypatch.setattr(_torch, "compile_graph", compile_graph)
    for name, value in {"_kernels": {}, "_off": set(), "_CHUNK": 7, "_WORTHWHILE": 7}.items():
        monkeypatch.setattr(_compiled, name, value)
    (key,) = SETTINGS[surrogate]
    module, x = SUGAR(surrogate=surrogate), points(torch.float32, 4096)
    for value in ALPHAS:
        module.set_surrogate(**{key: value})
        expected = slope(x, surrogate, **{key: value})
        torch.testing.assert_close(gradient(module, x).double(), expected, rtol=1e-5, atol=2e-6)
    assert made == [torch.float32]


@pytest.mark.slow
def test_many_values_leave_nothing_behind() -> None:
    model = nn.Sequential(SUGAR(), SUGAR())
    schedule = SurrogateSchedule(model, alpha=(1.67, 0.1), updates=5000)
    for _ in range(1200):  # more than the cache of values holds
        schedule.step()
        gradient(model, points(torch.float32, 20_000))
    gc.collect()
    before, objects = _compiled._scalars.cache_info().currsize, len(gc.get_objects())
    for _ in range(200):
        schedule.step()
        gradient(model, points(torch.float32, 20_000))
    gc.collect()
    assert _compiled._scalars.cache_info().currsize == before or before < 1024
    assert len(gc.get_objects()) - objects < 400


# --- torch.compile


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_model_is_compiled_twice_at_most(
    backend: str, dtype: torch.dtype, graphs: Callable[[], int]
) -> None:
    model = nn.Sequential(SUGAR(), SUGAR(alpha=0.3))
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    x, precise = points(dtype), dtype == torch.float64
    rounding = EXACT if precise else {"rtol": 1.01 * torch.finfo(dtype).eps, "atol": 2e-6}
    gradient(compiled, x)
    for alpha in ALPHAS:
        set_surrogate(model, alpha=alpha)
        expected = slope(x, alpha=alpha) * slope(torch.relu(x), alpha=alpha)
        if dtype == torch.bfloat16:
            rounding = {"rtol": 2**-6, "atol": 1e-5}  # rounded twice
        torch.testing.assert_close(gradient(compiled, x).double(), expected, **rounding)
    assert graphs() == 2


@pytest.mark.parametrize("surrogate", [name for name, parameters in SETTINGS.items() if parameters])
def test_a_schedule_that_is_there_first_is_compiled_once(surrogate: str, graphs: Callable[[], int]) -> None:
    (key,) = SETTINGS[surrogate]
    module = SUGAR(surrogate=surrogate)
    compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
    pair: Any = {key: (1.0, 0.0)}
    schedule = SurrogateSchedule(module, updates=6, shape="linear", **pair)
    for _ in range(8):
        expected = slope(points(), surrogate, **{key: schedule.values()[key]})
        torch.testing.assert_close(gradient(compiled, points()), expected, **EXACT)
        schedule.step()
    assert graphs() == 1


def test_compiled_backward_pass_has_the_values_of_its_forward_pass(graphs: Callable[[], int]) -> None:
    module = SUGAR()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    set_surrogate(module, alpha=1.0)
    x = points().requires_grad_()
    y = compiled(x)
    set_surrogate(module, alpha=0.2)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], slope(x, alpha=1.0), **EXACT)


@pytest.mark.parametrize("compiled", ["not at all", "around the checkpoint"])
def test_a_checkpoint_has_the_values_of_the_forward_pass(compiled: str) -> None:
    module = SUGAR(surrogate="nelu")
    module.set_surrogate(alpha=0.5)
    call = functools.partial(checkpoint, module, use_reentrant=False)
    if compiled == "around the checkpoint":
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    x = torch.tensor([-2.0, -1.0, 1.0], dtype=torch.float64, requires_grad=True)
    y = call(x)
    module.set_surrogate("bsilu", alpha=2.0)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], slope(x.detach(), "nelu", alpha=0.5))


def test_transforms_of_and_in_compiled_code_take_the_values_too(graphs: Callable[[], int]) -> None:
    module = SUGAR()
    inside: Any = torch.compile(lambda x: torch.func.grad(lambda t: module(t).sum())(x), backend="aot_eager")
    for alpha in (0.5, 0.2):
        set_surrogate(module, alpha=alpha)
        torch.testing.assert_close(inside(points()), slope(points(), alpha=alpha), **EXACT)


OF_NUMBERS: dict[str, Callable[[float], Any]] = {
    "a function of numbers": math.sqrt,
    "a type": lambda a: a if isinstance(a, float) else 7 * a,
    "a key": lambda a: {1.0: 0.25, 4.0: 0.5}.get(a, 2.0),
    "a fill": lambda a: torch.full((), a, dtype=torch.float64),  # inductor would keep the first one
    "a text": lambda a: {"1.0": 0.25, "4.0": 0.5}.get(f"{a}", 2.0),
}


@pytest.mark.parametrize("kind", OF_NUMBERS)
def test_formula_that_needs_numbers_is_right_and_compiled_for_each(
    kind: str, graphs: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surrogate_module, "_surrogates", dict(surrogate_module._surrogates))
    of_number = OF_NUMBERS[kind]
    register_surrogate(f"of {kind}", derivative=lambda x, a: of_number(a) * torch.sigmoid(x), a=2.0)
    module = SUGAR(surrogate=f"of {kind}")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for a in (1.0, 4.0, 9.0):
        set_surrogate(module, a=a)
        torch.testing.assert_close(gradient(compiled, points()), of_number(a) * torch.sigmoid(points()), **EXACT)
    assert graphs() == 3


@pytest.mark.needs_compiled_gradient
@pytest.mark.parametrize("size", [41, 200_000])
def test_formula_that_looks_at_its_parameter_is_right_for_tensors_of_any_size(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is traced looks at something else; at the first value both are alike."""

    def derivative(x: Tensor, a: float) -> Tensor:
        return (x > 0).to(x.dtype) if isinstance(a, float) and a > 4 else torch.sigmoid(a * x)

    monkeypatch.setattr(surrogate_module, "_surrogates", dict(surrogate_module._surrogates))
    register_surrogate("sharp", derivative=derivative, a=1.0)
    for a in (1.0, 6.0, 1.5):
        found = gradient(SUGAR(surrogate="sharp", a=a), points(size=size))
        torch.testing.assert_close(found, derivative(points(size=size), a), rtol=1e-9, atol=1e-12)


# --- other routes, after values were changed


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("route", ["deepcopy", "pickle", "fx", "export", "script"])
def test_copies_and_graphs_have_the_values_in_force(route: str) -> None:
    model = set_surrogate(nn.Sequential(SUGAR(), SUGAR(surrogate="nelu")), alpha=0.4)
    routes: dict[str, Callable[[Any], Any]] = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "fx": torch.fx.symbolic_trace,
        "export": lambda model: torch.export.export(model, (points(),)).module(),
        "script": torch.jit.script,
    }
    copied = routes[route](model)
    assert not copied.state_dict()
    expected = slope(points(), alpha=0.4) * slope(torch.relu(points()), "nelu", alpha=0.4)
    torch.testing.assert_close(gradient(copied, points()), expected, **EXACT)


# --- SurrogateSchedule


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [1.6, 1.2, 0.8, 0.4, 0.0, 0.0]),
        ("cosine", [0.8 * (1 + math.cos(math.pi * i / 4)) for i in range(5)] + [0.0]),
    ],
)
def test_values_go_from_the_first_to_the_last_and_stay(shape: str, expected: list[float]) -> None:
    model = nn.Sequential(SUGAR(), SUGAR(surrogate="gelu"))
    schedule = SurrogateSchedule(model, alpha=(1.6, 0), updates=4, shape=shape)
    seen = []
    for _ in expected:
        assert model[0].alpha == schedule.values()["alpha"]
        seen.append(model[0].alpha)
        schedule.step()
    assert seen == pytest.approx(expected)
    assert seen[0] == 1.6
    assert seen[-1] == 0


def test_a_resumed_schedule_goes_on_bit_for_bit() -> None:
    def values(steps: int, schedule: SurrogateSchedule) -> list[float]:
        found = []
        for _ in range(steps):
            schedule.step()
            found += [module.alpha for module in schedule._modules]
        return found

    whole = values(10, SurrogateSchedule(nn.Sequential(SUGAR(), SUGAR()), alpha=(1.67, 0.1), updates=9))
    first = SurrogateSchedule(nn.Sequential(SUGAR(), SUGAR()), alpha=(1.67, 0.1), updates=9)
    begun = values(4, first)
    resumed = SurrogateSchedule(nn.Sequential(SUGAR(), SUGAR()), alpha=(1.67, 0.1), updates=9)
    resumed.load_state_dict(first.state_dict())
    assert [module.alpha for module in resumed._modules] == begun[-2:]
    assert begun + values(6, resumed) == whole


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"alpha": (1.0, 0.1), "updates": 0}, ValueError, "updates"),
        ({"alpha": (1.0, 0.1), "updates": 1.5}, ValueError, "updates"),
        ({"alpha": (1.0, 0.1), "updates": 2, "shape": "sine"}, ValueError, "choose one of cosine, linear"),
        ({"updates": 2}, TypeError, "needs a parameter"),
        ({"alpha": 1.0, "updates": 2}, TypeError, "first and last"),
        ({"alpha": (1.0, -0.1), "updates": 2}, ValueError, "alpha"),
        ({"alpha": (1.0, "a"), "updates": 2}, TypeError, "number"),
        ({"gain": (1.0, 0.1), "updates": 2}, TypeError, "no surrogate of the model"),
    ],
)
def test_bad_schedules_are_refused_in_one_line_and_change_nothing(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    module = SUGAR()
    with pytest.raises(error, match=text) as caught:
        SurrogateSchedule(module, **arguments)
    assert "\n" not in str(caught.value)
    assert module.alpha == 1.67


def test_a_function_is_refused_by_name() -> None:
    model = sugarize(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    model.act = functools.partial(sugar, alpha=0.5)
    with pytest.raises(ValueError, match="act of Sequential is sugar\\(\\), with fixed values"):
        set_surrogate(model, alpha=0.3)


def test_values_that_are_assigned_hold_as_set_ones_do() -> None:
    module = SUGAR(surrogate="nelu")
    module.set_surrogate(alpha=0.2)
    module.values = [0.3]
    assert module.alpha == 0.3
    assert module.run_time.double[0] == 0.3
    with pytest.raises(ValueError, match="alpha"):
        module.values = [-1.0]
    module.values[0] = 0.7  # of a copy
    assert (module.alpha, module.values) == (0.3, [0.3])


def test_values_that_are_set_in_inference_mode_train() -> None:
    module = SUGAR(surrogate="nelu")
    with torch.inference_mode():
        module.set_surrogate(alpha=0.5)
    x = torch.tensor([-1.0], requires_grad=True)
    torch.compile(module, backend="aot_eager")(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([-0.25]))


@pytest.mark.parametrize("without", ["values", "a device"])
def test_values_are_right_in_compiled_code_after_a_load_that_brings_no_tensors(without: str) -> None:
    model = set_surrogate(nn.Sequential(nn.Linear(8, 8, dtype=torch.float64), SUGAR(surrogate="nelu")), alpha=0.5)
    file, x = io.BytesIO(), torch.randn(4, 8, dtype=torch.float64)
    with torch.serialization.skip_data() if without == "values" else nullcontext():
        torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, map_location="meta" if without == "a device" else None, weights_only=False)
    loaded.load_state_dict(model.state_dict(), assign=True)
    before = model[0](x)
    expected = slope(before, "nelu", alpha=0.5) @ model[0].weight
    torch.testing.assert_close(gradient(torch.compile(loaded, backend="aot_eager"), x), expected, **EXACT)


def test_a_copy_that_is_made_in_inference_mode_trains() -> None:
    module = SUGAR(surrogate="nelu")
    module.set_surrogate(alpha=0.5)
    with torch.inference_mode():
        copied = copy.deepcopy(module)
    x = torch.tensor([-1.0])
    torch.testing.assert_close(gradient(torch.compile(copied, backend="aot_eager"), x), torch.tensor([-0.25]))


@pytest.mark.parametrize(
    "change", [lambda model: sugarize(model, "nelu", alpha=0.3), to_relu], ids=("sugarize", "to_relu")
)
def test_a_schedule_says_that_the_model_has_other_modules_now(change: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), SUGAR(), nn.Linear(2, 2), SUGAR())
    schedule = SurrogateSchedule(model, alpha=(1.67, 0.1), updates=4)
    schedule.step()
    change(model)
    with pytest.raises(RuntimeError, match=r"other SUGAR modules.*make another one"):
        schedule.step()
