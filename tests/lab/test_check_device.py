"""scripts/check_device.py on a machine without a GPU: it runs what it can, says so, and finds what is wrong."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lab.bench import device_checks
from scripting import error_line, load_script

check_device = load_script("check_device")
CPU = torch.device("cpu")


@pytest.mark.slow
def test_correctness_on_a_cpu_passes_and_the_report_says_what_was_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_device.main(["--device", "cpu", "--no-time"]) == 0
    report = capsys.readouterr().out
    verdict = report.strip().splitlines()[-1]
    assert verdict == (
        "**Verdict**: all checks that ran passed; on a CPU: nothing here was run on a GPU; "
        "not run: CUDA graphs, kernels of the backward pass."
    )
    assert "| gradients | passed | 9 surrogates x 4 types x 5 layouts |" in report


def test_a_check_that_fails_is_named_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(device: torch.device) -> str:
        raise AssertionError("off by\none")

    monkeypatch.setattr(check_device, "CHECKS", {"first": fail, "second": lambda device: "fine"})
    assert check_device.main(["--device", "cpu", "--no-time"]) == 1
    report = capsys.readouterr().out
    assert "| first | FAILED | AssertionError: off by one |\n| second | passed | fine |" in report
    assert "**Verdict**: FAILED: first; on a CPU" in report


@pytest.mark.parametrize("name", ["gradients", "AMP with GradScaler", "torch.compile, alpha changing"])
def test_checks_find_relus_own_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Module(torch.nn.ReLU):
        values = (1.67,)

    monkeypatch.setattr(device_checks, "sugar", lambda x, surrogate: F.relu(x))
    monkeypatch.setattr(device_checks, "SUGAR", Module)
    monkeypatch.setattr(device_checks, "set_surrogate", lambda model, alpha: None)
    with pytest.raises(AssertionError):
        device_checks.CHECKS[name](CPU)


def test_time_and_memory_of_activations_and_networks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_device, "CHECKS", {})
    monkeypatch.setattr(check_device, "NETWORKS", {True: ("test_resnet",)})
    file = tmp_path / "rows.csv"
    assert check_device.main(["--device", "cpu", "--quick", "--repeats", "1", "-b", "2", "--csv", str(file)]) == 0
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["subject"] for row in rows] == ["activation"] * 6 + ["test_resnet"] * 3
    assert [row["variant"] for row in rows] == ["relu", "gelu", "sugar"] * 3
    assert {row["to_relu"] for row in rows if row["variant"] == "relu"} == {"1.00"}
    assert {row["bytes_to_relu"] for row in rows if row["subject"] == "activation"} == {"1.00"}
    assert capsys.readouterr().out.count("| sugar |") == 3


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert "has none" in error_line(check_device.main, ["--device", "cuda"], capsys)
