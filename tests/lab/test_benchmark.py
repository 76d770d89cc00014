"""Benchmarks: what noise leaves alone. Order, medians, ratios, slopes, formulations, bytes, counts, whole CSV files."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fgi import SETTINGS, slope
from lab.bench import cost, variants
from lab.bench import timing as benchmark
from lab.bench.workloads import TrainingStep, Workload, backward_loops
from lab.files import read_rows
from scripting import error_line, load_script
from torch import nn

from timm_sugar import SUGAR

script = load_script("benchmark")
ROOT = Path(__file__).parents[2]
TINY = ("--model", "test_resnet", "--batch-size", "2", "--img-size", "32", "--repeats", "2")
ENVIRONMENT = {"device": "cpu", "machine": "M", "cores": "2", "threads": "1", "torch": "2", "timm": "1"}


def test_every_variant_has_every_turn_equally_often() -> None:
    orders = list(benchmark.rotations(["a", "b", "c"], 6))
    assert orders[:3] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    for turn in zip(*orders, strict=True):
        assert sorted(turn) == ["a", "a", "b", "b", "c", "c"]


def test_measures_take_turns_and_keep_their_own_samples() -> None:
    calls: list[str] = []
    measures = {name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}  # type: ignore[misc]
    samples = benchmark.interleave(measures, 4)
    assert "".join(calls) == "abcbcacababc"
    assert samples == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 10, 15])
def test_median_and_quartiles_are_numpys(count: int) -> None:
    samples = np.random.default_rng(count).exponential(size=count)
    assert benchmark.quartiles(samples.tolist()) == pytest.approx(tuple(np.percentile(samples, [25, 50, 75])))


def test_ratios_are_of_the_same_repeat_so_that_drift_cancels() -> None:
    samples = {"relu": [1.0, 2.0, 4.0, 8.0], "own": [2.0, 4.0, 8.0, 16.0], "sugar": [1.5, 3.0, 6.0, 12.0]}
    rows = {row["variant"]: row for row in cost.summarize({}, "step", "s", samples, dict.fromkeys(samples, ""), {})}
    for name, to_relu, to_own in (("relu", 1, 0.5), ("own", 2, 1), ("sugar", 1.5, 0.75)):
        assert [float(rows[name][f"to_relu{end}"]) for end in ("", "_q1", "_q3")] == [to_relu] * 3
        assert [float(rows[name][f"to_own{end}"]) for end in ("", "_q1", "_q3")] == [to_own] * 3
    assert (rows["sugar"]["q1"], rows["sugar"]["median"], rows["sugar"]["q3"]) == ("2.625", "4.5", "7.5")


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 1.0, 2.25])
def test_slope_of_a_power_law_is_its_exponent(exponent: float) -> None:
    sizes = [4.0, 16.0, 100.0, 3000.0]
    assert benchmark.slope(sizes, [7 * size**exponent for size in sizes]) == pytest.approx(exponent, abs=1e-12)


def test_a_watch_tells_the_time_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    with monkeypatch.context() as clock:
        clock.setattr(benchmark.time, "perf_counter", lambda: 3.0 * len(calls))  # each call takes three seconds
        assert benchmark.stopwatch(lambda: calls.append(None), calls=7)() == 3.0
    assert len(calls) == 7
    assert benchmark.calls_for(lambda: sum(range(1000)), "cpu", least=0.01) > 10
    assert benchmark.calls_for(lambda: None, "cpu", least=0.0) == 1


@pytest.mark.parametrize("name", ["sugar", *variants.ALTERNATIVES])
@pytest.mark.parametrize("surrogate", SETTINGS)
def test_alternatives_have_relus_value_and_the_formulas_gradient(surrogate: str, name: str) -> None:
    x = torch.linspace(-6, 6, 200, dtype=torch.float64).requires_grad_()
    y = variants.make_activation(name, {"surrogate": surrogate, **SETTINGS[surrogate]})(x)
    upstream = torch.linspace(1, 2, 200, dtype=torch.float64)
    (grad,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(y, F.relu(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(grad, upstream * slope(x, surrogate, **SETTINGS[surrogate]), rtol=1e-12, atol=1e-14)


def test_settings_of_a_variant_come_before_those_of_all() -> None:
    activation = variants.make_activation("sugar:surrogate=nelu,alpha=0.05", {"surrogate": "elu", "alpha": 2})
    assert (activation.surrogate, activation.values) == ("nelu", [0.05])
    assert variants.parse("sugar:a=True,b=false,c=1,d=x") == ("sugar", {"a": True, "b": False, "c": 1, "d": "x"})
    assert variants.describe("fgi", {"alpha": 2.0}) == "surrogate='bsilu', alpha=2"
    assert variants.describe("relu", {"alpha": 2.0}) == variants.describe("own", {}) == ""


def test_x_mlps_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "INSTALLED", False)
    with pytest.raises(ValueError, match="needs the package"):
        variants.make_activation("x-mlps", {})
    stand_in = ModuleType("activations")
    stand_in.BSiLU = lambda alpha: ("bsilu", alpha)  # type: ignore[attr-defined]
    stand_in.NeLU = lambda alpha: ("nelu", alpha)  # type: ignore[attr-defined]
    stand_in.Sugar = lambda forward, backward: (type(forward), backward)  # type: ignore[attr-defined]
    package = ModuleType("x_mlps_pytorch")
    package.activations = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "x_mlps_pytorch", package)
    monkeypatch.setattr(variants, "INSTALLED", True)
    assert variants.make_activation("x-mlps", {"alpha": 1.5}) == (nn.ReLU, ("bsilu", 1.5))
    assert variants.make_activation("x-mlps", {"surrogate": "nelu"}) == (nn.ReLU, ("nelu", 0.01))
    with pytest.raises(ValueError, match="no surrogate 'mish'"):
        variants.make_activation("x-mlps", {"surrogate": "mish"})


def kinds(model: nn.Module) -> list[type]:
    """Types of the hidden activations of a network."""
    types = (nn.ReLU, nn.GELU, SUGAR, variants.Alternative)
    return [type(module) for module in model.modules() if isinstance(module, types)]


def test_variants_of_a_network_differ_in_nothing_but_their_activations() -> None:
    built = {name: variants.make_model("test_resnet", name, {"alpha": 2}) for name in ("own", "relu", "sugar", "fgi")}
    own = built["own"].state_dict()
    for name, kind in (("own", nn.ReLU), ("relu", nn.ReLU), ("sugar", SUGAR), ("fgi", variants.Alternative)):
        assert set(kinds(built[name])) == {kind}
        assert len(kinds(built[name])) == len(kinds(built["own"]))
        weights = built[name].state_dict()
        assert weights.keys() == own.keys()
        assert all(torch.equal(weights[key], own[key]) for key in own)
    inplace = {name: {m.inplace for m in built[name].modules() if isinstance(m, nn.ReLU)} for name in ("own", "relu")}
    assert inplace == {"own": {True}, "relu": {False}}
    assert all(module.values == [2.0] for module in built["fgi"].modules() if isinstance(module, variants.Alternative))


@pytest.mark.parametrize(
    ("activation", "tensors"),
    [
        (nn.ReLU(), 1),  # its result, for its own gradient and the next layer's
        (nn.Sigmoid(), 1),
        (nn.Identity(), 1),
        (SUGAR(), 2),  # the pre-activation as well
        (variants.make_activation("function", {}), 2),
        (variants.make_activation("fgi", {}), 2),  # the derivative and the result
        (variants.make_activation("detach", {}), 3),  # x + alpha, the sigmoid, the result
    ],
    ids=["relu", "sigmoid", "identity", "sugar", "function", "fgi", "detach"],
)
def test_bytes_kept_are_those_counted_by_hand(activation: nn.Module, tensors: int) -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), activation, nn.Linear(16, 2)), torch.randn(4, 8)
    for _ in range(2):
        assert benchmark.kept_bytes(lambda: model(x)) == tensors * 4 * 16 * 4 + 4 * 2 * 4
    with torch.no_grad():
        assert benchmark.kept_bytes(lambda: model(x)) == 4 * 2 * 4


def test_most_bytes_are_those_counted_by_hand() -> None:
    def work() -> torch.Tensor:
        a = torch.ones(1000)
        b = a + a
        del a
        c = b.double()
        del b
        return c.float()

    assert benchmark.most_bytes(work) == 8000 + 4000


@pytest.mark.parametrize("name", [pytest.param("resnet18", marks=pytest.mark.slow), "convnext_atto"])
@pytest.mark.slow
def test_a_step_with_sugar_holds_no_more_in_tensors_than_with_relu(name: str) -> None:
    """Apart from one value that is computed again at a time."""
    work = Workload(name, batch_size=8, img_size=64, dtype="float32")
    most = {variant: work.peak_memory(variant, 1)["tensors"] for variant in ("relu", "function", "sugar")}
    assert most["sugar"] <= 1.02 * most["relu"]
    assert most["function"] > 1.05 * most["relu"]


# Not SUGAR, which shares no buffer where hooks watch what is saved: tests/test_sharing.py counts that in another way.
@pytest.mark.parametrize("variant", ["own", "relu", "gelu", "function"])
def test_bytes_kept_by_a_network_are_the_storages_that_autograd_saves(variant: str) -> None:
    step = Workload("test_resnet", batch_size=2, img_size=32, dtype="float32").training_step(variant)
    known = {x.untyped_storage().data_ptr() for x in [step.images, *step.model.parameters(), *step.model.buffers()]}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = step.loss()
    saved = sum(storage.nbytes() for address, storage in storages.items() if address not in known)
    del loss
    storages.clear()
    labels = step.labels.nbytes  # saved, too, and there before
    assert step.kept_bytes() == pytest.approx(saved - labels, abs=64)  # the loss and other scalars


def test_graph_breaks_and_recompilations_are_counted() -> None:
    sizes = iter((2, 3, 4, 5))

    def breaks(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    torch._dynamo.reset()
    whole = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    assert benchmark.count_compilation(lambda: whole(torch.ones(3))) == (0, 0)
    assert benchmark.count_compilation(lambda: whole(torch.ones(next(sizes), 1)), steps=4) == (0, 3)
    broken = torch.compile(breaks, backend="eager")
    assert benchmark.count_compilation(lambda: broken(torch.ones(3))) == (1, 0)
    assert benchmark.count_compilation(lambda: whole(torch.ones(3))) == (0, 0)  # of the function alone
    torch._dynamo.reset()


def test_a_step_trains_as_sgd_does() -> None:
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.randn(5, 3, 2, 2)
    weight = model[1].weight.detach().clone()
    step = TrainingStep(model, images, torch.float32, classes=3)
    for _ in range(2):  # the first step's gradient is gone in the second
        probabilities = (images.flatten(1) @ model[1].weight.T + model[1].bias).softmax(1).detach()
        expected = (probabilities - F.one_hot(torch.tensor([0, 1, 2, 0, 1]))).T @ images.flatten(1) / 5
        step()
        torch.testing.assert_close(model[1].weight.grad, expected)
    assert not torch.equal(model[1].weight, weight)


def test_images_are_of_the_size_that_is_asked_for() -> None:
    assert Workload("test_resnet", batch_size=2).images().shape == (2, 3, 160, 160)  # the model's own
    assert Workload("test_vit", batch_size=1, img_size=64).model("own").patch_embed.img_size == (64, 64)
    last = Workload("test_resnet", batch_size=2, img_size=32, channels_last=True)
    assert last.images().is_contiguous(memory_format=torch.channels_last)
    assert last.model("sugar").conv1[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_the_exported_graph_is_that_of_inference_with_relu() -> None:
    graph = Workload("test_resnet", batch_size=2, img_size=32).exported_graph("sugar")
    assert graph.count("aten.relu.default") == 12
    assert "timm_sugar" not in graph
    assert len(re.findall(r"batch_norm\.default\]\(.*, (?:training = )?False, 0\.1, 1e-05", graph)) > 5  # eval mode


def rows_of(samples: dict[str, list[float]], metric: str = "step", **setting: object) -> list[dict[str, str]]:
    """Rows as one run makes them."""
    return cost.summarize(setting, metric, "s", samples, dict.fromkeys(samples, ""), ENVIRONMENT)


def test_a_row_takes_the_place_of_the_one_with_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "new" / "benchmark_model.csv"
    cost.record(path, rows_of({"relu": [1.0], "sugar": [2.0]}, subject="a"))
    cost.record(path, rows_of({"relu": [1.0], "sugar": [3.0]}, subject="b"))
    cost.record(path, rows_of({"sugar": [5.0]}, subject="a"))
    found = [(row["subject"], row["variant"], row["median"]) for row in read_rows(path)]
    assert found == [("a", "relu", "1"), ("a", "sugar", "5"), ("b", "relu", "1"), ("b", "sugar", "3")]
    elsewhere = [row | {"machine": "another"} for row in rows_of({"sugar": [7.0]}, subject="a")]
    cost.record(path, elsewhere)
    assert [row["median"] for row in read_rows(path)] == ["1", "5", "1", "3", "7"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_commit_is_marked_where_code_has_changed_and_not_where_results_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=A", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    monkeypatch.setattr(cost, "ROOT", tmp_path)
    assert cost.commit() == ""
    for name in ("timm_sugar", "scripts", "results"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("old")
    git("init")
    git("add", "-A")
    git("commit", "-m", "first")
    head = git("rev-parse", "--short", "HEAD").strip()
    (tmp_path / "results" / "file").write_text("new")
    assert cost.commit() == head
    (tmp_path / "scripts" / "file").write_text("new")
    assert cost.commit() == f"{head}-dirty"


def test_a_row_names_the_machine_and_the_commit() -> None:
    row = cost.provenance("cpu", "the command")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert head.stdout.startswith(row["commit"].removesuffix("-dirty"))
    assert row["threads"] == "1"
    assert row["torch"] == torch.__version__
    assert all(row[key] for key in row if key != "commit")


def columns(path: Path) -> list[dict[str, str]]:
    """The rows of a whole CSV: every column there, and what every measurement has is not empty."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames or ()) == cost.COLUMNS
    optional = {"axis", "size", "batch_size", "img_size", "surrogate", "commit"} | {
        column for column in cost.COLUMNS if column.startswith("to_")
    }
    assert rows
    assert [key for row in rows for key in row if row[key] == "" and key not in optional] == []
    return rows


@pytest.mark.slow
def test_activations_are_measured_with_and_without_a_compiler(tmp_path: Path) -> None:
    options = ["--exponents", "6", "8", "--least", "0", "--dtypes", "float32", "--repeats", "2"]
    assert script.main(["activation", *options, "--variants", "relu", "sugar", "--output", str(tmp_path)]) == 0
    rows = columns(tmp_path / "benchmark_activation.csv")
    found = [(row["mode"], row["size"], row["metric"], row["variant"]) for row in rows]
    assert found == [
        (mode, size, metric, variant)
        for mode in ("eager", "eager, no compiler")
        for size in ("64", "256")
        for metric in ("pass", "recorded")
        for variant in ("relu", "sugar")
    ]
    assert {row["to_relu"] for row in rows if row["variant"] == "relu"} == {"1.0000"}
    assert rows[0]["command"].startswith("python scripts/benchmark.py activation --exponents 6 8")
    assert str(tmp_path) not in rows[0]["command"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loops_of_the_backward_pass_compute_what_they_are_called(dtype: torch.dtype) -> None:
    x, upstream = torch.linspace(-4, 4, 40).to(dtype), torch.linspace(1, 2, 40).to(dtype)
    exact = x.double()
    factors = {"relu": (exact > 0).double(), "product": exact, "exponential": exact.exp()}
    factors |= {"gelu": slope(x, "gelu"), "sugar": slope(x, "nelu", alpha=0.3)}
    loops = backward_loops(x, upstream, SUGAR(surrogate="nelu", alpha=0.3))
    assert list(loops) == ["relu", "gelu", "sugar", "product", "exponential"]
    for name, loop in loops.items():
        torch.testing.assert_close(loop(), (upstream.double() * factors[name]).to(dtype))


def test_loops_of_the_backward_pass_are_measured_in_one_thread(tmp_path: Path) -> None:
    options = ["--exponents", "6", "--least", "0", "--dtypes", "float32", "--repeats", "2", "--device", "cpu"]
    assert script.main(["backward", *options, "--output", str(tmp_path)]) == 0
    rows = columns(tmp_path / "benchmark_backward.csv")
    assert [row["variant"] for row in rows] == ["relu", "gelu", "sugar", "product", "exponential"]
    assert {row["threads"] for row in rows} == {"1"}
    assert [row["surrogate"] for row in rows if row["surrogate"]] == ["surrogate='bsilu', alpha=1.67"]
    assert "the loop of the backward pass alone, one thread" in cost.tables(tmp_path)
    assert script.main(["backward", *options, "--output", str(tmp_path), "--model-kwargs", "alpha=2"]) == 0
    found = [row["surrogate"] for row in columns(tmp_path / "benchmark_backward.csv") if row["surrogate"]]
    assert found == ["surrogate='bsilu', alpha=1.67", "surrogate='bsilu', alpha=2"]


@pytest.mark.slow
def test_a_model_is_measured_in_training_and_in_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm_sugar._saved_tensors._LEAST", 0)  # or so small a network shares nothing
    options = [*TINY, "--output", str(tmp_path), "--model-kwargs", "surrogate=nelu", "alpha=0.05"]
    assert script.main(["model", *options]) == 0
    rows = {(row["variant"], row["metric"]): row for row in columns(tmp_path / "benchmark_model.csv")}
    assert rows.keys() == {(name, metric) for name in ("own", "relu", "sugar") for metric in ("step", "kept")}
    assert rows["sugar", "step"]["surrogate"] == "surrogate='nelu', alpha=0.05"
    assert rows["own", "kept"]["to_relu"] == "1.0000"
    assert rows["sugar", "kept"]["to_relu"] == "1.0000"  # one buffer for pre-activation and value
    assert script.main(["inference", *options]) == 0
    rows = {(row["variant"], row["metric"]): row for row in columns(tmp_path / "benchmark_inference.csv")}
    assert rows["sugar", "same_graph"]["median"] == rows["relu", "same_graph"]["median"] == "1"
    assert rows["own", "same_graph"]["median"] == "0"  # ReLU in place
    assert rows["sugar", "forward"]["unit"] == "s"


@pytest.mark.slow
def test_memory_is_that_of_a_process_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, ballast = benchmark.peak_bytes(), torch.ones(2**27)  # 512 MB
    ours = benchmark.peak_bytes()
    assert ours >= max(before, ballast.nbytes)
    options = [*TINY, "--repeats", "1", "--steps", "1", "--variants", "sugar", "--output", str(tmp_path)]
    assert script.main(["memory", *options]) == 0
    peak, added, tensors = columns(tmp_path / "benchmark_memory.csv")
    assert (peak["metric"], added["metric"], tensors["metric"]) == ("peak", "added", "tensors")
    assert 0 < int(tensors["median"]) < int(peak["median"])
    assert 0 < int(added["median"]) < int(peak["median"]) < ours  # the parent's ballast is not the child's
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert script.main(["memory", *options]) == 0
    modes = [row["mode"] for row in columns(tmp_path / "benchmark_memory.csv")]
    assert modes == ["eager"] * 3 + ["eager, MALLOC_MMAP_THRESHOLD_=65536"] * 3


@pytest.mark.slow
def test_growth_is_measured_along_each_axis(tmp_path: Path) -> None:
    sizes = ["--batch-sizes", "2", "3", "--img-sizes", "32", "--depths", "test_resnet", "--processes", "2"]
    options = [*TINY, *sizes, "--variants", "relu", "sugar", "--output", str(tmp_path)]
    assert script.main(["growth", *options]) == 0
    rows = [row for row in columns(tmp_path / "benchmark_growth.csv") if row["variant"] == "sugar"]
    found = [(row["axis"], row["size"], row["batch_size"], row["img_size"], row["processes"]) for row in rows]
    assert found == [
        ("batch", "2", "2", "32", "1"),
        ("batch", "3", "3", "32", "1"),
        ("pixels", "1024", "2", "32", "1"),
        ("depth", "12", "2", "32", "1"),
        ("processes", "2", "2", "32", "2"),
    ]


def test_all_parts_run_in_turn_and_can_begin_with_any(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(script.subprocess, "run", lambda command, check: commands.append(command[2:]))
    assert script.main(["all", "--device", "cpu", "--threads", "1", "--model-kwargs", "alpha=2"]) == 0
    assert [tuple(command[: len(part)]) for command, part in zip(commands, script.PARTS, strict=True)] == [
        *script.PARTS
    ]
    for command in commands:
        args = script.build_parser().parse_args(command)
        assert (args.device, args.threads, args.model_kwargs) == ("cpu", 1, {"alpha": 2})
    commands.clear()
    assert script.main(["all", "--start", str(len(script.PARTS))]) == 0
    assert [tuple(command[: len(script.PARTS[-1])]) for command in commands] == [script.PARTS[-1]]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["model", "--model", "resnet19"], "resnet19"),
        (["model", *TINY, "--variants", "sugr"], "no variant 'sugr'"),
        (["model", *TINY, "--variants", "sugar:alpha"], "key=value"),
        (["inference", *TINY, "--model-kwargs", "surrogate=tanh"], "tanh"),
        (["activation", "--variants", "own"], "only a network"),
        (["activation", "--model-kwargs", "alpha=-1"], "alpha"),
        (["memory", *TINY, "--device", "tpu"], "tpu"),
        (["model", *TINY, "--repeats", "0"], "at least 1"),
        (["model", *TINY, "--output", "/dev/null/results"], "can't write to /dev/null/results"),
        (["all", "--start", "99"], "99"),
    ],
)
def test_a_users_mistake_is_one_line(options: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert word in error_line(script.main, options, capsys)


@pytest.mark.slow
def test_deployment_is_measured_in_each_runtime_and_number_format(tmp_path: Path) -> None:
    options = ["--model", "test_efficientnet", "--repeats", "2", "--least", "0", "--threads-each", "1"]
    assert script.main(["deploy", *options, "--batch-sizes", "1", "--output", str(tmp_path)]) == 0
    rows = columns(tmp_path / "benchmark_deploy.csv")
    cases = [(row["mode"].split()[0], row["dtype"], row["variant"], row["surrogate"]) for row in rows]
    assert cases == [
        (runtime, dtype, *variant)
        for runtime in ("onnxruntime", "openvino")
        for dtype in ("float32", "int8")
        for variant in (("own", "SiLU"), ("relu", ""))
    ]
    text = cost.deploy_table(tmp_path)
    assert text.count("\n| test_efficientnet, 160 px | SiLU |") == 1
    assert all(cost.cell(row) in text for row in rows if row["variant"] == "own")


def test_tables_show_ratios_slopes_and_each_machine(tmp_path: Path) -> None:
    assert cost.tables(tmp_path) == "Not measured yet."
    for size, factor in ((2**16, 2.0), (2**20, 3.0)):
        samples = {"relu": [1.0 * size] * 3, "sugar": [factor * size, 2.0 * size, 5.0 * size]}
        setting = {"subject": "activation", "mode": "eager", "dtype": "float32", "axis": "elements", "size": size}
        cost.record(tmp_path / "benchmark_activation.csv", rows_of(samples, "pass", **setting))
        alone = rows_of({"relu": [2.0], "sugar": [14.0]}, "recorded", **setting)
        cost.record(tmp_path / "benchmark_activation.csv", alone)
    setting = {"subject": "net", "mode": "compile", "batch_size": 8, "img_size": 224, "dtype": "float32"}
    half = rows_of({"own": [4.0], "relu": [1.0], "sugar": [8.0]}, **setting | {"dtype": "bfloat16"})
    single = rows_of({"own": [4.0], "relu": [2.0], "sugar": [3.0]}, **setting)
    cost.record(tmp_path / "benchmark_model.csv", [*half, *single])
    text = cost.tables(tmp_path)
    assert "| eager, float32, 2^16 | 2.00 (2.00–3.50) |" in text
    assert "| eager, float32, 2^20 | 3.00 (2.50–4.00) |" in text
    assert text.count("| 7.00 |") == 2, "the forward pass alone stands in a table of its own"
    assert "| net, 8 images of 224 px | training step, compile, float32 | 2.00 | 1.50 | 0.75 |" in text
    assert "| net, 8 images of 224 px | training step, compile, bfloat16 | 4.00 | 8.00 | 2.00 |" in text
    slope = 1 + np.log(1.5) / np.log(16)
    ends = "2.00 (2.00–3.50) | 3.00 (2.50–4.00)"
    assert f"| elements; activation, eager, float32 | 65536 to 1048576 | 1.00 | {slope:.2f} | {ends} |" in text
    assert text.count("M (cpu, 1 of 2 cores), torch 2") == 1
    there = [row | {"device": "cuda", "machine": "G"} for row in rows_of({"relu": [2.0], "sugar": [1.0]}, **setting)]
    cost.record(tmp_path / "benchmark_model.csv", there)
    assert "G (cuda), torch 2" in cost.tables(tmp_path)


def test_tables_leave_other_surrogates_out(tmp_path: Path) -> None:
    default = "surrogate='bsilu', alpha=1.67"
    for surrogate, factor in ((default, 2.0), (default + ", more=1", 3.0), ("surrogate='nelu', alpha=0.01", 4.0)):
        surrogates, samples = {"relu": "", "sugar": surrogate}, {"relu": [1.0], "sugar": [factor]}
        rows = cost.summarize({"subject": "net", "mode": "eager"}, "step", "s", samples, surrogates, ENVIRONMENT)
        cost.record(tmp_path / "benchmark_model.csv", rows)
    shown = cost.of_default(read_rows(tmp_path / "benchmark_model.csv"))
    assert [row["median"] for row in shown] == ["1", "2", "3"]


def test_committed_pictures_show_the_committed_results(tmp_path: Path) -> None:
    def curves(path: Path) -> dict[str, str]:
        return dict(re.findall(r'<g id="([a-z]\w+_float32|[a-z]\w+_bfloat16)">\s*<path d="([^"]+)"', path.read_text()))

    load_script("figures").main(["--output", str(tmp_path)])
    for committed in sorted((ROOT / "figures").glob("cost-*.svg")):
        old, new = curves(committed), curves(tmp_path / committed.name)
        assert {"sugar_eager_float32", "sugar_eager_no_compiler_bfloat16", "gelu_eager_float32"} <= old.keys()
        assert old.keys() == new.keys()
        for name in old:
            numbers = [[float(number) for number in re.findall(r"-?[\d.]+", each[name])] for each in (old, new)]
            assert numbers[0] == pytest.approx(numbers[1], abs=0.01)
            assert numbers[0][::2] == sorted(set(numbers[0][::2])), "one point for each size"
