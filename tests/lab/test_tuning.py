"""Tables that choose a learning rate for each variant: which runs, in which order, and what happens at the edges."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lab.cli import UserError
from lab.experiments.rows import read_results
from lab.experiments.run import TableRun
from lab.experiments.table import Key, Table, Tune, load_table
from lab.experiments.tuned import body
from lab.experiments.tuning import tuning_of
from lab.files import read_rows
from scripting import error_line, make_images
from tables import TINY, places, record_of, reproduce

TUNED = (
    TINY + "tune: {lr: [0.1, 0.2, 0.4], seeds: [50], held_out: 2, options: {epochs: 2}}\nprimary: sugar-bsilu - relu\n"
)
VARIANTS = ("relu", "sugar-bsilu", "sugar-nelu")


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    path = tmp_path / "tuned.yaml"
    path.write_text(TUNED)
    return path


@pytest.fixture
def start(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Run the table with these top-1 by phase, variant and rate in the place of training; returns the names of runs."""
    data = make_images(tmp_path / "data")

    def do(score: Callable[[Key], float | None], *options: str, output: str = "o") -> list[str]:
        ran: list[str] = []

        def train(self: TableRun, given: list[str]) -> None:
            ran.append(self.name)
            record_of(self, score(self.key))

        monkeypatch.setattr(TableRun, "train", train)
        assert reproduce.main([str(tuned), *places(tmp_path, data, output), *options]) == 0
        return ran

    return do


def peak(**rates: float) -> Callable[[Key], float]:
    """Top-1 that is highest at these rates; other variants have theirs at 0.2."""

    def score(key: Key) -> float:
        return 90 - abs(float(key.lr) - rates.get(key.variant.replace("-", "_"), 0.2))

    return score


def test_every_variant_runs_at_every_rate_then_with_new_seeds_at_its_best(start: Any, tmp_path: Path) -> None:
    ran = start(peak(sugar_nelu=0.15))
    assert ran[:9] == [f"tune-{name}-lr-{lr}-50" for lr in ("0.1", "0.2", "0.4") for name in VARIANTS]
    best = {"relu": "0.2", "sugar-bsilu": "0.2", "sugar-nelu": "0.1"}
    assert ran[9:12] == [f"tune-{name}-lr-0.05-50" for name in VARIANTS], "0.1 and 0.2 are as good: the lower, an edge"
    assert ran[12:] == [f"{name}-lr-{best[name]}-{seed}" for seed in (0, 1) for name in VARIANTS]
    rows = read_rows(tmp_path / "r" / "tuned.csv")
    assert [(row["phase"], row["epochs"]) for row in rows] == [("tune", "2")] * 12 + [("final", "3")] * 6
    assert {(row["phase"], row["subset"], row["split"]) for row in rows} == {
        ("tune", "all", "held_out-2"), ("final", "all", "validation"),
    }  # fmt: skip
    assert len(list((tmp_path / "o" / "subset-held_out-2" / "train").rglob("*.png"))) == 3 * (8 - 2)


def test_a_best_rate_at_the_edge_widens_the_grid_for_all_twice_at_most(start: Any, tuned: Path, tmp_path: Path) -> None:
    ran = start(peak(sugar_bsilu=9.0))
    assert [name for name in ran if name.startswith("tune-relu")] == [
        f"tune-relu-lr-{lr}-50" for lr in ("0.1", "0.2", "0.4", "0.8", "1.6")
    ]
    assert len([name for name in ran if name.startswith("tune")]) == 15
    table = load_table(str(tuned))
    tuning = tuning_of(table, read_results(table, tmp_path / "r"))
    assert tuning
    assert (tuning.widened, tuning.edge, tuning.best["sugar-bsilu"]) == (2, ["sugar-bsilu"], "1.6")
    assert "widened twice" in (text := reproduce.compare(table, read_rows(tmp_path / "r" / "tuned.csv")))
    assert "At its edge even after 2 widenings: `sugar-bsilu`" in text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"row": {}}', '{"row": {"seed": "x"}, "epochs": []}'])
def test_a_damaged_record_is_one_line(text: str, start: Any, tmp_path: Path, capsys: Any) -> None:
    start(peak())
    record = tmp_path / "o" / "tuned" / "tune-relu-lr-0.1-50.json"
    record.write_text(text)
    (tmp_path / "r" / "tuned.csv").unlink()
    with pytest.raises(SystemExit):
        start(peak())
    assert f"{record} is damaged: remove it" in capsys.readouterr().err


def test_the_record_of_another_run_is_not_taken(start: Any, tmp_path: Path, capsys: Any) -> None:
    """Its row would not be this run's, which would be to do for ever."""
    start(peak())
    folder = tmp_path / "o" / "tuned"
    (folder / "relu-lr-0.2-0.json").write_text((folder / "relu-lr-0.2-1.json").read_text())
    (tmp_path / "r" / "tuned.csv").unlink()
    with pytest.raises(SystemExit):
        start(peak())
    assert "was made with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("relu,0.1,50", "relu,0.1,x"),
        (",variant,", ",kind,"),
        ("relu,0.1,50", "relu,0.1,50.0"),
        ("relu,0.1,50", "relu,0.1,"),
        ("relu,0.1,50", "relu,0.10,50"),
        ("tune,relu", "x,relu"),
        ("90.0000", "hello"),
        ("phase,", "face,"),
    ],
)
def test_damaged_results_are_one_line(old: str, new: str, start: Any, tmp_path: Path, capsys: Any) -> None:
    start(peak())
    path = tmp_path / "r" / "tuned.csv"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(SystemExit):
        start(peak())
    assert f"{path} is damaged; mend or remove it" in capsys.readouterr().err


def test_a_subset_of_other_images_is_not_taken(
    start: Any, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    seen = []
    monkeypatch.setattr(reproduce, "make_subset", lambda open_split, root, **chosen: root.mkdir())
    table = load_table(str(tuned))
    for data in (tmp_path / "data", tmp_path / "data", tmp_path / "nope"):
        args = reproduce.build_parser().parse_args(["x", *places(tmp_path, data)])
        (tmp_path / "o").mkdir(exist_ok=True)
        try:
            seen.append(reproduce.data_options(table, Key("tune", "relu", "0.1", 50), args)[1])
        except UserError as error:
            seen.append(str(error))
    assert seen[0] == seen[1] == str(tmp_path / "o" / "subset-held_out-2")
    assert "choose another --output, or remove it" in seen[2]


def test_a_mark_before_the_first_column_changes_nothing(start: Any, tmp_path: Path) -> None:
    """A spreadsheet writes it."""
    start(peak())
    file = tmp_path / "r" / "tuned.csv"
    before = read_rows(file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_rows(file) == before
    assert start(peak()) == []


def test_a_run_that_diverges_is_a_row_and_the_others_go_on(start: Any, tmp_path: Path) -> None:
    """B-SiLU fails at the two higher rates and, once, with its best; NeLU at every one and so has no final run."""

    def score(key: Key) -> float | None:
        failed = key.variant == "sugar-nelu" or (key.variant == "sugar-bsilu" and float(key.lr) > 0.1)
        return None if failed or (key.variant, key.seed) == ("sugar-bsilu", 1) else 70.0

    ran = start(score)
    assert {name.split("-lr-")[1] for name in ran if name.startswith("tune")} == {
        f"{lr}-50" for lr in ("0.025", "0.05", "0.1", "0.2", "0.4")
    }
    rows = read_rows(tmp_path / "r" / "tuned.csv")
    status = {(row["variant"], row["seed"]): row["status"] for row in rows if row["phase"] == "final"}
    assert status == {
        ("relu", "0"): "done", ("relu", "1"): "done", ("sugar-bsilu", "0"): "done", ("sugar-bsilu", "1"): "failed",
    }  # fmt: skip
    assert {row["top1"] for row in rows if row["status"] == "failed"} == {""}
    text = reproduce.compare(load_table(str(tmp_path / "tuned.yaml")), rows)
    assert "Left out of the means: `sugar-bsilu` (0 collapsed, 1 failed of 2)." in text
    assert "A run was lost at every rate: `sugar-nelu`" in text


@pytest.mark.slow
def test_a_fresh_clone_runs_nothing_that_results_has_unless_it_must(start: Any, tmp_path: Path) -> None:
    """`--rerun` does, and another output is what a fresh clone has."""
    first = start(peak())
    assert start(peak(), output="clone") == []
    (tmp_path / "r" / "tuned.csv").write_text(
        "".join((tmp_path / "r" / "tuned.csv").read_text().splitlines(keepends=True)[:-1])
    )
    assert start(peak(), output="clone") == ["sugar-nelu-lr-0.2-1"]
    assert start(peak(), "--rerun", output="another") == first
    assert start(peak(), "--rerun", output="another") == []  # continued, not begun again


def test_final_runs_wait_until_all_variants_are_tuned(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert all(name.startswith("tune-relu") for name in start(peak(), "--only", "relu"))
    assert "wait for the tuning of all variants" in capsys.readouterr().out
    assert not any(name.startswith("tune-relu") for name in start(peak()))


def test_nothing_is_said_before_all_final_runs_are_in(start: Any, tuned: Path, tmp_path: Path) -> None:
    start(peak())
    table, rows = load_table(str(tuned)), read_rows(tmp_path / "r" / "tuned.csv")
    assert "p after Holm" in body(table, rows)
    assert "Not finished" not in body(table, rows)
    partial = body(table, rows[:-1])
    assert "- Not finished: 1 of 6 final runs are to do, and nothing is said before." in partial
    assert "p after Holm" not in partial
    assert "paired seeds" not in partial


def table_of(**changes: Any) -> Table:
    base = Table("t", "T", "relu", {"relu": {"plain": "relu"}, "gelu": {"plain": "gelu"}}, network="n", seeds=3)
    return replace(base, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": Tune([0.1, 0.2], [2], 1)}, "seed 2 is used for tuning"),
        ({"tune": Tune([0.1, 0.2], [9], 1), "variants": {"relu": {"options": {"epochs": 3}}}}, "its own epochs"),
        ({"primary": "relu"}, "'one - other'"),
        ({"primary": "relu - elu"}, "not one of two of its variants"),
        ({"margin": -1.0}, "above 0"),
    ],
)
def test_a_table_that_would_not_be_fair_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table_of(**changes)


def test_a_grid_is_ascending_and_has_two_rates() -> None:
    for grid in ([0.1], [0.2, 0.1], [0.0, 0.1], [0.1, 0.1]):
        with pytest.raises(ValueError, match="grid"):
            Tune(grid, [9], 1)


def test_more_seeds_than_the_table_says_may_not_reach_those_of_tuning(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(tuned), "--seeds", "51", "--output", str(tmp_path), "--results", str(tmp_path)]
    assert "seed 50 is used for tuning" in error_line(reproduce.main, options, capsys)


def test_budget_and_grid_are_the_same_for_all_and_the_subset_is_the_seeds() -> None:
    table = table_of(tune=Tune([0.1, 0.2], [9], 4), subset={"per_class": 5, "per_seed": True}, options={"epochs": 7})
    tune, final = Key("tune", "gelu", "0.2", 9), Key("final", "gelu", "0.2", 1)
    assert table.images(tune) == {"per_class": 5, "held_out": 4, "seed": 9}
    assert table.images(final) == {"per_class": 5, "seed": 1}
    assert table.settings(final)["lr"] == table.settings(tune)["lr"] == 0.2
    assert "--lr=0.2" in table.command(final)


def test_the_run_that_a_pending_row_starts_from_is_made_first_though_results_has_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a fresh clone: results/ has the rows of the first table, OUTPUT has no checkpoint, or half of one."""
    ran: list[str] = []

    def train(self: TableRun, given: list[str]) -> None:
        ran.append(f"{self.table.name}/{self.name}")
        record_of(self)
        (self.folder / "last.pth.tar").touch()

    monkeypatch.setattr(TableRun, "train", train)
    start = "{initial_checkpoint: '" + str(tmp_path / "o") + "/first/relu-{seed}/last.pth.tar'}"
    (tmp_path / "first.yaml").write_text(TINY)
    (tmp_path / "next.yaml").write_text(f"base: first\ntitle: Next\noptions: {start}\n")
    first, following = ([str(tmp_path / name), *places(tmp_path, tmp_path)] for name in ("first.yaml", "next.yaml"))
    assert reproduce.main(first) == 0
    shutil.rmtree(tmp_path / "o")
    ran.clear()
    assert reproduce.main([*following, "--only", "sugar-nelu", "--seeds", "1"]) == 0
    assert ran == ["first/relu-0", "next/sugar-nelu-0"]
    (tmp_path / "o" / "first" / "relu-0.json").unlink()  # as if killed while it trained: its checkpoint is not the last
    assert reproduce.main([*following, "--only", "sugar-bsilu", "--seeds", "1"]) == 0
    assert ran[2:] == ["first/relu-0", "next/sugar-bsilu-0"]
    record = tmp_path / "o" / "first" / "relu-0.json"
    done = record.read_text()
    record.write_text(done.replace('"done"', '"failed"'))
    line = error_line(reproduce.main, [*following, "--only", "relu"], capsys)
    assert f"relu-0 starts from {tmp_path}/o/first/relu-0, which diverged" in line
    record.write_text(done)
    assert reproduce.main([*following, "--only", "relu"]) == 0
    assert ran[4:] == ["next/relu-0", "first/relu-1", "next/relu-1"]
    ran.clear()
    assert reproduce.main(first) == 0
    assert ran == []
