"""Faults that were reported of other projects: none of them is here, and results/ names all that were replayed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from lab.files import read_rows
from scripting import SCRIPTS, load_script

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")  # torch's own forward mode scripts
replay = load_script("replay")


@pytest.mark.parametrize("source", [case.source for case in replay.CASES])
def test_reported_fault_is_not_here(source: str) -> None:
    assert re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", source)
    next(case for case in replay.CASES if case.source == source).check()


def test_results_name_every_case_and_none_is_wrong() -> None:
    rows = read_rows(SCRIPTS.parent / "results" / "replay.csv")
    assert [(row["source"], row["case"]) for row in rows] == [(case.source, case.what) for case in replay.CASES]
    assert {row["outcome"] for row in rows} == {"right"}


def test_a_case_that_goes_wrong_is_said_and_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = replay.Case("a/b#1", "the gradient of ReLU", lambda: replay.same(replay.points(), replay.points() + 1))
    monkeypatch.setattr(replay, "CASES", [*replay.CASES[:1], wrong])
    assert replay.main(["--results", str(tmp_path / "replay.csv")]) == 1
    assert "2 cases, 1 wrong" in capsys.readouterr().out
    assert [row["outcome"][:5] for row in read_rows(tmp_path / "replay.csv")] == ["right", "wrong"]
    assert replay.main(["no_grad", "--results", str(tmp_path / "none.csv")]) == 0
    assert not (tmp_path / "none.csv").exists()
