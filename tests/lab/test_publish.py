"""`scripts/publish.py` as a user runs it: from a run to a repository, and the code on the card."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fgi
import pytest
import timm
import torch
import torch.nn.functional as F
from lab.release.stage import FILES
from lab.training.runs import load_file
from loopback_hub import READ, WRITE, LoopbackHub, Repo
from PIL import Image
from scripting import CLASSES, SCRIPTS, error_line, load_script, make_images
from staging import train

from timm_sugar.models._weights import MODEL_CARDS
from timm_sugar.version import __version__

pytestmark = pytest.mark.slow
publish = load_script("publish")
NAME = "test_resnet_sugar.bsilu_x"
PUBLISHED = sorted(path.parent for path in MODEL_CARDS.glob("*/config.json"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, its twin, another run that is none, and the first one staged in models/."""
    root = tmp_path_factory.mktemp("publish")
    run, twin = train(root, "test_resnet_sugar"), train(root, "test_resnet", "--model-kwargs")
    train(root, "resnet10t", "--lr", "0.2")
    make_images(root / "other", classes=("x", "y", "z"))
    argv = ["stage", str(run), "--tag", "bsilu_x", "--dataset", "toys", "--models", str(root / "models"), "--org", "me"]
    assert publish.main([*argv, "--note", "A note."]) == 0
    for _ in range(2):  # the second time replaces the first
        assert publish.main(["twin", NAME, str(twin), "--models", str(root / "models")]) == 0
    return root


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


def push(hub: LoopbackHub, root: Path, *options: str, token: str | None = WRITE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "publish.py"), "push", "--models", str(root / "models"), *options]
    environment = hub.environment(root / "home", token)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_staged_folder_has_what_was_measured_of_run_and_twin(root: Path) -> None:
    folder = root / "models" / NAME
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    with open(folder / "results.csv") as file:
        table = list(csv.DictReader(file))
    rows = {row["weights"]: row for row in table}
    assert [row["weights"] for row in table] == ["float16", "float32", "ReLU twin"]
    for row, run in (("float32", "test_resnet_sugar"), ("ReLU twin", "test_resnet")):
        with open(root / run / "summary.csv") as file:
            last = list(csv.DictReader(file))[-1]
        for key in ("top1", "top5", "dead_units", "sparsity"):
            assert float(rows[row][key]) == pytest.approx(float(last[f"eval_{key}"]), abs=1e-4), (row, key)
    card = (folder / "README.md").read_text()
    assert "A note." in card
    assert 'create_model("hf-hub:me/' in card
    assert f"evaluate.py --model hf-hub:me/{NAME} --data-dir" in card  # the name alone is not registered
    assert "--config train_args.yaml" in card


def test_a_model_does_not_get_the_names_of_other_classes(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = next(path for path in root.iterdir() if path.name == "test_resnet_sugar")
    argv = ["stage", str(run), "--tag", "x", "--dataset", "toys", "--models", str(tmp_path / "models"), "--org", "me"]
    line = error_line(publish.main, [*argv, "--data-dir", str(root / "other")], capsys)
    assert f"{run} was trained on other classes (cat, not x): give the --data-dir that it was trained on" in line
    assert not (tmp_path / "models").exists()


def test_model_is_measured_on_the_images_that_its_run_was(root: Path, tmp_path: Path) -> None:
    """Those of --val-split, with the classes in the order of --class-map."""
    make_images(tmp_path / "data")
    make_images(tmp_path / "more", train=4, validation=7)
    (tmp_path / "more" / "validation").rename(tmp_path / "data" / "test")
    (tmp_path / "map.txt").write_text("\n".join(reversed(CLASSES)) + "\n")
    run = train(tmp_path, "test_resnet_sugar", "--val-split", "test", "--class-map", str(tmp_path / "map.txt"))
    argv = ["stage", str(run), "--tag", "bsilu_x", "--dataset", "toys", "--models", str(tmp_path / "m"), "--org", "me"]
    assert publish.main(argv) == 0
    with open(tmp_path / "m" / NAME / "results.csv") as file:
        row = next(row for row in csv.DictReader(file) if row["weights"] == "float32")
    with open(run / "summary.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert row["images"] == "21"
    assert float(row["loss"]) == pytest.approx(float(last["eval_loss"]), abs=1e-4)
    assert row["command"].endswith(" --activations --split=test --class-map=map.txt")
    config = json.loads((tmp_path / "m" / NAME / "config.json").read_text())
    assert config["label_names"] == [*reversed(CLASSES)]


def test_model_and_twin_are_measured_at_the_size_that_stage_was_asked_for(root: Path, tmp_path: Path) -> None:
    models, run, twin = tmp_path / "models", root / "test_resnet_sugar", root / "test_resnet"
    argv = ["stage", str(run), "--tag", "bsilu_x", "--dataset", "toys", "--org", "me", "--img-size", "64"]
    assert publish.main([*argv, "--models", str(models)]) == 0
    assert publish.main(["twin", NAME, str(twin), "--models", str(models)]) == 0
    folder = models / NAME
    config, card = json.loads((folder / "config.json").read_text()), (folder / "README.md").read_text()
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert "toys at 32 x 32 pixels" in card
    assert "Images are 64 x 64 pixels here and were 32 x 32 in training" in card
    assert "img_size: 32" in (folder / "train_args.yaml").read_text()
    with open(folder / "results.csv") as file:
        losses = {row["weights"]: float(row["loss"]) for row in csv.DictReader(file)}
    evaluate, results = load_script("evaluate"), tmp_path / "results.json"
    for name, checkpoint in (("float32", run), ("ReLU twin", twin)):
        argv = ["--checkpoint", str(checkpoint / "last.pth.tar"), "--img-size", "64", "--device", "cpu", "-j", "0"]
        assert evaluate.main([*argv, "--results-file", str(results), "--results-format", "json"]) == 0
        assert json.loads(results.read_text())["loss"] == pytest.approx(losses[name], abs=1e-5)


def test_a_twin_that_was_trained_with_another_option_for_its_size_is_measured_at_the_folders(tmp_path: Path) -> None:
    """As the folder's images: of 32 pixels by --input-size, of 48 where they are measured."""
    size = ("--input-size", "3", "32", "32", "--device", "cpu")
    run, twin = train(tmp_path, "test_resnet_sugar", *size), train(tmp_path, "test_resnet", *size)
    models = tmp_path / "models"
    argv = ["stage", str(run), "--tag", "bsilu_x", "--dataset", "toys", "--org", "me", "--img-size", "48"]
    assert publish.main([*argv, "--models", str(models)]) == 0
    assert publish.main(["twin", NAME, str(twin), "--models", str(models)]) == 0
    with open(models / NAME / "results.csv") as file:
        losses = {row["weights"]: float(row["loss"]) for row in csv.DictReader(file)}
    config = timm.data.resolve_data_config({"input_size": (3, 48, 48)}, model=timm.create_model("test_resnet"))
    transform, images, labels = timm.data.create_transform(**config), [], []
    for label, name in enumerate(CLASSES):
        for path in (tmp_path / "data" / "validation" / name).iterdir():
            with Image.open(path) as image:
                images.append(transform(image.convert("RGB")))
                labels.append(label)
    x, y = torch.stack(images), torch.tensor(labels)
    model = timm.create_model("test_resnet", num_classes=3)
    model.load_state_dict(load_file(twin / "last.pth.tar")["state_dict"])
    with torch.no_grad():
        loss = F.cross_entropy(model.eval()(x), y).item()
    assert losses["ReLU twin"] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("train_args.yaml", ""),
        ("train_args.yaml", "[1]"),
        ("config.json", '{"label_names": ["cat", "dog", "owl"], "pretrained_cfg": {"input_size": [3, 32, 32]}}'),
        ("config.json", "{}"),
        ("config.json", "[]"),
    ],
)
def test_a_twin_for_an_odd_folder_is_one_line(
    file: str, text: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "models"
    shutil.copytree(root / "models" / NAME, models / NAME)
    (models / NAME / file).write_text(text)
    line = error_line(publish.main, ["twin", NAME, str(root / "test_resnet"), "--models", str(models)], capsys)
    assert "can't read" in line
    assert file in line


def test_evaluating_the_folder_gives_the_number_of_the_card_again(root: Path, tmp_path: Path) -> None:
    evaluate = load_script("evaluate")
    argv = ["--checkpoint", str(root / "models" / NAME), "--data-dir", str(root / "data"), "--device", "cpu", "-j", "0"]
    assert evaluate.main([*argv, "--activations", "--results-file", str(tmp_path / "results.csv")]) == 0
    with open(tmp_path / "results.csv") as file:
        row = next(csv.DictReader(file))
    card = (root / "models" / NAME / "README.md").read_text()
    assert re.search(rf"\*\*this file .*\| {float(row['top1']):.2f} \| {float(row['top5']):.2f} \|", card)


def test_push_twice_from_the_command_line(root: Path, hub: LoopbackHub) -> None:
    dry = push(hub, root, "--org", "me", "--dry-run", token=None)
    assert dry.returncode == 0, dry.stderr
    assert f"create me/{NAME}" in dry.stdout
    assert not hub.repos
    first = push(hub, root, "--org", "me", "--private")
    assert first.returncode == 0, first.stderr
    assert hub.repos[f"me/{NAME}"].private
    assert list(hub.repos[f"me/{NAME}"].tags) == [f"v{__version__}"]
    second = push(hub, root, NAME, "--org", "me", "--private")
    assert second.stdout == f"me/{NAME}: up to date\n"
    assert WRITE not in first.stdout + first.stderr + second.stdout + second.stderr


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "no token: run `hf auth login`"),
        (READ, "can only read"),
        ("hf_secret\x0bsecret", "the token has a character that no token has"),
        ("hf_secreté", "the token has a character that no token has"),
    ],
)
def test_push_without_a_token_that_may_write_is_one_line(
    token: str | None, message: str, root: Path, hub: LoopbackHub
) -> None:
    done = push(hub, root, "--org", "me", token=token)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert message in done.stderr
    assert "secret" not in done.stderr
    assert not hub.repos


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("push resnet18_sugar.x --models {root}/models", "no model resnet18_sugar.x in"),
        ("push ../models/resnet18_sugar.x --models {root}/models", "no model ../models/resnet18_sugar.x in"),
        ("push --models {root}/none", "no models in"),
        ("stage {root}/test_resnet_sugar --tag ../../x --dataset d --models {root}/new", "a tag has letters"),
        ("stage {root}/test_resnet_sugar --tag a/b --dataset d --models {root}/new", "a tag has letters"),
        ("stage {root}/test_resnet_sugar --tag= --dataset d --models {root}/new", "a tag has letters"),
        ("stage {root}/test_resnet_sugar --tag x --dataset d --img-size 0 --models {root}/new", "expected"),
        ("stage {root}/test_resnet_sugar --tag x --dataset d --img-size 9999999 --models {root}/new", "1 to 4096"),
        ("stage {root}/test_resnet_sugar --tag x --dataset= --models {root}/new", "--dataset: expected some words"),
        ("stage {root}/test_resnet_sugar --tag x --dataset d --license= --models {root}/new", "--license: expected"),
        ("stage {root}/test_resnet_sugar --tag x --dataset d --org ../x --models {root}/new", "--org: expected"),
        ("push --org a/b --models {root}/models", "--org: expected letters"),
        ("push --org other --models {root}/models", "was staged for me: push it with --org me"),
        ("cards --models {root}/none", "no models in"),
        ("stage {root}/none --tag x --dataset d --models {root}/new", "is not a training run"),
        ("stage {root}/test_resnet_sugar --tag bsilu_x --dataset d --models {root}/models", "exists"),
        (f"twin {NAME} {{root}}/resnet10t --models {{root}}/models", "was trained with another lr"),
        (
            f"twin {NAME} {{root}}/test_resnet --models {{root}}/models --data-dir {{root}}/other",
            "was trained on other classes (cat, not x)",
        ),
        (f"int8 {NAME} {{root}}/test_resnet --models {{root}}/models", "is no conversion of a checkpoint"),
        (f"twin {NAME} {{root}}/none --models {{root}}/models", "is not a training run"),
        ("twin resnet18_sugar.x {root}/resnet10t --models {root}/models", "no model resnet18_sugar.x"),
        (
            "stage {root}/test_resnet_sugar --tag x --dataset d --models {root}/new --data-dir {root}/none",
            "does not exist",
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    command: str, message: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_line(publish.main, [part.format(root=root) for part in command.split()], capsys)
    assert not (root / "new").exists() or not list((root / "new").iterdir())


@pytest.mark.parametrize(("option", "text"), [("--note", "a\n---\nb"), ("--note", " "), ("--license", "mit\ntags: x")])
def test_an_option_is_one_line_of_the_card(
    option: str, text: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["stage", str(root / "test_resnet_sugar"), "--tag", "x", "--dataset", "d", "--models", str(root / "new")]
    assert f"argument {option}: expected" in error_line(publish.main, [*argv, option, text], capsys)


def test_cards_are_written_again_and_other_files_are_left(root: Path) -> None:
    folder = root / "models" / NAME
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "README.md").write_text("edited")
    assert publish.main(["cards", "--models", str(root / "models")]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


RUN_BLOCKS = """
import copy, json, pathlib, re, sys
config = json.loads(pathlib.Path(sys.argv[1]).with_name("config.json").read_text())
stock = not config["architecture"].endswith("_sugar")
blocks = re.findall(r"```python\\n(.*?)```", open(sys.argv[1]).read(), flags=re.DOTALL)
assert len(blocks) == 5
for i, block in enumerate(blocks):
    names = {}
    exec(block, names)
    assert ("timm_sugar" in sys.modules) == (i == 4 or not stock), block
assert names["model"].num_classes == 5

import timm, torch
from fgi import inject
from timm_sugar import SUGAR
arguments = dict(config["sugar"]["model_args"])
model = names["model"].double().eval()
if arguments["surrogate"] == "same":  # of a network with Hardswish and ReLU
    oracle = timm.create_model(config["architecture"], num_classes=5).double().eval()
    oracle.load_state_dict(model.state_dict())
    inject(oracle, (torch.nn.Hardswish,), "silu")
else:
    oracle = inject(copy.deepcopy(model), (SUGAR,), arguments["surrogate"], alpha=arguments["alpha"])
x = torch.randn(2, *config["pretrained_cfg"]["input_size"], dtype=torch.float64)
for network in (model, oracle):
    network.zero_grad()
    network(x).square().sum().backward()
for ours, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
"""


@pytest.mark.parametrize(
    "folder",
    [None, *(pytest.param(folder, marks=pytest.mark.slow) for folder in PUBLISHED)],
    ids=lambda folder: folder.name if folder else "toy",
)
def test_every_block_of_a_card_runs(folder: Path | None, root: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    """All blocks but the last load a stock network where there is one; this package was then never imported."""
    repo = f"timm-sugar/{folder.name}" if folder else f"me/{NAME}"
    folder = folder or root / "models" / NAME
    hub.repos[repo] = Repo()
    hub.repos[repo].commit({path.name: path.read_bytes() for path in folder.iterdir()})
    Image.new("RGB", (80, 60), "orange").save(tmp_path / "image.jpg")
    environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(Path(fgi.__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", RUN_BLOCKS, str(folder / "README.md")],
        **{"env": environment, "cwd": tmp_path, "capture_output": True, "text": True},
        **{"timeout": 300, "check": False},
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((folder / "config.json").read_text())
    labels = (config.get("label_descriptions") or dict.fromkeys(config["label_names"])).items()
    shown = re.findall(r"^[\d.]+% (.+)$", done.stdout, flags=re.MULTILINE)
    assert len(shown) == 3
    assert set(shown) <= {description or label for label, description in labels}
    assert set(done.stdout.splitlines()) & set(config["label_names"])  # what the pipeline of transformers says
