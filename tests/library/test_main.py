"""`python -m timm_sugar SCRIPT ARGS...` runs a script as Python would, with the models registered."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from timm_sugar.__main__ import main

SCRIPT = """
import json, sys, timm, neighbour
from timm.models import is_model
if __name__ == "__main__":
    print(json.dumps([sys.argv, timm.__file__, is_model("resnet18_sugar"), neighbour.__file__]))
    sys.exit(7)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script as in timm's repository: beside it lie a module of its own and a `timm` that isn't the installed one."""
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("raise ImportError('the checkout, not the installed timm')")
    (tmp_path / "neighbour.py").write_text("")
    (tmp_path / "validate.py").write_text(SCRIPT)
    return tmp_path / "validate.py"


def check(output: str, script: Path, arguments: list[str]) -> None:
    argv, timm_file, registered, neighbour = json.loads(output)
    assert argv == [str(script), *arguments]
    assert timm_file == timm.__file__
    assert registered
    assert neighbour == str(script.parent / "neighbour.py")


def test_script_sees_its_arguments_the_models_and_the_installed_timm(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "resnet18_sugar", "-b", "8", "--help"]
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with pytest.raises(SystemExit) as exit_info:
        main([str(script), *arguments])
    assert exit_info.value.code == 7
    check(capsys.readouterr().out, script, arguments)


def test_as_a_command(script: Path) -> None:
    command = [sys.executable, "-m", "timm_sugar", str(script), "--device-modules", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=script.parent.parent, timeout=120)
    assert done.returncode == 7, done.stderr
    check(done.stdout, script, ["--device-modules", "x"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["nowhere.py", "--model", "resnet18_sugar"], "no such script: nowhere.py"), ([], "required: SCRIPT")],
)
def test_missing_script(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "validate.py" in text
    assert "--device-modules timm_sugar" in text.replace("\n", " ")
