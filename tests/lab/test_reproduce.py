"""Tables of experiments: what they run, that runs survive a kill, and that results/ says what the numbers say."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from lab.cli import as_options
from lab.experiments import evidence
from lab.experiments.paired import difference, estimate
from lab.experiments.rows import COLUMNS, done_rows, is_current, key_of, load_rows, locked
from lab.experiments.run import TableRun
from lab.experiments.table import TABLES, Key, Table, list_tables, load_table
from lab.files import read_rows, write_rows
from lab.training.options import build_parser
from lab.training.runs import load_file
from lab.training.setup import build_model
from PIL import Image, ImageChops
from safetensors.torch import save_file
from scipy import stats
from scripting import SCRIPTS, error_line, load_script, make_images
from tables import BUILT_IN, OWN, TINY, final, networks, places, record_of, reproduce, rows_of
from torch import nn

from timm_sugar import SUGAR, surrogate
from timm_sugar.surrogate import get_surrogate

RESULTS = SCRIPTS.parent / "results"
ALL = [load_table(name) for name in list_tables()]


@pytest.fixture(autouse=True)
def own_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The surrogates of networks.py, for the length of a test."""
    for name, entry in OWN.items():
        monkeypatch.setitem(surrogate._surrogates, name, entry)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A table of a network that trains in a second."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_images(tmp_path / "data")


def fake_train(run: Any, options: list[str]) -> None:
    record_of(run)


def test_interval_is_that_of_scipy_and_of_a_textbook() -> None:
    """Student's own sleep data (1908): mean 1.58, t = 4.0621 on 9 degrees of freedom."""
    sleep = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    found = estimate(sleep)
    assert (found.n, found.mean) == (10, pytest.approx(1.58))
    half = 2.262157 * found.spread / 10**0.5  # t(0.975, 9) from a table
    assert 1.58 / (found.spread / 10**0.5) == pytest.approx(4.0621, abs=1e-4)
    assert (found.low, found.high) == (pytest.approx(1.58 - half, abs=1e-5), pytest.approx(1.58 + half, abs=1e-5))
    expected = stats.ttest_1samp(sleep, 0).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert found.sign == 1
    assert estimate([-x for x in sleep]).sign == -1
    assert estimate([2.0, -1.0]).sign == 0


def test_differences_are_paired_by_seed_whatever_the_order_and_only_where_both_have_run() -> None:
    rows = rows_of({"relu": {0: 10, 1: 50, 2: 30, 7: 99}, "new": {2: 33, 0: 11, 1: 52, 8: 0}})
    found = difference(rows, "new", "relu")
    assert (found.n, found.mean) == (3, pytest.approx(2.0))
    expected = stats.ttest_rel([11, 52, 33], [10, 50, 30]).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_sentence_follows_from_the_intervals() -> None:
    """With two seeds t(0.975, 1) = 12.7062: differences of 2.0 and 2.1 give 2.05 ± 12.7062 · 0.05."""
    variants = {name: {"plain": name} for name in ("relu", "up", "down", "same", "not run")}
    table = Table("t", "T", "relu", {**variants, "sugar": {"sugar": "down"}})
    numbers = {"relu": {0: 10, 1: 20}, "up": {0: 12.1, 1: 22}, "down": {0: 7, 1: 17.1}, "same": {0: 9, 1: 21.5}}
    up, down, same = "`up` (+2.05 [+1.41, +2.69])", "`down` (-2.95 [-3.59, -2.31])", "`same` (+0.25 [-15.63, +16.13])"
    text = "- In 2 paired seeds, top-1 is higher than with `relu` for {}; top-1 is lower than with `relu` for {}; "
    text += "no difference in top-1 from the runs with `relu` is shown for {}."
    assert evidence.verdict(table, rows_of(numbers)) == text.format(up, down, same)
    assert evidence.verdict(table, rows_of({**numbers, "sugar": {0: 9, 1: 19.1}})).splitlines() == [
        text.format(up, down, same + ", `sugar` (-0.95 [-1.59, -0.31])"),
        "- In 2 paired seeds, top-1 is higher than with the activation itself for `sugar` (+2.00 [+2.00, +2.00]).",
    ]
    replaced = Table("t", "T", "original", {"original": {}, "relu": {"plain": "relu"}, "sugar": {"sugar": "nelu"}})
    ran = rows_of({"original": {0: 10, 1: 20}, "relu": {0: 11, 1: 23}, "sugar": {0: 9, 1: 21.1}})
    assert evidence.verdict(replaced, ran).splitlines()[1:] == [
        "- In 2 paired seeds, top-1 is lower than with ReLU's own gradient (`relu`) for `sugar` (-1.95 [-2.59, -1.31])."
    ]
    one = evidence.verdict(table, rows_of({"relu": {0: 10}, "up": {0: 12}}))
    assert one == "- One seed says nothing about a difference in top-1 from the run with `relu`."
    assert evidence.verdict(table, rows_of({"relu": {0: 10, 1: 20}})) == "Nothing to compare with `relu` has run."


def test_overview_tells_differences_that_are_shown_from_the_others(tmp_path: Path) -> None:
    """Intervals as above; what has one seed, or nothing to be compared with, has no line."""
    assert evidence.overview(tmp_path) == "None yet."
    numbers = {"relu": {0: 10, 1: 20}, "sugar-bsilu": {0: 12.1, 1: 22}, "sugar-nelu": {0: 7, 1: 17.1}}
    numbers |= {"gelu": {0: 9, 1: 21.5}, "sugar-elu": {0: 99}}
    for name, ran in (
        ("tabular", numbers),
        ("resnet18_small", {"relu": {0: 1, 1: 2}}),
        ("convnext_small", {"gelu": {0: 1}}),
    ):
        write_rows(tmp_path / f"{name}.csv", rows_of(ran), COLUMNS)
    assert evidence.overview(tmp_path).splitlines()[2:] == [
        f"| [{load_table('tabular').title}](results/tabular.md) | one for all | 2 | `relu` 15.00 ± 7.07 "
        "| `gelu` +0.25 [-15.63, +16.13]<br>**`sugar-bsilu` +2.05 [+1.41, +2.69]**"
        "<br>**`sugar-nelu` -2.95 [-3.59, -2.31]** |"
    ]


def test_dead_units_are_compared_in_points() -> None:
    rows = rows_of({"relu": {0: 10, 1: 20}, "sugar-elu": {0: 11, 1: 19}})
    for row, dead in zip(rows, ("0.2000", "0.3000", "0.1000", "0.1900"), strict=True):
        row["dead_units"] = dead
    table = Table("t", "T", "relu", {"relu": {"plain": "relu"}, "sugar-elu": {"sugar": "elu"}})
    *_, line = evidence.verdict(table, rows).splitlines()
    gap = "-10.50 [-16.85, -4.15]"  # -10 and -11, 12.7062 · 0.5 to each side
    assert line == f"- In 2 paired seeds, the share of dead units is lower than with `relu` for `sugar-elu` ({gap})."


def test_table_compares_sugar_with_the_activation_whose_gradient_it_borrows() -> None:
    variants = {"relu": {"plain": "relu"}, "elu": {"plain": "elu"}, "sugar-elu": {"sugar": "elu"},
                "sugar-nelu": {"sugar": "nelu", "alpha": 0.1}, "nelu": {"plain": "nelu", "alpha": 0.2}}  # fmt: skip
    table = Table("t", "T", "relu", variants)
    assert [evidence.twin(table, name) for name in variants] == [None, None, "elu", None, None]
    rows = rows_of({"relu": {0: 10, 1: 12}, "elu": {0: 11, 1: 12}, "sugar-elu": {0: 13, 1: 14.5}})
    lines = evidence.table_of(table, rows).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 9
    assert lines[4] == "| `sugar-elu` | 2 | 13.75 ± 1.06 | +2.75 [-0.43, +5.93] | +2.25 [-0.93, +5.43] | | | |"
    without = Table("t", "T", "relu", {"relu": {}, "sugar-elu": {"sugar": "elu"}})
    assert "activation itself" not in evidence.table_of(without, rows)


@pytest.mark.slow
@pytest.mark.parametrize("table", ALL, ids=lambda table: table.name)
def test_every_run_has_options_that_its_script_takes_and_a_model_that_can_be_made(table: Table) -> None:
    """On the meta device, one forward pass; the activations are those that the variant names."""
    for variant, wanted in table.variants.items():
        settings = table.settings(Key("final", variant, "", 3))
        words = [word for key, value in settings.items() for word in as_options(key, value)]
        if not table.network:
            parsed = load_script(Path(table.script).stem).build_parser().parse_args(words)
            assert {key: getattr(parsed, key) for key in settings} == settings
            continue
        args = build_parser().parse_args(words)
        assert {key: getattr(args, key) for key in settings} == settings
        args.pretrained, args.pretrained_path, args.initial_checkpoint = False, None, ""  # files that a user makes
        with torch.device("meta"):
            model = build_model(args).eval()
            assert model(torch.zeros(1, 3, args.img_size, args.img_size)).shape == (1, args.num_classes)
        sugars = {m.surrogate for m in model.modules() if isinstance(m, SUGAR)}
        plain = {m.surrogate.name for m in model.modules() if isinstance(m, networks.Plain)}
        assert sugars == ({wanted["sugar"]} if "sugar" in wanted else set())
        assert plain == ({wanted["plain"]} - {"relu"} if "plain" in wanted else set())


def test_tables_of_the_paper_have_all_surrogates_both_ways_and_its_settings() -> None:
    for data, epochs in (("cifar10", 50), ("cifar100", 100)):
        for network in ("resnet18", "vgg16", "vgg16_bn"):
            table = load_table(f"{data}_{network}")
            given = (table.network, table.baseline, table.seeds, table.subset)
            assert given == (network, "relu", 5, None)
            settings = table.settings(Key("final", "relu", "", 0))
            facts = {"batch_size": 128, "opt": "sgd", "lr": 0.001, "no_aug": True, "epochs": epochs}
            assert settings.items() >= (facts | {"num_classes": int(data[5:]), "img_size": 32}).items()
            for way in ("plain", "sugar"):
                names = {variant[way] for variant in table.variants.values() if way in variant}
                assert names - {"relu"} == set(BUILT_IN)


@pytest.mark.parametrize("name", ["relu", *BUILT_IN])
def test_a_plain_activation_is_the_function_with_its_own_gradient(name: str) -> None:
    """Value: torch's module of that name, or the formula; gradient: the derivative's formula."""
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.ModuleDict({"act": nn.SiLU()})["act"])
    networks.activate(model, name)
    x = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    for activation in model[1:]:
        if name in ("bsilu", "nelu"):
            surrogate = get_surrogate(name)
            expected = surrogate.evaluate(x)
        else:
            module = {"relu": nn.ReLU, "elu": nn.ELU, "selu": nn.SELU, "gelu": nn.GELU, "silu": nn.SiLU,
                      "mish": nn.Mish, "leaky_relu": nn.LeakyReLU}[name]()  # fmt: skip
            expected = module(x)
        torch.testing.assert_close(activation(x), expected, rtol=0, atol=1e-12)
        (grad,) = torch.autograd.grad(activation(x).sum(), x)
        if name != "relu":
            values = list(get_surrogate(name).parameters.values())
            torch.testing.assert_close(grad, get_surrogate(name).derivative(x, *values).detach())


def test_variants_start_from_the_same_weights_and_gelu_is_timms_own() -> None:
    def make(name: str, **kwargs: Any) -> nn.Module:
        torch.manual_seed(5)
        return timm.create_model(name, num_classes=3, **kwargs).eval()

    plain, own = make("resnet18_plain", activation="gelu"), make("resnet18", act_layer="gelu")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain(x), own(x))
    others = [make("resnet18_sugar", surrogate="elu"), make("resnet18_plain", activation="nelu", alpha=0.1)]
    for model in others:
        for key, value in plain.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key


def test_a_plain_variant_starts_from_pretrained_weights_as_the_network_does(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    original = timm.create_model("tf_efficientnet_lite0", num_classes=3)
    save_file(original.state_dict(), file)
    overlay = {"file": str(file), "num_classes": 3}
    model = timm.create_model(
        "tf_efficientnet_lite0_plain", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, activation="relu"
    )
    assert not any(isinstance(module, nn.ReLU6) for module in model.modules())
    assert any(isinstance(module, nn.ReLU) for module in model.modules())
    for key, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.slow
def test_a_table_can_continue_another_one_seed_by_seed_and_shows_where_it_started(
    tiny: Path, data: Path, tmp_path: Path
) -> None:
    """After 0 epochs each seed has the numbers that the run it starts from ended with."""
    shared = ["--data-dir", str(data), "-j", "0", "--device", "cpu", "--results", str(tmp_path)]
    shared += ["--output", str(tmp_path / "runs")]
    assert reproduce.main([str(tiny), "--only", "relu", *shared]) == 0
    start = tmp_path / "runs" / "tiny" / "relu-{seed}" / "last.pth.tar"
    more = f"{{epochs: 1, eval_first: true, log_interval: null, initial_checkpoint: '{start}'}}"
    (tmp_path / "next.yaml").write_text(f"base: tiny\ntitle: Next\noptions: {more}\n")
    assert "log_interval" not in load_table(str(tmp_path / "next.yaml")).settings(Key("final", "relu", "", 0))
    assert reproduce.main([str(tmp_path / "next.yaml"), "--only", "relu", "sugar-nelu", *shared]) == 0
    before = {row["seed"]: row["top1"] for row in read_rows(tmp_path / "tiny.csv")}
    epochs = read_rows(tmp_path / "next_epochs.csv")
    assert len(epochs) == 2 * 2 * 2
    assert {row["seed"]: row["top1"] for row in epochs if row["epoch"] == "-1"} == before
    assert {row["epochs"] for row in read_rows(tmp_path / "next.csv")} == {"1"}
    text = evidence.table_of_epochs(load_table(str(tmp_path / "next.yaml")), epochs)
    assert "| top-1 (%) after | 0 epochs | 1 epoch |" in text
    assert text.splitlines()[-1].startswith("| `sugar-nelu` |")
    assert "(+0.00 [+0.00, +0.00])" in text.splitlines()[-1]


@pytest.mark.slow
def test_a_table_can_convert_what_another_one_trained(tiny: Path, data: Path, tmp_path: Path) -> None:
    """The original is trained first, as it is missing; after 0 epochs stands what the bare exchange does."""
    start = tmp_path / "runs" / "start" / "original-0" / "last.pth.tar"
    (tmp_path / "start.yaml").write_text(
        "base: tiny\nnetwork: test_efficientnet\nseeds: 1\nbaseline: original\nvariants: {original: {}}\n"
    )
    (tmp_path / "converted.yaml").write_text(
        f"title: Converted\nscript: scripts/convert.py\nbaseline: relu\nseeds: 2\n"
        f"options: {{checkpoint: '{start}', epochs: 2, lr: 0.01, batch_size: 8, warmup_epochs: 0, no_int8: true}}\n"
        "variants: {relu: {options: {surrogate: relu, distill: 0}}, same: {}}\n"
    )
    shared = ["--data-dir", str(data), "-j", "0", "--device", "cpu", "--results", str(tmp_path)]
    assert reproduce.main([str(tmp_path / "converted.yaml"), *shared, "--output", str(tmp_path / "runs")]) == 0
    folder = tmp_path / "runs" / "converted" / "same-1"
    (original,) = read_rows(folder / "original.csv")
    assert original["eval_top1"] == last_epoch(start.parent / "summary.csv")["eval_top1"]
    epochs = read_rows(tmp_path / "converted_epochs.csv")
    assert [row["epoch"] for row in epochs] == ["-1", "0", "1"] * 4
    assert len({row["top1"] for row in epochs if row["epoch"] == "-1"}) == 1
    commands = [row["command"] for row in read_rows(tmp_path / "converted.csv")]
    assert all(command.startswith("python scripts/convert.py --checkpoint=") for command in commands)
    assert not list((tmp_path / "runs").rglob("*.onnx"))


def test_only_and_seeds_choose_a_part_and_earlier_rows_stay(
    tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TableRun, "train", fake_train)
    shared = [str(tiny), *places(tmp_path, data)]

    def ran(*options: str) -> list[tuple[str, str]]:
        assert reproduce.main([*shared, *options]) == 0
        return [(row["variant"], row["seed"]) for row in read_rows(tmp_path / "r" / "tiny.csv")]

    assert ran("--only", "sugar-*", "--seeds", "1") == [("sugar-bsilu", "0"), ("sugar-nelu", "0")]
    part = [("relu", "0"), ("relu", "1"), ("sugar-bsilu", "0"), ("sugar-nelu", "0")]
    assert ran("--only", "relu") == part
    assert len(read_rows(tmp_path / "r" / "tiny_epochs.csv")) == 3 * len(part)
    capsys.readouterr()
    assert len(ran()) == 6
    assert "4 runs done before\n[2 to do] tiny sugar-bsilu-1\n" in capsys.readouterr().out
    message = "no such variant (there are: relu, sugar-bsilu, sugar-nelu)"
    assert message in error_line(reproduce.main, [*shared, "--only", "gelu"], capsys)
    assert "--no-resume: there are runs" in error_line(reproduce.main, [*shared, "--no-resume"], capsys)


def test_rows_that_the_table_would_not_make_again_go(
    tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TableRun, "train", fake_train)
    shared = [str(tiny), *places(tmp_path, data), "--seeds", "1"]
    assert reproduce.main(shared) == 0
    tiny.write_text(TINY.replace("lr: 0.05", "lr: 0.01"))
    assert "other settings" in error_line(reproduce.main, shared, capsys)
    assert reproduce.main([*shared, "--output", str(tmp_path / "p"), "--only", "relu"]) == 0
    assert [row["variant"] for row in read_rows(tmp_path / "r" / "tiny.csv")] == ["relu"]
    assert {row["variant"] for row in read_rows(tmp_path / "r" / "tiny_epochs.csv")} == {"relu"}


def last_epoch(summary: Path) -> dict[str, str]:
    return read_rows(summary)[-1]


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_rows(tiny: Path, data: Path, tmp_path: Path, capfd: Any) -> None:
    """A real process, with the one that it started; in the middle of training."""
    tiny.write_text(TINY.replace("epochs: 3", "epochs: 12"))

    def options(place: str) -> list[str]:
        shared = [str(tiny), "--data-dir", str(data), "--seeds", "1", "--only", "sugar-nelu", "-j", "0"]
        return [*shared, "--output", str(tmp_path / place), "--results", str(tmp_path / place), "--device", "cpu"]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPTS / "reproduce.py"), *options("k")]
    summary = tmp_path / "k" / "tiny" / "sugar-nelu-0" / "summary.csv"
    killed = subprocess.Popen(command, start_new_session=True, env=environment)
    while len(read_rows(summary)) < 3 and killed.poll() is None:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert 3 <= len(read_rows(summary)) < 12
    assert not (tmp_path / "k" / "tiny.csv").exists()
    capfd.readouterr()
    assert reproduce.main(options("k")) == 0
    assert "epoch 0 update 1/" not in capfd.readouterr().out  # it went on, it didn't begin again
    assert reproduce.main(options("w")) == 0
    for path in ("tiny/sugar-nelu-0.json", "tiny.csv"):  # as if killed between the last epoch and the record
        (tmp_path / "w" / path).unlink()
    capfd.readouterr()
    assert reproduce.main(options("w")) == 0
    assert "update" not in capfd.readouterr().out
    folder = tmp_path / "w" / "tiny" / "sugar-nelu-0"
    whole = load_file(folder / "last.pth.tar")["state_dict"]
    for path in ("tiny/sugar-nelu-0.json", "tiny.csv"):  # as if killed between the last row and its checkpoint
        (tmp_path / "w" / path).unlink()
    for file in folder.glob("*.pth.tar"):
        file.unlink()
    assert reproduce.main(options("w")) == 0
    again = load_file(folder / "last.pth.tar")["state_dict"]
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
    for name in ("tiny.csv", "tiny_epochs.csv"):
        assert (tmp_path / "k" / name).read_text() == (tmp_path / "w" / name).read_text()
    (row,) = read_rows(tmp_path / "k" / "tiny.csv")
    assert (row["variant"], row["seed"], row["epochs"]) == ("sugar-nelu", "0", "12")
    for key, column in (("top1", "eval_top1"), ("train_loss", "train_loss"), ("dead_units", "eval_dead_units")):
        assert float(row[key]) == pytest.approx(float(last_epoch(summary)[column]), abs=5e-5)


CUT_OFF = """\
import pathlib, sys
rest = dict(zip(sys.argv, sys.argv[1:]))
folder = pathlib.Path(rest["--output"], rest["--experiment"])
folder.mkdir(exist_ok=True)
(folder / "args.yaml").write_text("weight_decay: 0.0005")
sys.exit(9)
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (", mixup: 0.8", ""),
        (", mixup: 0.8", ", mixup: null"),
        ("subset: {per_class: 3}", "subset: {per_class: 8}"),
        ("subset: {per_class: 3}", ""),
        ("", ""),
    ],
)
def test_a_run_goes_on_only_where_the_table_says_the_same(
    old: str, new: str, tiny: Path, data: Path, tmp_path: Path, capfd: Any
) -> None:
    """What a table had and has no longer would go on from args.yaml, and its row would deny it."""
    script = tmp_path / "script.py"
    script.write_text(CUT_OFF)
    text = f"script: {script}\nsubset: {{per_class: 3}}\n" + TINY.replace("lr: 0.05", "weight_decay: 5e-4, mixup: 0.8")
    assert "mixup" in text
    tiny.write_text(text)
    words = [str(tiny), *places(tmp_path, data), "--seeds", "1", "--only", "relu"]
    assert "failed (status 9)" in error_line(reproduce.main, words, capfd)
    tiny.write_text(text.replace(old, new))
    line = error_line(reproduce.main, words, capfd)
    assert ("was made with other settings" in line) == (old != "")


def test_a_run_whose_process_outlived_a_kill_is_not_started_twice(
    tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others go on, then the process waits: here it is told that the orphan has ended by its end."""
    table, trained = load_table(str(tiny)), []
    run = TableRun(table, final(table, "relu", 0), tmp_path / "o" / "tiny")

    def train(self: TableRun, options: list[str]) -> None:
        trained.append(self.name)
        record_of(self)

    monkeypatch.setattr(TableRun, "train", train)
    monkeypatch.setattr(reproduce.time, "sleep", lambda seconds: (orphan.kill(), orphan.wait()))
    with run.locked() as lock:
        orphan = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    options = places(tmp_path, data)
    try:
        assert reproduce.main([str(tiny), *options]) == 0
    finally:
        orphan.kill()
        orphan.wait()
    assert (len(trained), trained[-1]) == (6, "relu-0")
    assert "waiting for another process" in capsys.readouterr().out


SCRIPT = """\
import pathlib, sys
given = dict(word[2:].split("=") for word in sys.argv if "=" in word and word.startswith("--"))
rest = dict(zip(sys.argv, sys.argv[1:]))
folder = pathlib.Path(rest["--output"], rest["--experiment"])
images = len(list(pathlib.Path(rest["--data-dir"], "train").rglob("*.png")))
folder.mkdir()
(folder / "args.yaml").write_text("device: cpu")
(folder / "summary.csv").write_text(f"epoch,train_loss,eval_top1\\n0,{given['epochs']},{images}\\n")
"""


def test_smoke_is_small_and_needs_no_data_and_leaves_results_alone(tiny: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    more = "".join(f"  more-{i}: {{}}\n" for i in range(5))
    tiny.write_text(f"script: {script}\nsubset: {{per_class: 1000}}\n{TINY}{more}")
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    for _ in range(2):  # each time anew
        assert reproduce.main([str(tiny), "--smoke", "--output", str(tmp_path / "o")]) == 0
    assert {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before
    rows = read_rows(tmp_path / "o" / "smoke" / "results" / "tiny.csv")
    assert [row["variant"] for row in rows] == ["relu", "sugar-nelu", "more-1", "more-3"]
    assert {(row["seed"], row["train_loss"], row["top1"]) for row in rows} == {("0", "1.0000", "32.0000")}
    assert "## Defined, not run here" in (tmp_path / "o" / "smoke" / "results" / "README.md").read_text()


def test_a_second_smoke_leaves_the_first_its_folder(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    tiny.write_text(f"script: {script}\n{TINY}")
    words = [str(tiny), "--smoke", "--output", str(tmp_path / "o")]
    kept = tmp_path / "o" / "smoke" / "kept"
    kept.mkdir(parents=True)
    (kept.parent / ".smoke").touch()
    with locked(tmp_path / "o" / "smoke.lock"):
        assert f"another process works in {kept.parent}: wait" in error_line(reproduce.main, words, capsys)
    assert kept.exists()
    assert reproduce.main(words) == 0
    assert not kept.exists()


def test_smoke_removes_nothing_that_it_did_not_make(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    tiny.write_text(f"script: {script}\n{TINY}")
    mine = tmp_path / "o" / "smoke" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    words = [str(tiny), "--smoke", "--output", str(tmp_path / "o")]
    assert f"{mine.parent} has files that --smoke didn't make" in error_line(reproduce.main, words, capsys)
    assert mine.read_text() == "precious"
    mine.unlink()
    assert reproduce.main(words) == 0


def test_a_run_that_fails_ends_with_a_line(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny.write_text(f"script: nonsense.py\n{TINY}")
    with pytest.raises(SystemExit) as stop:
        reproduce.main([str(tiny), "--output", str(tmp_path), "--results", str(tmp_path), "--data-dir", str(tmp_path)])
    assert stop.value.code == 2
    assert "run relu-0 failed (status 2)" in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "tiny.csv").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: x\nbaseline: relu\nvariants: {gelu: {}}\n", "the baseline 'relu' is none of its variants"),
        ("title: x\nbaseline: relu\nvariants: {relu: {}}\nepochs: 3\n", "unknown key 'epochs'"),
        ("title: x\nbaseline: relu\n", "variants"),
        (TINY + "script:\n", "script has no value"),
        ("base: mine\noptions:\n", "options has no value"),
        ("base: /nowhere/tiny\n", "base: Invalid name"),
        ("title: x\nbaseline: relu\nvariants: {relu: {}}\noptions: {lr: 1e-3}\n", "the rate '1e-3' is text"),
        (TINY + "tune: {lr: [1e-3, 1e-2], seeds: [50], held_out: 2}\n", "the rate '1e-3' is text"),
        ("title: x\nbaseline: relu\nvariants: [relu]\n", "is not a table"),
        ("title: x\nbaseline: relu\nvariants: {relu: }\n", "is not a table"),
        ("title: x\nbaseline: relu\nvariants: {relu: {}}\n", "no number of epochs, but None"),
        ("title: x\nbaseline: relu\nvariants: {relu: {}}\noptions: {epochs: one}\n", "no number of epochs, but 'one'"),
        ("title: x\nbaseline: relu\nvariants: {relu: {}, ../../x: {}}\n", "can't be the name of a folder"),
        (TINY + "subset: {perclass: 4}\n", "unknown key 'perclass' of subset"),
        (TINY + "subset: {per_class: 4, of: 3}\n", "at least as large"),
        (TINY + "subset: {of: 3}\n", "needs per_class"),
        (TINY + "primary: 5\n", "is not a table"),
        (TINY + "title: y\n", "title stands there twice"),
        ("seeds: 0\n" + TINY.replace("seeds", "#"), "seeds must be at least 1"),
        ("- relu\n", "expected 'key: value' lines"),
        ("a: [\n", "can't read"),
    ],
)
def test_a_file_that_is_no_table_is_named(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert message in error_line(reproduce.main, [str(path)], capsys)


def test_a_table_of_ones_own_does_not_take_the_place_of_another(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "resnet18_small.yaml").write_text(TINY)
    line = error_line(reproduce.main, [str(tmp_path / "resnet18_small.yaml"), *places(tmp_path, tmp_path)], capsys)
    assert "has the name of a table of the project" in line


def test_an_unknown_table_is_answered_with_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cifar10_resnet18" in error_line(reproduce.main, ["nonsense"], capsys)
    assert "--workers: expected 0 to 256, not -1" in error_line(
        reproduce.main, ["cifar10_resnet18", "-j", "-1"], capsys
    )
    assert "--seeds: expected 1 to 1000" in error_line(reproduce.main, ["cifar10_resnet18", "--seeds", "0"], capsys)


def test_pages_are_those_of_the_committed_numbers_and_every_row_can_be_made_again() -> None:
    assert {path.name: path.read_text() for path in RESULTS.glob("*.md")} == evidence.pages(RESULTS)
    for table in ALL:
        rows = read_rows(RESULTS / f"{table.name}.csv")
        if not rows:
            continue
        assert (RESULTS / f"{table.name}.png").exists() or not done_rows(load_rows(table, RESULTS))
        assert rows == load_rows(table, RESULTS), "the columns of today"
        keys = [key_of(row) for row in rows]
        assert len(set(keys)) == len(keys)
        if not table.tune:  # a tuned table is committed row by row while it runs
            seeds = sorted({key.seed for key in keys})
            assert [(key.variant, key.seed) for key in keys] == [
                (name, seed) for name in table.variants for seed in seeds
            ]
        assert all(is_current(table, key, row) for key, row in zip(keys, rows, strict=True))
        last = {key_of(row): row for row in read_rows(RESULTS / f"{table.name}_epochs.csv")}
        for key, row in zip(keys, rows, strict=True):
            assert row["status"] == "failed" or last[key]["top1"] == row["top1"]


@pytest.mark.slow
def test_pictures_are_those_of_the_committed_numbers(tmp_path: Path) -> None:
    """Pixel by pixel, where the same matplotlib draws them."""
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results, ignore=shutil.ignore_patterns("*.png"))
    assert reproduce.main(["--results", str(results)]) == 0
    drawn = sorted(path.relative_to(results) for path in results.rglob("*.png"))
    assert drawn == sorted(path.relative_to(RESULTS) for path in RESULTS.rglob("*.png"))
    for path in drawn:
        with Image.open(results / path) as new, Image.open(RESULTS / path) as old:
            if new.info["Software"] != old.info["Software"]:
                pytest.skip(f"{path} was drawn by {old.info['Software']}: run scripts/reproduce.py to draw it again")
            assert ImageChops.difference(new.convert("RGB"), old.convert("RGB")).getbbox() is None, path


def test_heads_of_the_tables_name_their_own_command() -> None:
    for table in ALL:
        text = (TABLES / f"{table.name}.yaml").read_text()
        head = [line for line in text.splitlines() if line.startswith("#   python scripts/reproduce.py ")]
        assert len(head) == 1, table.name
        words = head[0].removeprefix("#   python scripts/reproduce.py ").split()
        assert words[0] == table.name
        reproduce.build_parser().parse_args(words)
        assert yaml.safe_load(text)
