"""From a run to a model's folder: the same network, nothing of the machine, and nothing half-made."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from lab.cli import UserError, yaml_options
from lab.release.card import read_results
from lab.release.checks import check
from lab.release.stage import FILES, TrainedRun, add_twin, describe_labels, stage, statistics
from lab.training.options import build_parser
from lab.training.runs import read_checkpoint
from safetensors.torch import load_file, save_file
from scripting import error_line, load_script, make_images
from staging import MEASURED, SWIN, VERSIONS, make_folder, refresh, train

from timm_sugar import list_activations

STOCK = {
    "test_resnet_sugar": ("test_resnet", None),
    "convnext_atto_sugar": ("convnext_atto", "relu"),
    "swin_tiny_sugar": ("swin_tiny_sugar", None),  # takes no act_layer: needs this package
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {
        "test_resnet_sugar": train(root, "test_resnet_sugar", "--channels-last"),
        "convnext_atto_sugar": train(root, "convnext_atto_sugar", "--model-kwargs", "surrogate=nelu", "alpha=0.05"),
        "swin_tiny_sugar": train(root, "swin_tiny_sugar", *SWIN),
    }


@pytest.mark.parametrize("name", STOCK)
def test_folder_holds_the_trained_network_under_a_stock_name_where_there_is_one(
    name: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    folder = make_folder(runs[name], tmp_path / f"{name}.x")
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["model_args"].get("act_layer")) == STOCK[name]
    loaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    run = TrainedRun(runs[name])
    trained = run.build(name, run.model_args)
    trained.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in run.weights.items()})
    image = torch.randn(2, *config["pretrained_cfg"]["input_size"])
    with torch.inference_mode():
        assert torch.equal(loaded(image), trained(image))
    assert loaded.pretrained_cfg["label_names"] == ["cat", "dog", "owl"]


def test_network_whose_activations_do_not_show_yet_is_not_taken_for_one_with_gelu(runs: dict[str, Path]) -> None:
    run = TrainedRun(runs["convnext_atto_sugar"])
    for key in run.weights:
        if key.endswith("gamma"):  # layer scale, which starts near 0
            run.weights[key].zero_()
    assert not any(isinstance(module, torch.nn.GELU) for module in run.deployed().modules())
    assert any(isinstance(module, torch.nn.ReLU) for module in run.deployed().modules())


@pytest.mark.slow
def test_stock_folder_loads_where_this_package_was_never_imported(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = make_folder(runs["convnext_atto_sugar"], tmp_path / "convnext_atto_sugar.x")
    code = f"""
import sys, timm, torch
model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
assert "timm_sugar" not in sys.modules
with torch.inference_mode():
    torch.save(model(torch.ones(1, 3, 32, 32)), "{tmp_path}/output.pt")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(torch.load(tmp_path / "output.pt", weights_only=True), model(torch.ones(1, 3, 32, 32)))


@pytest.mark.parametrize(("after", "stored"), [(90.0, "float16"), (89.951, "float16"), (89.94, "float32")])
def test_weights_are_halved_only_if_that_costs_little(
    after: float, stored: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    measured = iter([MEASURED, {**MEASURED, "top1": after}])
    folder = make_folder(runs["test_resnet_sugar"], tmp_path / "test_resnet_sugar.x", lambda _: dict(next(measured)))
    weights, trained = load_file(folder / "model.safetensors"), TrainedRun(runs["test_resnet_sugar"]).weights
    dtype = getattr(torch, stored)
    for key, value in weights.items():
        assert torch.equal(value, trained[key].to(dtype) if value.is_floating_point() else trained[key])
    assert weights["fc.weight"].dtype == dtype
    rows = (folder / "results.csv").read_text().splitlines()
    assert rows[1].startswith(f"{stored},{after if stored == 'float16' else 90.0},")


def test_wordnet_ids_are_described_and_other_labels_are_not(runs: dict[str, Path], tmp_path: Path) -> None:
    run, about = TrainedRun(runs["test_resnet_sugar"]), {"org": "o", "dataset": "d", "notes": []}
    folder, labels = tmp_path / "test_resnet_sugar.x", ["n01443537", "n02123394", "n07747607"]
    measured = MEASURED | VERSIONS
    stage(run, folder, licence="mit", labels=labels, about=about, measure=lambda _: dict(measured))
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == labels
    assert [config["label_descriptions"][label].partition(",")[0] for label in labels] == [
        "goldfish",
        "Persian cat",
        "orange",
    ]
    assert '["label_descriptions"][labels[i]])' in (folder / "README.md").read_text()
    assert describe_labels(["n01443537", "cat"]) is None


def test_measured_weights_are_those_that_are_stored(runs: dict[str, Path], tmp_path: Path) -> None:
    seen = []

    def measure(folder: Path) -> dict[str, Any]:
        seen.append((folder / "model.safetensors").read_bytes())
        return dict(MEASURED)

    folder = make_folder(runs["test_resnet_sugar"], tmp_path / "test_resnet_sugar.x", measure)
    assert len(seen) == 2
    assert seen[1] == (folder / "model.safetensors").read_bytes()


def test_settings_are_kept_without_the_paths_of_the_machine(runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["convnext_atto_sugar"]
    folder = make_folder(run, tmp_path / "convnext_atto_sugar.x")
    for path in folder.iterdir():
        assert str(run.parent).encode() not in path.read_bytes(), path
    options = yaml_options(str(folder / "train_args.yaml"), build_parser())
    again, once = vars(build_parser().parse_args(options)), yaml.safe_load((run / "args.yaml").read_text())
    assert again["model_kwargs"] == {"surrogate": "nelu", "alpha": 0.05}
    differing = {key for key in once if again[key] != once[key]}
    assert differing == {"data_dir", "output", "experiment"}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("{}/start.safetensors", "start.safetensors"),
        ("a/start.safetensors",) * 2,
        ("../s.safetensors", "s.safetensors"),
    ],
)
def test_file_that_training_started_from_is_kept_by_name_or_relative_path(
    given: str, kept: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = given.format(tmp_path)
    Path(given).parent.mkdir(exist_ok=True)
    save_file(TrainedRun(runs["test_resnet_sugar"]).weights, given)
    run = train(tmp_path, "test_resnet_sugar", "--pretrained", "--pretrained-path", given)
    folder = make_folder(run, tmp_path / "models" / "test_resnet_sugar.x")
    assert yaml.safe_load((folder / "train_args.yaml").read_text())["pretrained_path"] == kept


@pytest.mark.parametrize(
    ("given", "kept"),
    [("hfds//data/of/me", "hfds/me"), ("hfds/org/name", "hfds/org/name"), ("wds/../x", "wds/x"), ("",) * 2],
)
def test_folder_that_dataset_names_is_kept_by_name(
    given: str, kept: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(runs["test_resnet_sugar"], tmp_path / "run")
    settings = yaml.safe_load((run / "args.yaml").read_text())
    (run / "args.yaml").write_text(yaml.safe_dump({**settings, "dataset": given}))
    folder = make_folder(run, tmp_path / "models" / "test_resnet_sugar.x")
    assert yaml.safe_load((folder / "train_args.yaml").read_text())["dataset"] == kept


def test_moving_average_is_what_is_published(tmp_path: Path) -> None:
    run = train(tmp_path, "test_resnet_sugar", "--model-ema", "--model-ema-decay", "0.5")
    state = read_checkpoint(run / "last.pth.tar", None)
    assert not torch.equal(state["state_dict"]["fc.weight"], state["state_dict_ema"]["fc.weight"])
    assert torch.equal(TrainedRun(run).weights["fc.weight"], state["state_dict_ema"]["fc.weight"])


def test_last_epoch_is_what_is_published(runs: dict[str, Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs["test_resnet_sugar"], tmp_path / "run")
    (run / "model_best.pth.tar").unlink()
    last = read_checkpoint(run / "last.pth.tar", None)["state_dict"]
    assert torch.equal(TrainedRun(run).weights["fc.weight"], last["fc.weight"])


def test_statistics_of_a_known_network(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = make_folder(runs["test_resnet_sugar"], tmp_path / "test_resnet_sugar.x")
    model = timm.create_model("test_resnet", num_classes=3)
    macs = 0

    def count(module: Any, _: Any, output: torch.Tensor) -> None:
        nonlocal macs
        per_output = module.weight[0].numel()
        macs += output.numel() * per_output

    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(count)
    model.eval()(torch.randn(1, 3, 32, 32))
    assert statistics(folder) == {"params": sum(p.numel() for p in model.parameters()), "macs": macs}


def test_what_cannot_be_staged_leaves_nothing(runs: dict[str, Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs["test_resnet_sugar"], tmp_path / "run")
    models = tmp_path / "models"

    def refuse(match: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            make_folder(run, models / "test_resnet_sugar.x")
        assert "\n" not in str(caught.value)
        assert not models.exists() or not list(models.iterdir())

    settings = yaml.safe_load((run / "args.yaml").read_text())
    (run / "args.yaml").write_text(yaml.safe_dump({**settings, "epochs": 3}))
    refuse("1 of 3 epochs are done")
    (run / "args.yaml").write_text(yaml.safe_dump({**settings, "model": "test_resnet"}))
    refuse("checkpoint of test_resnet_sugar, not of test_resnet")
    (run / "args.yaml").write_text(yaml.safe_dump(settings))
    (run / "train.log").rename(tmp_path / "train.log")
    refuse("has no train.log")
    (tmp_path / "train.log").rename(run / "train.log")
    (run / "args.yaml").rename(tmp_path / "args.yaml")
    refuse("not a training run")


def test_failed_evaluation_leaves_nothing_and_an_existing_folder_is_kept(runs: dict[str, Path], tmp_path: Path) -> None:
    def fail(_: Path) -> dict[str, Any]:
        raise UserError("the evaluation failed")

    with pytest.raises(UserError, match="evaluation failed"):
        make_folder(runs["test_resnet_sugar"], tmp_path / "test_resnet_sugar.x", fail)
    assert list(tmp_path.iterdir()) == []
    folder = make_folder(runs["test_resnet_sugar"], tmp_path / "test_resnet_sugar.x")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError, match="exists"):
        make_folder(runs["test_resnet_sugar"], folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_run_is_whole_after_its_cool_down_and_not_before(tmp_path: Path) -> None:
    run = train(tmp_path, "test_resnet_sugar", "--cooldown-epochs", "1")
    TrainedRun(run)
    shutil.copyfile(run / "checkpoint-0.pth.tar", run / "last.pth.tar")  # as if it had been killed there
    with pytest.raises(UserError, match=r"1 of 2 epochs are done; finish it with scripts/train\.py --resume"):
        TrainedRun(run)


def test_a_recipe_says_how_many_classes_the_data_had(runs: dict[str, Path], tmp_path: Path) -> None:
    """As in the recipes that are published, so that a twin whose command didn't name them is no other training."""
    run = shutil.copytree(runs["test_resnet_sugar"], tmp_path / "run")
    settings = yaml.safe_load((run / "args.yaml").read_text())
    (run / "args.yaml").write_text(yaml.safe_dump({**settings, "num_classes": None}))
    assert TrainedRun(run).recipe["num_classes"] == 3


def test_options_that_changed_midway_are_on_the_card_and_no_twin_of_it_has_others(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(runs["test_resnet_sugar"], tmp_path / "run")
    assert load_script("train").main(["--resume", str(run), "--epochs", "2", "--lr", "0.001"]) == 0
    folder = make_folder(run, tmp_path / "models" / "test_resnet_sugar.x")
    text = " ".join((folder / "README.md").read_text().split())
    assert "resumed with other options (from epoch 1 on: epochs 1 -> 2, lr " in text
    assert "-> 0.001), so this command, which has the last ones throughout, does not train it again:" in text
    before = {path: path.read_bytes() for path in folder.iterdir()}
    steady = train(tmp_path / "steady", "test_resnet", "--epochs", "2", "--lr", "0.001")
    with pytest.raises(
        UserError, match=r"not trained with the same options throughout.*from epoch 1 on: epochs 1 -> 2"
    ):
        add_twin(folder, TrainedRun(steady), lambda: dict(MEASURED | VERSIONS))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_card_names_height_and_width_of_images_that_are_not_square(tmp_path: Path) -> None:
    run = train(tmp_path, "test_resnet_sugar", "--input-size", "3", "32", "64")
    folder = make_folder(run, tmp_path / "models" / "test_resnet_sugar.x")
    text = (folder / "README.md").read_text()
    assert "trained on toys at 32 x 64 pixels" in text
    assert "torch.randn(1, 3, 32, 64)" in text
    assert "64 x 64" not in text


def test_a_network_of_grey_images_and_one_from_a_folder_are_refused_before_anything_is_made(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    grey = train(tmp_path / "grey", "test_resnet_sugar", "--in-chans", "1")
    with pytest.raises(UserError, match="images of one channel: only networks of RGB are staged"):
        make_folder(grey, tmp_path / "models" / "test_resnet_sugar.x")
    saved = tmp_path / "saved"
    timm.models.save_for_hf(timm.create_model("test_resnet_sugar", num_classes=3), saved, safe_serialization=True)
    train(tmp_path / "local", f"local-dir:{saved}", "--experiment", "run")
    local = tmp_path / "local" / "run"
    with pytest.raises(UserError, match="train a _sugar model by its name, with the weights as --initial-checkpoint"):
        make_folder(local, tmp_path / "models" / "test_resnet_sugar.x")
    assert not (tmp_path / "models").exists()


def test_weights_can_be_read_by_whoever_reads_the_other_files(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = make_folder(runs["test_resnet_sugar"], tmp_path / "models" / "test_resnet_sugar.x")
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "config.json").stat().st_mode}


def test_a_fork_is_staged_though_its_summary_begins_later(runs: dict[str, Path], tmp_path: Path) -> None:
    options = ["--resume", str(runs["test_resnet_sugar"]), "--output", str(tmp_path), "--experiment", "fork"]
    assert load_script("train").main([*options, "--epochs", "2"]) == 0
    assert (tmp_path / "fork" / "summary.csv").read_text().count("\n") == 2
    make_folder(tmp_path / "fork", tmp_path / "models" / "test_resnet_sugar.x")


def test_a_conversion_is_staged_as_the_relu_network_that_it_made(tmp_path: Path) -> None:
    original = train(tmp_path, "test_efficientnet")
    options = ["--checkpoint", str(original), "--output", str(tmp_path), "--experiment", "converted", "--no-int8"]
    short = ["--epochs", "1", "--warmup-epochs", "0", "--lr", "0.01", "-b", "8", "-j", "0", "--device", "cpu"]
    assert load_script("convert").main([*options, *short]) == 0
    folder = make_folder(tmp_path / "converted", tmp_path / "models" / "test_efficientnet_sugar.x")
    check(folder)
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert {*list_activations(model).values()} <= {"ReLU", "SUGAR"}
    recipe = yaml.safe_load((folder / "train_args.yaml").read_text())
    assert (recipe["model"], recipe["checkpoint"], recipe["surrogate"]) == ("test_efficientnet", original.name, "same")
    assert "python scripts/convert.py --config" in (folder / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())
    config["sugar"]["org"] = "me"  # whose card has no note on where the original comes from
    (folder / "config.json").write_text(json.dumps(config))
    refresh(folder)
    assert f"say where yours is: `--checkpoint {original.name}`.\n\n![" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_a_conversion_says_what_it_and_its_original_do_in_int8(tmp_path: Path, capsys: Any) -> None:
    original = train(tmp_path, "test_efficientnet")
    options = ["--checkpoint", str(original), "--output", str(tmp_path), "--experiment", "converted", "--no-int8"]
    short = ["--epochs", "1", "--warmup-epochs", "0", "--lr", "0.01", "-b", "8", "-j", "0", "--device", "cpu"]
    assert load_script("convert").main([*options, *short]) == 0
    models = tmp_path / "models"
    folder = make_folder(tmp_path / "converted", models / "test_efficientnet_sugar.x")
    before = read_results(folder)
    publish = [folder.name, str(tmp_path / "converted"), "--models", str(models), "--data-dir", str(tmp_path / "data")]
    for _ in range(2):  # the second time its rows take the place of the first
        assert load_script("publish").main(["int8", *publish]) == 0
    check(folder)
    rows = {row["weights"]: row for row in read_results(folder)}
    assert list(rows) == [*(row["weights"] for row in before), "original", "int8", "original, int8"]
    scored = evaluate_top1(original, tmp_path / "data")
    assert float(rows["original"]["top1"]) == pytest.approx(scored, abs=1e-3)
    assert rows["original"]["images"] == "12"
    ratio = float(rows["original, int8"]["ms"]) / float(rows["int8"]["ms"])
    assert float(rows["original, int8"]["to_own"]) == pytest.approx(ratio, rel=0.5)
    text = (folder / "README.md").read_text()
    assert "its weights began as those of `test_efficientnet`" in text
    assert f"| the original | {scored:.2f} |" in text
    kept = (folder / "results.csv").read_text()
    make_images(tmp_path / "less", validation=2)
    other = ["int8", *publish[:-1], str(tmp_path / "less")]
    assert f"scored on 6 images, {folder.name} on 12" in error_line(load_script("publish").main, other, capsys)
    assert (folder / "results.csv").read_text() == kept
    no_conversion = ["int8", folder.name, str(original), "--models", str(models)]
    assert "no conversion of a checkpoint" in error_line(load_script("publish").main, no_conversion, capsys)
    state = read_checkpoint(original / "last.pth.tar", None)
    next(iter(state["state_dict"].values())).add_(1)
    for name in ("last.pth.tar", "model_best.pth.tar"):
        (original / name).unlink(missing_ok=True)
        torch.save({"state_dict": state["state_dict"], "args": state["args"], "epoch": state["epoch"]}, original / name)
    assert "other weights than those that" in error_line(load_script("publish").main, ["int8", *publish], capsys)


def evaluate_top1(run: Path, data: Path) -> float:
    """What scripts/evaluate.py says."""
    results = run / "results.json"
    options = ["--checkpoint", str(run / "last.pth.tar"), "--data-dir", str(data), "--results-file", str(results)]
    assert load_script("evaluate").main([*options, "--results-format", "json", "-j", "0", "--device", "cpu"]) == 0
    return float(json.loads(results.read_text())["top1"])


@pytest.mark.parametrize("text", ["", "epochs: two\n", "model: 5\nepochs: 1\n"])
def test_odd_settings_are_one_line(text: str, runs: dict[str, Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs["test_resnet_sugar"], tmp_path / "run")
    (run / "args.yaml").write_text(text)
    with pytest.raises(UserError, match=r"not a training run|not of 5"):
        make_folder(run, tmp_path / "models" / "test_resnet_sugar.x")


def test_plain_network_is_not_staged(tmp_path: Path) -> None:
    run = train(tmp_path, "test_resnet")
    with pytest.raises(UserError, match="only _sugar models"):
        make_folder(run, tmp_path / "models" / "test_resnet.x")
