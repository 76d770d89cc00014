"""The tables of README and docs/: made from committed numbers, and numbers only from finished runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lab.bench.cost import COLUMNS
from lab.cli import UserError
from lab.experiments import outside
from lab.files import write_rows
from lab.release.stage import TrainedRun, add_twin
from scripting import error_line, load_script
from staging import MEASURED, VERSIONS, make_folder, train

import timm_sugar

tables = load_script("tables")
ELSEWHERE = {"device": "cuda, 16 cores, x86_64", "torch": "2.9.0", "timm": "1.0.26", "timm_sugar": "0.1.5"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of a recipe, two epochs long."""
    folder = tmp_path / "resnet18_cifar10"
    folder.mkdir()
    args = tables.load_recipe(folder.name) | {"epochs": 2, "seed": 7, "device": "cpu", "batch_size": 64}
    args |= {"amp": True, "opt_kwargs": {"foreach": False}, "output": str(tmp_path)}
    (folder / "args.yaml").write_text(yaml.safe_dump(args))
    (folder / "summary.csv").write_text(
        "epoch,train_loss,eval_loss,eval_top1,eval_top5,eval_dead_units,eval_sparsity,lr\n"
        "0,2.0,2.0,30.0,80.0,0.5,0.25,0.1\n"
        "1,1.0,1.0,61.234,95.678,0.125,0.5,0.1\n"
    )
    save_checkpoint(folder, environment=ELSEWHERE)
    return folder


def save_checkpoint(folder: Path, **settings: Any) -> None:
    state = {"state_dict": {}, "optimizer": {}, "epoch": 1, "args": argparse.Namespace(**settings)}
    torch.save(state, folder / "last.pth.tar")


def test_pages_show_the_committed_results() -> None:
    results = tables.load_results()
    texts = {page: tables.with_tables(page, results) for page in tables.pages()}
    texts |= tables.card_pages() | tables.result_pages()
    assert {page: page.read_text() for page in texts} == texts
    assert set(tables.CARDS.glob("*.md")) == tables.card_pages().keys()
    shown = "".join(texts.values())
    assert [name for name in tables.tables(results, tables.README) if f"<!-- {name} -->" not in shown] == []


def test_what_a_kill_left_of_a_page_is_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("api.md", "tmp-api.md", "training.md"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    assert [page.name for page in tables.pages()] == ["README.md", "api.md", "training.md"]


@pytest.mark.parametrize("text", ["<!-- nonsense -->\n<!-- /nonsense -->", "<!-- /models -->"])
def test_marks_without_a_table_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"# Title\n\n{text}\n")
    with pytest.raises(UserError, match=r"no table is named nonsense|no opening mark"):
        tables.with_tables(tmp_path / "page.md", {})


def test_the_short_table_of_costs_takes_its_numbers_from_the_rows(tmp_path: Path) -> None:
    assert tables.costs_table(tmp_path) == "Not measured yet."
    row = dict.fromkeys(COLUMNS, "") | {"subject": "resnet18", "mode": "eager", "metric": "step", "variant": "sugar"}
    row |= {"dtype": "float32"}
    row |= {"batch_size": "8", "img_size": "224", "surrogate": "surrogate='bsilu', alpha=1.67", "device": "cpu"}
    row |= {
        "to_relu": "1.5",
        "to_relu_q1": "1.25",
        "to_relu_q3": "1.75",
        "to_own": "1",
        "to_own_q1": "1",
        "to_own_q3": "1",
    }
    other = row | {"surrogate": "surrogate='nelu', alpha=0.01", "to_relu": "9"}
    half = row | {"dtype": "bfloat16", "to_relu": "8"}
    write_rows(tmp_path / "benchmark_model.csv", [other, half, row], COLUMNS)
    lines = tables.costs_table(tmp_path).splitlines()
    assert lines[2:4] == ["| resnet18, 8 images of 224 px: training step, eager | 1.50 (1.25–1.75) | 1.00 |", ""]


def test_figures_of_acceptance_and_replay_are_counted_from_the_rows(tmp_path: Path) -> None:
    assert outside.acceptance(tmp_path) == outside.replay(tmp_path) == "Not run yet."
    versions = {"timm": "1.0", "torch": "2.9"}
    ran = [("vit", 7, 1, 0), ("vit", 5, 0, 2), ("resnet", 1, 0, 0)]
    columns = ("family", "passed", "failed", "skipped")
    rows = [dict(zip(columns, row, strict=True)) | versions for row in ran]
    write_rows(tmp_path / "acceptance.csv", rows, (*columns, *versions))
    assert outside.acceptance(tmp_path).splitlines()[-1] == "| 3 | 2 | 13 | 1 | 2 | 1.0 | 2.9 |"
    cases = [{"source": f"a/b#{i}", "case": "x", "outcome": o} | versions for i, o in enumerate(("right", "wrong: y"))]
    write_rows(tmp_path / "replay.csv", cases, cases[0].keys())
    *_, line, _, summary = outside.replay(tmp_path).splitlines()
    assert (line, summary) == ("| `a/b#1` | x | wrong: y |", "2 cases, 1 wrong; timm 1.0, torch 2.9.")


def test_a_row_has_the_last_epoch_and_the_command_that_repeats_it(run: Path) -> None:
    row = tables.recipe_row(run, run.name)
    whole = tables.load_recipe(run.name)["epochs"]
    assert (row["epochs"], row["recipe_epochs"], row["seed"]) == (2, whole, 7)
    assert (row["top1"], row["top5"], row["dead_units"], row["sparsity"]) == ("61.23", "95.68", "0.1250", "0.5000")
    assert ELSEWHERE.items() <= row.items(), "what the run ran on, not this machine"
    changes = "--epochs=2 --amp --batch-size=64 --opt-kwargs foreach=False --seed=7 --data-dir DATA"
    assert row["command"].endswith(f"resnet18_cifar10.yaml {changes}")
    assert f"| 2 of {whole} | 61.23 | 12.50 | 50.00 |" in tables.table({"resnet18_cifar10": row})


def test_an_unfinished_run_and_a_folder_of_another_name_are_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "RESULTS", run / "results.csv")
    lines = (run / "summary.csv").read_text().splitlines()
    (run / "summary.csv").write_text("\n".join(lines[:2]) + "\n")
    for folder, message in ((run, "1 of 2 epochs are done"), (run.parent / "mine", "no recipe is named mine")):
        with pytest.raises(SystemExit) as stop:
            tables.main([str(folder)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not tables.RESULTS.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_kwargs": {"surrogate": "nelu"}},
            "its model_kwargs is {'surrogate': 'nelu'}, not {'surrogate': 'bsilu'",
        ),
        ({"model": "test_resnet_sugar"}, "its model is test_resnet_sugar"),
        ({"img_size": 32}, "its img_size is 32"),
        ({"distill": 1.0}, "'distill'"),
        ({"epochs": None}, "is not a run of"),
    ],
)
def test_a_run_of_something_else_is_refused(settings: dict[str, Any], message: str, run: Path, capsys: Any) -> None:
    file = run / "args.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | settings))
    assert message in error_line(tables.main, [str(run)], capsys)


def test_a_run_that_does_not_say_what_it_ran_on_is_refused(run: Path, capsys: Any) -> None:
    save_checkpoint(run)
    assert "doesn't say what it ran on" in error_line(tables.main, [str(run)], capsys)


def test_a_run_without_validation_or_settings_is_refused(run: Path, capsys: Any) -> None:
    (run / "summary.csv").write_text("epoch,train_loss,lr\n0,2.0,0.1\n1,1.0,0.1\n")
    assert "is not a run of resnet18_cifar10: 'eval_top1'" in error_line(tables.main, [str(run)], capsys)
    (run / "args.yaml").write_text("")
    assert "is not a run of resnet18_cifar10" in error_line(tables.main, [str(run)], capsys)


def test_models_stand_in_a_table_with_the_numbers_of_their_cards(tmp_path: Path) -> None:
    assert tables.models_table(tmp_path) == "None yet."
    folder = make_folder(train(tmp_path, "test_resnet_sugar"), tmp_path / "models" / "test_resnet_sugar.x")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"toys"', '"cifar10"'))
    size = (folder / "model.safetensors").stat().st_size / 1e6
    link = f"[`{folder.name}`](model_cards/{folder.name}/README.md)"
    row = f"| {link} | CIFAR-10, 32 px | 90.00 | not run | 1.00 | 50.00 | {size:.1f} |"
    assert tables.models_table(tmp_path / "models").splitlines()[2:] == [row]
    add_twin(
        folder,
        TrainedRun(train(tmp_path, "test_resnet", "--model-kwargs")),
        lambda: {**MEASURED, "top1": 12.3} | VERSIONS,
    )
    assert "| 90.00 | 12.30 | 1.00 |" in tables.models_table(tmp_path / "models")


def test_runs_that_chose_settings_stand_apart(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tables.README.read_text()
    trial = run.rename(run.parent / "trial")
    for _ in range(2):  # the same run again is the same row
        monkeypatch.setattr(tables, "SELECTION", trial / "selection.csv")
        assert tables.main(["--selection", "resnet18_cifar10", str(trial)]) == 0
        (row,) = tables.load_results(tables.SELECTION, "command").values()
    assert (row["recipe"], row["top1"]) == ("resnet18_cifar10", "61.23")
    assert row["command"].endswith("--data-dir HOLDOUT")
    assert tables.README.read_text() == before


def test_the_library_of_another_place_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    """Its models would stand in the tables, or none."""
    monkeypatch.setattr(timm_sugar, "__file__", str(tmp_path / "timm_sugar" / "__init__.py"))
    for script in (tables, load_script("release")):
        assert f"timm_sugar comes from {tmp_path}, not from" in error_line(script.main, [], capsys)
