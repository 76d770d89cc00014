"""Options of training: each knows its range, on the command line and in YAML, and all that is stored still parses."""

from __future__ import annotations

import argparse
import csv
import errno
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lab.cli import Parser, UserError, real, whole, yaml_options
from lab.experiments.table import TABLES, list_tables, load_table
from lab.training.options import build_parser, find_unused, parse_args
from scripting import SCRIPTS, error_line, load_script
from timm.scheduler import create_scheduler_v2

CPU = ["--device", "cpu"]
RESULTS = SCRIPTS.parent / "results"
DEFAULTS = vars(build_parser().parse_args([]))
REFUSED = """
--in-chans 2|--crop-pct -1|--crop-pct 0|--crop-pct 5|--mean 1 2|--mean nan|--std 0 0 0|--std 1 1|--input-size 2 32 32
--interpolation nope|--interpolation random|--train-interpolation nope|--train-interpolation lanczos --aa rand-m9
--aa nope|--aa rand-x9|--aa rand-m9-mstd|--remode nope|--train-crop-mode nope|--torchcompile-mode default|--drop 2
--drop-path 2|--drop-block 2|--device meta|--device xpu|--seed -1|--seed 4294967296|-j -1|-j 1000000|--mixup -1
--cutmix -1|--mixup-prob 2|--mixup-switch-prob -1|--mixup-off-epoch -1|--smoothing 2|--smoothing 1|--bce-target-thresh 2
--scale 1|--scale 2 3|--scale 1 0.5|--ratio 0 0|--ratio 2 1|--color-jitter -1|--aug-repeats -1|--lr-base-size 0
--decay-epochs 0|--decay-rate 0|--decay-milestones -1|--cooldown-epochs -1|--warmup-epochs -1|--warmup-lr -1
--min-lr nan|-vb -1|-b 0|--epochs 0|--grad-accum-steps 0|--checkpoint-hist 0|--log-interval 0|--momentum 2
--weight-decay -1|--clip-grad nan|--clip-grad 0|--reprob 2|--recount 0|--hflip 5|--vflip -1|--layer-decay -1
--layer-decay-min-scale 2|--model-ema-decay 2|--lr nan|--lr -1|--lr-base inf|--head-init-bias inf
--head-init-scale nan|--opt-eps -1|--opt-betas 2|--num-classes 0|--img-size 0|--train-num-samples 0
--model-kwargs in_chans=5|--model-kwargs num_classes=5|--model-kwargs global_pool=max
--drop 0.1 --model-kwargs drop_rate=0.5|--model-kwargs drop_rate=5
--aa rand-m9-p5|--aa rand-tnope|--aa rand-m9-inc7|--aa rand-n0
--aa rand-n99-tweights|--aa augmix-w0|--aa augmix-a0|--aa augmix-d0|--aa original-mstdx|--aa v0-m9
--aa rand-m9-mstd1.2.3|--clip-mode agc|--model-ema-decay 0.99|--model-ema-warmup|--remode rand
--mixup-prob 0.5|--mixup-off-epoch 2|--mixup-mode elem|--dataset-download
--input-key image|--target-key label
--recount 2|--bce-target-thresh 0.2|--layer-decay-min-scale 0.1|--pretrained-path x
"""
CASES = REFUSED.replace("\n", "|").strip("|").split("|")


@pytest.mark.parametrize("words", CASES)
def test_what_no_option_means_is_one_line_that_names_it(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    option = words.split()[0]
    own = {"--model-kwargs drop_rate=5": "--drop"}.get(words, option)
    assert own in error_line(load_script("train").main, [*CPU, *words.split()], capsys)


@pytest.mark.parametrize("words", [words for words in CASES if words.startswith("--") and "=" not in words])
def test_yaml_has_the_same_ranges(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same values as YAML types: numbers, lists, strings."""
    option, *values = words.split("--")[1].split()
    typed = [yaml.safe_load(value) for value in values]
    settings = {option.replace("-", "_"): typed[0] if len(typed) == 1 else typed}
    rest = words.split()[1 + len(values) :]
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(settings))
    argv = [*rest, "-c", str(tmp_path / "bad.yaml")]
    argv += [] if option == "device" else CPU
    assert f"--{option}" in error_line(load_script("train").main, argv, capsys)


OFF = {
    "--no-aug --aa 3a --hflip 0": "--no-aug: no effect of --hflip, --aa",
    "--no-aug --aa= --hflip 0.5": "",
    "--decay-rate 0.5 --decay-epochs 3": "--sched cosine: no effect of --decay-epochs, --decay-rate",
    "--decay-rate 0.5 --decay-epochs 3 --sched step": "",
    "--sched constant --min-lr 1e-5 --warmup-lr 0": "--sched constant: no effect of --min-lr",
    "--sched none --warmup-lr 0 --sched-on-updates": "--sched none: no effect of --sched-on-updates, --warmup-lr",
    "--amp-dtype bfloat16": "without --amp: no effect of --amp-dtype",
    "--amp --amp-dtype bfloat16": "",
    "--warmup-epochs 0 --warmup-lr 1e-6": "--warmup-epochs 0: no effect of --warmup-lr",
    "--opt-betas 0.9 0.99 --opt-eps 1e-6": "--opt sgd: no effect of --opt-eps, --opt-betas",
    "--opt lookahead_AdamW --opt-betas 0.9 0.99 --momentum 0.5": "--opt lookahead_AdamW: no effect of --momentum",
    "--lr 0.1 --lr-base 0.2": "--lr: no effect of --lr-base",
}


@pytest.mark.parametrize(("words", "line"), OFF.items())
def test_what_another_option_turns_off_is_one_line(words: str, line: str, caplog: pytest.LogCaptureFixture) -> None:
    parse_args([*CPU, *words.split()])
    assert caplog.messages == ([line] if line else [])


OTHER_SETTINGS = {"decay_epochs": 10.0, "decay_rate": 0.5, "decay_milestones": [10], "min_lr": 1e-3} | {
    "cooldown_epochs": 3, "warmup_lr": 1e-3, "warmup_epochs": 7, "warmup_prefix": True
}  # fmt: skip


@pytest.mark.parametrize("sched", ["cosine", "tanh", "poly", "step", "multistep", "wsd", "constant", "none"])
@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_a_schedule_of_timm_reads_what_is_not_named_as_unused(sched: str, name: str) -> None:
    """By its learning rates, and its number of epochs, with one setting changed."""
    asked, _ = parse_args([*CPU, "--sched", sched, "--epochs", "100"])
    settings = {key: getattr(asked, key) for key in OTHER_SETTINGS} | {"decay_epochs": 20.0, "decay_milestones": [30]}
    settings |= {"min_lr": 1e-4, "warmup_prefix": name in ("warmup_epochs", "warmup_prefix") and sched == "none"}
    other = settings | {name: not settings[name] if name == "warmup_prefix" else OTHER_SETTINGS[name]}
    changed = rates(sched, settings) != rates(sched, other)
    assert changed == (name not in find_unused([name], asked).get(f"--sched {sched}", []))


def rates(sched: str, settings: dict[str, object]) -> list[float]:
    """The number of epochs, and the learning rate of each."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule, epochs = create_scheduler_v2(optimizer, sched, num_epochs=100, **settings)
    found: list[float] = [epochs]
    for epoch in range(110):
        if schedule:
            schedule.step(epoch)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("name", sorted(DEFAULTS.keys() - {"config", "resume"}))
def test_nothing_in_yaml_is_the_default_or_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "null.yaml").write_text(f"{name}: null\n")
    empty = DEFAULTS[name] is None or DEFAULTS[name] is False or DEFAULTS[name] == ""
    if empty:
        args, _ = parse_args(["-c", str(tmp_path / "null.yaml"), *CPU])
        assert getattr(args, name) == ("cpu" if name == "device" else DEFAULTS[name])
    else:
        with pytest.raises(UserError, match=f"{name} has no value; leave the line out for the default"):
            parse_args(["-c", str(tmp_path / "null.yaml"), *CPU])


@pytest.mark.parametrize(
    "words",
    [
        *("--scale 0.65 1.35 --train-crop-mode rkrr", "--aa augmix-m5", "--aa 3a", "--aa original-mstd0.5", "--aa="),
        *(
            "--aa rand-m9-tweights-inc1",
            "--aa rand-p1-n1-t3aw",
            "--aa rand-p0.5-mmax9-t3a",
            "--aa augmix-w1-d1-a0.5-b1",
        ),
        *("--interpolation=", "--train-interpolation random", "--drop 0.99", "-j 0"),
        *("--crop-pct 1", "--momentum 0", "--smoothing 0", "--mean 0.5", "--in-chans 1 --std 0.2", "--seed 4294967295"),
    ],
)
def test_the_bounds_themselves_are_taken(words: str) -> None:
    options, _ = parse_args([*CPU, *words.split()])
    assert options.device == "cpu"


@pytest.mark.parametrize("mean", [[-1e-05], [-0.5, 1e-7, 0.25]])
def test_small_negative_numbers_of_a_run_are_read_back(mean: list[float], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"mean": mean}))
    args, _ = parse_args([*CPU, "-c", str(tmp_path / "run.yaml")])
    assert args.mean == mean


@pytest.mark.parametrize("text", ["0", "1", "0.5"])
def test_open_and_closed_bounds_differ_at_the_bound_alone(text: str) -> None:
    assert real(0, 1)(text) == float(text)
    if text == "0.5":
        assert real(above=0, below=1)(text) == 0.5
    else:
        with pytest.raises(Exception, match="above 0 and below 1"):
            real(above=0, below=1)(text)
    with pytest.raises(Exception, match="2 to 3, not 4"):
        whole(2, 3)("4")


def stored_commands() -> list[str]:
    """Every command of scripts/train.py and scripts/train_tabular.py in results/, once."""
    found: dict[str, None] = {}
    for path in sorted(RESULTS.rglob("*.csv")):
        with open(path, newline="") as file:
            found.update(dict.fromkeys(row.get("command") or "" for row in csv.DictReader(file)))
    return [command for command in found if "scripts/train" in command]


def test_every_stored_command_parses() -> None:
    tabular = load_script("train_tabular").build_parser()
    commands = stored_commands()
    assert {"train.py", "train_tabular.py"} <= {Path(word).name for c in commands for word in shlex.split(c)}
    for command in commands:
        words = shlex.split(command)
        script = next(i for i, word in enumerate(words) if word.startswith("scripts/train"))
        options = words[script + 1 :]
        if words[script] == "scripts/train.py":
            args, _ = parse_args([*options, *CPU])
            assert args.epochs >= 1
        else:
            assert tabular.parse_args(options).epochs >= 1


@pytest.mark.parametrize("path", sorted((SCRIPTS / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses(path: Path) -> None:
    args, _ = parse_args(["-c", str(path), *CPU])
    for name, value in yaml.safe_load(path.read_text()).items():
        assert getattr(args, name) == value


@pytest.mark.parametrize("name", list_tables())
def test_every_run_of_every_table_parses(name: str) -> None:
    assert (TABLES / f"{name}.yaml").exists()
    table = load_table(name)
    other = load_script(Path(table.script).stem).build_parser()
    for key in table.final_keys():
        words = shlex.split(table.command(key))
        options = words[words.index(table.script) + 1 :]
        args = parse_args([*options, *CPU])[0] if table.script == "scripts/train.py" else other.parse_args(options)
        assert args.seed == key.seed


def test_an_unknown_key_is_answered_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("weight_decy: 1\n")
    with pytest.raises(UserError, match="did you mean 'weight_decay'"):
        yaml_options(tmp_path / "a.yaml", build_parser())


@pytest.mark.parametrize(("word", "unbuffered"), [("--help", ""), ("", "1")])
@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="a device of Linux")
def test_a_stdout_that_takes_no_more_is_one_line_of_every_script(word: str, unbuffered: str) -> None:
    code = f"from lab.cli import Parser; Parser('x.py').run(lambda _: print('result'), {word.split()})"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=200
        )
    assert (done.returncode, done.stderr) == (2, "x.py: error: can't write: No space left on device\n")


def test_too_many_open_files_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: argparse.Namespace) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    assert "too many open files: give fewer --workers" in error_line(partial(Parser("x.py").run, run), [], capsys)
