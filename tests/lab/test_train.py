"""scripts/train.py: runs that can be killed anywhere, repeated, distributed, and read by timm."""

from __future__ import annotations

import csv
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from lab.training.folder import RunFolder
from lab.training.options import parse_args
from lab.training.runs import find_checkpoint, load_file, plot_curves
from lab.training.setup import build_model
from scripting import SCRIPTS, TINY, error_line, largest_file, load_script, make_images

import timm_sugar
from timm_sugar import _compiled as compiled

train = load_script("train")
RECIPES = sorted((SCRIPTS / "recipes").glob("*.yaml"))
KEYS = ("epoch", "arch", "state_dict", "state_dict_ema", "optimizer", "metric")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def options(data: Path, out: Path, *more: str, experiment: str = "run") -> list[str]:
    """A small run on the CPU in which everything random takes part: crops, mixup, erasing, drop path, EMA."""
    return [
        "--data-dir", str(data), *TINY, "--device", "cpu", "-b", "8", "-j", "0", "--epochs", "3", "--lr", "0.05",
        "--warmup-epochs", "1", "--mixup", "0.2", "--reprob", "0.3", "--drop-path", "0.1", "--model-ema",
        "--model-ema-decay", "0.5", "--output", str(out), "--experiment", experiment, *more,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_kernels", {})
        assert train.main(options(data, out)) == 0
    return out / "run"


@pytest.fixture(autouse=True)
def no_gradient_is_compiled_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: which gradients are compiled decides on the last bit of those that are not large."""
    monkeypatch.setattr(compiled, "_kernels", {})


def equal(a: Any, b: Any) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def summary(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))


def assert_same_run(folder: Path, other: Path) -> None:
    """Same weights, moving averages, optimizer state and metric in every checkpoint, and the same summary."""
    names = sorted(p.name for p in other.glob("*.pth.tar"))
    assert sorted(p.name for p in folder.glob("*.pth.tar")) == names
    for name in names:
        a, b = load_file(folder / name), load_file(other / name)
        assert not [k for k in KEYS if k in b and not equal(a[k], b[k])], name
        assert all(a["saver"][k] == b["saver"][k] for k in ("best_metric", "best_epoch"))
    assert (folder / "summary.csv").read_text() == (other / "summary.csv").read_text()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*tmp*"))


def test_a_run_leaves_what_timm_leaves(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    checkpoints = {f"checkpoint-{i}.pth.tar" for i in range(3)} | {"last.pth.tar", "model_best.pth.tar"}
    assert names == checkpoints | {"args.yaml", "train.log", "summary.csv", "curves.png", ".lock"}
    rows = summary(finished)
    log = (finished / "train.log").read_text()
    for row in rows:
        assert f"epoch {row['epoch']} validation (EMA): loss {float(row['eval_loss']):.3f}" in log
    assert list(rows[0]) == [
        *("epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "eval_dead_units", "eval_sparsity", "lr")
    ]
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert all(0 <= float(row[k]) <= 1 for row in rows for k in ("eval_dead_units", "eval_sparsity"))
    assert all(float(row["eval_sparsity"]) > 0.1 for row in rows)  # a ReLU network
    best = max(rows, key=lambda row: float(row["eval_top1"]))
    assert load_file(finished / "model_best.pth.tar")["epoch"] == int(best["epoch"])


def test_timm_loads_the_checkpoint_and_the_deployed_network_agrees(finished: Path) -> None:
    kwargs = {"num_classes": 3, "checkpoint_path": finished / "last.pth.tar"}
    model = timm.create_model("test_resnet_sugar", **kwargs).eval()
    assert equal(dict(model.state_dict()), dict(load_file(finished / "last.pth.tar")["state_dict_ema"]))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        output = model(x)
        timm_sugar.to_relu(model)
        assert torch.equal(model(x), output)
        assert torch.equal(timm.create_model("test_resnet", **kwargs).eval()(x), output)


def test_args_yaml_repeats_the_run(finished: Path, tmp_path: Path) -> None:
    again = ["--config", str(finished / "args.yaml"), "--output", str(tmp_path)]
    assert train.main(again) == 0
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.slow
def test_weights_can_be_validated_before_training_which_changes_nothing(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    """The start of the second run is what the first one ended with, whose last row has the numbers."""
    assert train.main(options(data, tmp_path, "--eval-first", experiment="same")) == 0
    assert (tmp_path / "same" / "summary.csv").read_text() == (finished / "summary.csv").read_text()
    start = ["--initial-checkpoint", str(finished / "last.pth.tar"), "--eval-first", "--epochs", "1"]
    assert train.main(options(data, tmp_path, *start, experiment="next")) == 0
    (row,) = csv.DictReader((tmp_path / "next" / "start.csv").read_text().splitlines())
    assert row["epoch"] == "-1"
    last = summary(finished)[-1]
    assert {key: last[key] for key in row if key != "epoch"} == {key: row[key] for key in row if key != "epoch"}


def test_another_seed_gives_another_run(data: Path, finished: Path, tmp_path: Path) -> None:
    assert train.main(options(data, tmp_path, "--seed", "1", "--epochs", "1")) == 0
    weights = load_file(tmp_path / "run" / "last.pth.tar")["state_dict"]
    assert not equal(dict(weights), dict(load_file(finished / "checkpoint-0.pth.tar")["state_dict"]))


@pytest.mark.slow
def test_a_surrogate_schedule_changes_training_and_is_resumed_bit_for_bit(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = ["--surrogate-schedule", "alpha=cosine:1.67:0.1"]
    assert train.main(options(data, tmp_path, *schedule, experiment="whole")) == 0
    whole = load_file(tmp_path / "whole" / "last.pth.tar")
    assert not equal(dict(whole["state_dict"]), dict(load_file(finished / "last.pth.tar")["state_dict"]))
    seen = [load_file(tmp_path / "whole" / f"checkpoint-{i}.pth.tar")["args"].model_kwargs["alpha"] for i in range(3)]
    assert seen == pytest.approx([1.67 - 1.57 * (1 - math.cos(math.pi * i / 3)) / 2 for i in (1, 2, 3)])
    assert seen[-1] == 0.1

    def stop(self: Any, epoch: int, *arguments: Any) -> None:
        save(self, epoch, *arguments)
        if epoch == 0:
            raise KeyboardInterrupt

    save = RunFolder.save
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", stop)
        assert train.main(options(data, tmp_path, *schedule, experiment="parts")) == 130
    assert train.main(["--resume", str(tmp_path / "parts")]) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        ("alpha=cosine:1.67", "expected e.g. alpha=cosine:1.67:0.1"),
        ("alpha=sine:1.67:0.1", "choose one of cosine, linear"),
        ("alpha=cosine:1:-1", "alpha"),
        ("gain=cosine:1:2", "no surrogate of the model"),
        ("alpha", "name=value"),
    ],
)
def test_bad_surrogate_schedule(
    schedule: str, text: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in error_line(train.main, options(data, tmp_path, "--surrogate-schedule", schedule), capsys)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the script may catch it."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the process die before its n-th change of the file system, or in the middle of writing a file."""
    remaining = [-1]
    write = torch.save

    def deadly(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            remaining[0] -= 1
            if remaining[0] == 0:
                if function is write:
                    Path(args[1]).write_bytes(b"PK half a checkpoint")
                raise Killed
            return function(*args, **kwargs)

        return call

    for owner, name in ((os, "replace"), (os, "link"), (os, "unlink"), (os, "remove"), (torch, "save")):
        monkeypatch.setattr(owner, name, deadly(getattr(owner, name)))
    return lambda n: remaining.__setitem__(0, n)


@pytest.mark.slow
def test_killed_at_any_change_on_disk_and_resumed_is_the_same_run(data: Path, tmp_path: Path, kill_at: Any) -> None:
    """Over a whole run of two epochs that keeps one checkpoint: each write, rename, link and removal once."""
    more = ("--epochs", "2", "-b", "24", "--checkpoint-hist", "1", "--eval-metric", "loss")
    assert train.main(options(data, tmp_path, *more, experiment="whole")) == 0
    for n in range(1, 100):
        argv = options(data, tmp_path, *more, experiment=str(n))
        kill_at(n)
        try:
            train.main(argv)
        except Killed:
            kill_at(-1)
        else:
            break
        folder = tmp_path / str(n)
        assert train.main(["--resume", str(folder)] if (folder / "args.yaml").exists() else argv) == 0, n
        assert_same_run(folder, tmp_path / "whole")
    assert n > 15


def test_no_epoch_is_lost_where_a_kill_left_no_last_checkpoint(finished: Path, tmp_path: Path) -> None:
    """The new one is whole but not yet renamed; or, half written, it leaves the older ones."""
    names = {name: tmp_path / name for name in ("tmp.pth.tar", "checkpoint-2.pth.tar", "checkpoint-10.pth.tar")}
    for path in names.values():
        shutil.copy(finished / "last.pth.tar", path)
    assert find_checkpoint(tmp_path) == names["tmp.pth.tar"]
    names["tmp.pth.tar"].write_bytes(b"PK half a checkpoint")
    assert find_checkpoint(tmp_path) == names["checkpoint-10.pth.tar"]
    shutil.copy(finished / "last.pth.tar", tmp_path / "last.pth.tar")
    assert find_checkpoint(tmp_path) == tmp_path / "last.pth.tar"


def run_script(argv: list[str], **more: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *argv], env=environment, **pipes, **more)


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output
    return output


@pytest.mark.slow
def test_sigkill_in_the_middle_of_an_epoch_with_loader_processes(data: Path, tmp_path: Path) -> None:
    script = str(SCRIPTS / "train.py")
    more = ("-j", "2", "-b", "2")
    whole = run_script([script, *options(data, tmp_path, *more, experiment="whole")])
    killed = run_script([script, *options(data, tmp_path, *more, experiment="killed")])
    path = tmp_path / "killed" / "summary.csv"
    deadline = time.time() + 300
    while not (path.exists() and len(path.read_text().splitlines()) >= 3) and time.time() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    finish(killed, -signal.SIGKILL)
    assert len(path.read_text().splitlines()) == 3  # header and two epochs: it died in the save or in the third
    finish(run_script([script, "--resume", str(tmp_path / "killed")]))
    finish(whole)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_the_printed_command_continues(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_epoch = train.Run.train_one_epoch

    def interrupted(self: Any, epoch: int) -> float:
        loss = run_epoch(self, epoch)
        if epoch == 1:
            raise KeyboardInterrupt
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "train_one_epoch", interrupted)
        assert train.main(options(data, tmp_path)) == 130
    command = capsys.readouterr().err.strip().split("continue with: python ")[1]
    assert train.main(command.split()[1:]) == 0
    assert_same_run(tmp_path / "run", finished)


def test_resume_auto_starts_a_run_and_continues_it(data: Path, finished: Path, tmp_path: Path) -> None:
    argv = options(data, tmp_path, "--resume", "auto")
    assert train.main([*argv, "--epochs", "1", "--sched", "none"]) == 0
    assert not (tmp_path / "run" / "checkpoint-1.pth.tar").exists()
    assert train.main([*argv, "--epochs", "2", "--sched", "none"]) == 0
    assert load_file(tmp_path / "run" / "last.pth.tar")["epoch"] == 1


def test_resume_from_a_file_into_another_folder(data: Path, finished: Path, tmp_path: Path) -> None:
    argv = ["--resume", str(finished / "checkpoint-1.pth.tar"), "--output", str(tmp_path), "--experiment", "fork"]
    assert train.main(argv) == 0
    a, b = load_file(tmp_path / "fork" / "last.pth.tar"), load_file(finished / "last.pth.tar")
    assert equal(dict(a["state_dict"]), dict(b["state_dict"]))
    assert yaml.safe_load((tmp_path / "fork" / "args.yaml").read_text())["experiment"] == "fork"


TWO_RANKS = """
import importlib.util, os, sys, torch
sys.path.insert(0, os.path.dirname(sys.argv[1]))
spec = importlib.util.spec_from_file_location("train", sys.argv[1])
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)
run = train.Run(*train.parse_args(sys.argv[3:]))
run.train()
torch.save(run.task.state_dict(), f"{sys.argv[2]}/rank{os.environ['RANK']}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_end_with_identical_weights(data: Path, tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(TWO_RANKS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "ranks.py")]
    argv = options(data, tmp_path, "-b", "4", "--epochs", "2", "--grad-accum-steps", "2")
    finish(run_script([*torchrun, str(SCRIPTS / "train.py"), str(tmp_path), *argv]))
    first, second = (torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in range(2))
    assert equal(dict(first), dict(second))
    assert any("running_mean" in name and "ema" in name for name in first)
    saved = load_file(tmp_path / "run" / "last.pth.tar")["state_dict"]
    assert equal({k: first[f"trainable_module.module.{k}"] for k in saved}, dict(saved))
    assert len((tmp_path / "run" / "summary.csv").read_text().splitlines()) == 3


def test_accumulated_gradients_are_those_of_the_whole_batch(data: Path, tmp_path: Path) -> None:
    """A network without batch statistics, 24 images: two updates of 12, the second time in parts of 4."""
    plain = ["--data-dir", str(data), *TINY, "--model", "test_vit_sugar", "--device", "cpu", "-j", "0", "--lr", "0.05"]
    plain += ["--epochs", "1", "--warmup-epochs", "0", "--no-aug", "--output", str(tmp_path)]
    assert train.main([*plain, "--experiment", "whole", "-b", "12"]) == 0
    assert train.main([*plain, "--experiment", "parts", "-b", "4", "--grad-accum-steps", "3"]) == 0
    assert train.main([*plain, "--experiment", "small", "-b", "4"]) == 0
    whole, parts, small = (load_file(tmp_path / n / "last.pth.tar")["state_dict"] for n in ("whole", "parts", "small"))
    assert all(torch.allclose(whole[k], parts[k], atol=1e-6) for k in whole)
    assert not all(torch.allclose(whole[k], small[k], atol=1e-5) for k in whole)


def test_the_moving_average_follows_its_formula(data: Path, tmp_path: Path) -> None:
    """One update per epoch: the average starts as the weights, then is half of itself and half of the new weights."""
    assert train.main(options(data, tmp_path, "-b", "24", "--epochs", "2", "--mixup", "0")) == 0
    first, second = (load_file(tmp_path / "run" / f"checkpoint-{i}.pth.tar") for i in range(2))
    assert equal(dict(first["state_dict"]), dict(first["state_dict_ema"]))
    for name, weight in second["state_dict"].items():
        if weight.is_floating_point():
            expected = 0.5 * first["state_dict"][name] + 0.5 * weight
            assert torch.allclose(second["state_dict_ema"][name], expected, atol=1e-6), name


@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        (("--amp", "--amp-dtype", "bfloat16", "--channels-last"), 0.1),
        pytest.param(("--torchcompile", "aot_eager", "--grad-checkpointing"), 1e-3, marks=pytest.mark.slow),
    ],
    ids=["amp", "compile"],
)
def test_another_way_to_compute_gives_the_same_training(
    data: Path, tmp_path: Path, more: tuple[str, ...], tolerance: float
) -> None:
    """The losses of two epochs are those of eager float32 but for rounding, and half precision does round."""
    shared = ("--epochs", "2", "--bce-loss", "--clip-grad", "0.02", "--clip-mode", "agc")
    for name, chosen in (("plain", ()), ("chosen", more)):
        assert train.main(options(data, tmp_path, *shared, *chosen, experiment=name)) == 0
    plain, chosen = ([float(row["train_loss"]) for row in summary(tmp_path / name)] for name in ("plain", "chosen"))
    assert chosen == pytest.approx(plain, rel=tolerance)
    assert ("--amp" in more) <= (abs(chosen[0] - plain[0]) > 1e-5 * plain[0])  # float32 alone differs by 1e-7
    assert abs(plain[1] - plain[0]) > 2e-3 * plain[0]  # else the comparison says little


def test_layer_decay_and_a_schedule_on_updates_set_the_rates_that_their_formulas_say(
    data: Path, tmp_path: Path
) -> None:
    """Layer by layer 0.8 of the one after it; a cosine over the 6 updates of 2 epochs, which here have no warm-up."""
    more = ("--opt", "adamw", "--layer-decay", "0.8", "--sched-on-updates", "--warmup-epochs", "0", "--min-lr", "0")
    assert train.main(options(data, tmp_path, "--epochs", "2", "--val-split", "", *more)) == 0
    groups = load_file(tmp_path / "run" / "checkpoint-0.pth.tar")["optimizer"]["param_groups"]
    scales = sorted({group["lr_scale"] for group in groups}, reverse=True)
    assert scales == pytest.approx([0.8**i for i in range(len(scales))])
    assert len(scales) > 2
    rate = 0.05 * 0.5 * (1 + math.cos(math.pi * 3 / 6))
    assert [group["lr"] for group in groups] == pytest.approx([rate * group["lr_scale"] for group in groups])
    assert "eval_top1" not in summary(tmp_path / "run")[0]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_names_its_source_and_a_model_that_exists(recipe: Path) -> None:
    text = recipe.read_text()
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("# ")
    assert any(line.startswith("# Source: ") for line in comment)
    assert any(f"scripts/recipes/{recipe.name}" in line and "scripts/train.py" in line for line in comment)
    assert ("Not run here" in comment[0]) == ("in1k" in recipe.stem)
    args, _ = train.parse_args(["--config", str(recipe), "--data-dir", "D", "--device", "cpu"])
    kwargs = timm.models.resolve_model_input_args(
        args.model, vars(args), num_classes=args.num_classes, **args.model_kwargs
    )
    model = timm.create_model(**kwargs, device="meta")
    sugar = [module for module in model.modules() if isinstance(module, timm_sugar.SUGAR)]
    assert {module.surrogate for module in sugar} == {args.model_kwargs.get("surrogate", "bsilu")}
    assert set(yaml.safe_load(text)) <= vars(args).keys()


def test_options_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    config = tmp_path / "r.yaml"
    config.write_text(
        "lr: 1e-3\nepochs: 7\nmodel_kwargs: {alpha: 0.05, surrogate: nelu}\nscale: [0.5, 1]\namp: true\naa: null\n"
    )
    args, _ = train.parse_args(["-c", str(config), "--epochs", "9"])
    assert (args.lr, args.epochs, args.batch_size, args.amp, args.aa) == (1e-3, 9, 128, True, None)
    assert (args.model_kwargs, args.scale) == ({"alpha": 0.05, "surrogate": "nelu"}, [0.5, 1.0])


def refuse(argv: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The error line; no run may have begun."""
    line = error_line(train.main, argv, capsys)
    assert line.startswith("train.py: error: ")
    assert not list(out.rglob("args.yaml"))
    return line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model", "resnet18_sugr"), "Unknown model (resnet18_sugr)"),
        (("--model", "test_resnet_sugar.nonsense"), "Invalid pretrained tag (nonsense)"),
        (("--model-kwargs", "surrogate=relu6"), "unknown surrogate 'relu6'; choose one of bsilu, elu,"),
        (("--model-kwargs", "beta=1"), "beta"),
        (("--model-kwargs", "alpha=nan"), "alpha of surrogate 'bsilu' must be"),
        (("--model-kwargs", "alpha=1e999"), "must be finite and 0 or more, not inf"),
        (("--model-kwargs", "alpha=-1"), "must be finite and 0 or more, not -1"),
        (("--model-kwargs", "alpha=abc"), "must be a number, not 'abc'"),
        (("--model-kwargs", "alpha"), "expected name=value, not 'alpha'"),
        (("--device", "cuda"), "--device cuda: this machine has none"),
        (("--device", "gpu"), "--device gpu"),
        (("--num-classes", "2"), "the data has 3 classes but the model has 2 outputs: --num-classes 3"),
        (("-b", "7"), "even --batch-size"),
        (("-b", "100"), "24 images, fewer than one batch of 100"),
        (("-b", "0"), "argument -b/--batch-size: expected 1 or more, not 0"),
        (("--opt", "sgdd"), "can't create optimizer or schedule"),
        (("--pretrained-path", "x"), "--pretrained-path has no effect without --pretrained"),
        (("--initial-checkpoint", "nowhere.pth"), "--initial-checkpoint nowhere.pth: no such file"),
        (("--pretrained", "--pretrained-path", "nowhere.pth"), "--pretrained-path nowhere.pth: no such file"),
        (("--class-map", "empty.pkl"), "can't open data set"),
        (("--gp", ""), "this model can't classify images of size 3 x 32 x 32"),
        (("--model-kwargs", "features_only=True"), "has no attribute 'num_classes'"),
        (("--device-modules", ".x"), "--device-modules: '.x' can't be the name of a module"),
        (("--device-modules", ""), "--device-modules: '' can't be the name of a module"),
        (("--val-split", "nosuchsplit"), "no split 'nosuchsplit' (it has: train, validation)"),
        (("--data-dir", "nowhere"), "data folder nowhere does not exist"),
        (("--dataset", "torch/nonsense"), "can't open data set torch/nonsense"),
        (("--config", "nowhere.yaml"), "can't read nowhere.yaml"),
        (("--resume", "nowhere"), "--resume nowhere: no such file or folder"),
        (("--resume", "auto", "--experiment", ""), "--resume auto needs --experiment"),
        (("--min-lr", "1", "--lr", "0.5"), "--min-lr 1 is above the learning rate, 0.5"),
        (("--epohcs", "3"), "unrecognized arguments: --epohcs 3"),
        (("--epochs", "three"), "argument --epochs: expected a whole number, not 'three'"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_bad_option(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    (data / "empty.pkl").touch()
    assert message in refuse(options(data, tmp_path, *more), tmp_path, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epohcs: 3", "unknown key 'epohcs', did you mean 'epochs'?"),
        ("resume: x", "unknown key 'resume'"),
        ("epochs: [1, 2", "can't read"),
        ("epochs: 3\nlr: 1\nepochs: 5", "epochs stands there twice"),
        ("- epochs", "expected 'option: value' lines"),
        ("epochs: many", "argument --epochs: expected a whole number, not 'many'"),
        ("amp: 3", "argument --amp: ignored explicit argument '3'"),
        ("model_kwargs: {alpha: .inf}", "must be"),
    ],
)
def test_bad_yaml(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert message in refuse(options(data, tmp_path, "-c", str(tmp_path / "bad.yaml")), tmp_path, capsys)


def test_empty_or_flat_data_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "validation"):
        (tmp_path / "d" / split).mkdir(parents=True)
    argv = options(tmp_path / "d", tmp_path / "out")
    assert "train is empty" in refuse(argv, tmp_path, capsys)
    images = make_images(tmp_path / "images")
    (images / "train" / "cat" / "0.png").rename(tmp_path / "d" / "train" / "0.png")
    assert "put each class into a folder of its own" in refuse(argv, tmp_path, capsys)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_class_missing_in_one_split(tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str) -> None:
    images = make_images(tmp_path / "images")
    for path in (images / split / "dog").iterdir():
        path.unlink()
    line = refuse(options(images, tmp_path / "out"), tmp_path, capsys)
    assert f"1 of 3 classes are missing in the {'training' if split == 'train' else split} split: dog" in line


@pytest.mark.parametrize("split", ["train", "validation"])
def test_truncated_image_is_named_and_skipped_only_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, split: str
) -> None:
    images = make_images(tmp_path / "images")
    broken = images / split / "owl" / "3.png"
    broken.write_bytes(broken.read_bytes()[:800])
    argv = options(images, tmp_path, "--epochs", "1", "--no-aug", "--mixup", "0")
    line = error_line(train.main, argv, capsys)
    assert f"can't read image {broken}" in line
    assert "--skip-broken-images" in line
    assert train.main(["--resume", str(tmp_path / "run"), "--skip-broken-images"]) == 0
    assert f"skipped image {broken}" in caplog.text


@pytest.mark.slow
def test_truncated_image_in_a_loader_process(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    broken = images / "train" / "owl" / "3.png"
    broken.write_bytes(b"")
    output = finish(run_script([str(SCRIPTS / "train.py"), *options(images, tmp_path, "-j", "2")]), 2)
    assert len(output.strip().splitlines()) == 1
    assert f"train.py: error: can't read image {broken}" in output


def test_resume_of_a_finished_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in finished.iterdir()}
    line = error_line(train.main, ["--resume", str(finished)], capsys)
    assert "the run is finished (3 of 3 epochs)" in line
    assert {p: p.read_bytes() for p in finished.iterdir()} == before


def test_resume_of_what_is_no_checkpoint(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (finished / "last.pth.tar").read_bytes()
    contents = {"truncated": whole[: len(whole) // 2], "text": b"no checkpoint", "empty": b""}
    for name, content in contents.items():
        path = tmp_path / f"{name}.pth.tar"
        path.write_bytes(content)
        for option in ("--resume", "--initial-checkpoint"):
            line = refuse(options(data, tmp_path, option, str(path)), tmp_path, capsys)
            assert f"{path} is not a whole checkpoint" in line
            assert "weights_only" not in line  # torch's message says how to let a file execute code
    torch.save(load_file(finished / "last.pth.tar")["state_dict"], tmp_path / "weights.pth")
    line = refuse(options(data, tmp_path, "--resume", str(tmp_path / "weights.pth")), tmp_path, capsys)
    assert "not a training checkpoint (no optimizer state); use it as --initial-checkpoint" in line
    assert "no run in this folder" in refuse(["--resume", str(data)], tmp_path, capsys)


def test_checkpoint_of_another_architecture(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(finished / "last.pth.tar")
    other = options(data, tmp_path, "--model", "test_vit_sugar")
    assert "is a checkpoint of test_resnet_sugar, not of test_vit_sugar" in refuse(
        [*other, "--resume", path], tmp_path, capsys
    )
    assert "can't create model test_vit_sugar" in refuse([*other, "--initial-checkpoint", path], tmp_path, capsys)
    line = refuse([*options(data, tmp_path, "--num-classes", "5"), "--resume", path], tmp_path, capsys)
    assert "doesn't fit model test_resnet_sugar with these options" in line


def test_output_folder_that_exists_or_cannot_be_made(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in finished.iterdir()}
    line = error_line(train.main, options(data, finished.parent), capsys)
    assert f"output folder {finished} exists" in line
    assert {p: p.read_bytes() for p in finished.iterdir()} == before
    (tmp_path / "file").write_text("in the way")
    assert "can't write to output folder" in refuse(options(data, tmp_path / "file"), tmp_path, capsys)
    assert "exists" in refuse(options(data, tmp_path, experiment="file"), tmp_path, capsys)


@pytest.mark.slow
def test_full_disk_keeps_the_last_good_checkpoint(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(options(data, tmp_path, "--resume", "auto", "--epochs", "3", "--sched", "none")) == 0
    folder = tmp_path / "run"
    (folder / "my_tmp_notes.txt").write_text("")
    (folder / "tmp-summary").mkdir()
    good = (folder / "last.pth.tar").read_bytes()
    with largest_file(len(good) // 2):
        line = error_line(train.main, ["--resume", str(folder), "--epochs", "4"], capsys)
    assert "can't save to" in line
    assert "as on a full disk" in line
    assert f"--resume {folder}" in line
    assert (folder / "last.pth.tar").read_bytes() == good
    assert {path.name for path in folder.glob("*tmp*")} == {"my_tmp_notes.txt", "tmp-summary"}  # not the run's
    assert train.main(["--resume", str(folder), "--epochs", "4"]) == 0
    assert load_file(folder / "last.pth.tar")["epoch"] == 3


def test_curves_are_the_same_from_memory_and_from_the_summary(tmp_path: Path) -> None:
    rows = [{"epoch": e, "train_loss": 2.0 - e, "eval_top1": 40.0 + e, "eval_dead_units": 0.0} for e in (0, 1)]
    pictures = []
    for drawn in (rows, [{key: str(value) for key, value in row.items()} for row in rows]):
        plot_curves(tmp_path, drawn)
        pictures.append((tmp_path / "curves.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_the_new_classifier_can_start_small(data: Path, tmp_path: Path) -> None:
    def head(*more: str) -> torch.nn.Linear:
        args, _ = parse_args(options(data, tmp_path, *more))
        return build_model(args).get_classifier()

    plain, small = head(), head("--head-init-scale", "0.01", "--head-init-bias", "-2")
    assert torch.equal(small.weight, plain.weight * 0.01)
    assert plain.bias.abs().max() > 0
    assert torch.equal(small.bias, torch.full_like(plain.bias, -2))
    assert torch.equal(head("--head-init-scale", "0.5").bias, plain.bias * 0.5)
