"""The README: its Python runs, its commands exist, table and pictures are those of the code, its layout is whole."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from lab.training import options
from scripting import load_script

import timm_sugar
from timm_sugar import surrogate

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MATCHES = list(re.finditer(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL))
BLOCKS = [(README[: match.start()].splitlines()[-1], match[1], match[2]) for match in MATCHES]
PYTHON = [code for before, language, code in BLOCKS if language == "python" and "<!-- no-run: " not in before]
SKIPPED = [code for before, language, code in BLOCKS if language == "python" and "<!-- no-run: " in before]
COMMANDS = [
    line.partition("  #")[0]
    for _, language, code in BLOCKS
    if language == "bash"
    for line in code.replace("\\\n", " ").splitlines()
]
CURVES = {"relu", "bsilu", "elu", "gelu", "leaky_relu", "mish", "nelu", "selu", "silu"}


def test_readme_has_the_blocks_that_the_tests_below_are_about() -> None:
    assert len(PYTHON) >= 5
    assert len(COMMANDS) >= 8
    assert len(SKIPPED) == README.count("<!-- no-run")


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_block_runs_and_prints_what_it_says(
    code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(surrogate, "_surrogates", dict(surrogate._surrogates))  # an example registers one
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= code.count("print(")
    said = re.findall(r"^ *print\(.+\)  # (\w+)$", code, flags=re.MULTILINE)
    assert set(said) <= {line.partition("(")[0] for line in printed}


@pytest.mark.parametrize("code", SKIPPED, ids=range(len(SKIPPED)))
def test_python_block_that_needs_the_network_names_models_that_exist(code: str) -> None:
    import timm

    compile(code, "README.md", "exec")
    names = re.findall(r'create_model\("([^"]+)"', code)
    assert names
    pretrained = timm.list_models(pretrained=True)
    assert all(any(known == name or known.startswith(name + ".") for known in pretrained) for name in names)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_one_that_its_script_takes(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "torchrun":
        words[:2] = ["python"]
    if words[0] == "python" and words[1].startswith("scripts/"):
        script = load_script(Path(words[1]).stem)
        parsed = getattr(script, "build_parser", options.build_parser)().parse_args(words[2:])
        config = getattr(parsed, "config", None)
        assert config is None or (ROOT / config).is_file()
    elif words[0] == "python":
        # timm's scripts are not here; what is left to check is that our part of the line is right.
        assert "timm_sugar" in words
        assert words[1] == "-m" or words[words.index("--device-modules") + 1] == "timm_sugar"
    else:
        assert words[:2] == ["pip", "install"]


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"`make ([a-z]+)", README + (ROOT / "CONTRIBUTING.md").read_text())
    assert {"quickstart", "test"} <= set(named) <= set(targets)


def test_surrogate_table_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]*)\| ([^|]+) \|", README, flags=re.MULTILINE)
    assert sorted(name for name, *_ in rows) == timm_sugar.list_surrogates()
    for name, _, parameters, slope in rows:
        known = surrogate.get_surrogate(name).parameters
        assert parameters.strip() == ", ".join(f"{key}={value:g}" for key, value in known.items()), name
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        timm_sugar.sugar(x, name).sum().backward()
        assert x.grad is not None
        assert float(slope) == pytest.approx(x.grad.item(), abs=5e-5), name


def test_every_recipe_is_listed_and_there() -> None:
    listed = re.findall(r"^\| `(\w+\.yaml)`", README, flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "scripts" / "recipes").glob("*.yaml"))


def test_layout_names_every_source_file_and_folder_and_nothing_else() -> None:
    layout = README.partition("## Layout")[2].partition("\n## ")[0]
    first_cells = re.findall(r"^\|(.*?)\|", layout, flags=re.MULTILINE)
    named = set(re.findall("`(.+?)`", " ".join(first_cells)))
    files = [
        *(ROOT / "timm_sugar").rglob("*.py"),
        *(ROOT / "scripts").glob("*.py"),
        *(ROOT / "scripts/lab").glob("*.py"),
    ]
    files += [path.parent for path in (ROOT / "scripts" / "lab").glob("*/__init__.py")]
    there = {str(path.relative_to(ROOT)) + "/" * path.is_dir() for path in files if path.name != "__init__.py"}
    assert there - named == set()
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_links_and_pictures_exist() -> None:
    local = re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r'(?:src|srcset)="([^"]+)"', README)
    assert len(local) >= 4
    assert [name for name in local if not (ROOT / name).is_file()] == []


def curves(path: Path) -> dict[str, torch.Tensor]:
    """Coordinates of the named curves of a picture."""
    found = re.findall(r'<g id="(\w+)">\s*<path d="([^"]+)" clip-path', path.read_text())
    return {
        name: torch.tensor([float(number) for number in re.findall(r"-?[\d.]+", d)])
        for name, d in found
        if name in CURVES
    }


def test_pictures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    load_script("figures").main(["--output", str(tmp_path)])
    for committed in sorted((ROOT / "figures").glob("surrogates-*.svg")):
        old, new = curves(committed), curves(tmp_path / committed.name)
        assert old.keys() == new.keys() == CURVES
        for name in old:
            torch.testing.assert_close(old[name], new[name], atol=0.01, rtol=0)


def test_hooks_and_workflow_call_what_exists() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    commands = [shlex.split(line) for line in [*steps, *(hook["entry"] for hook in hooks)]]
    assert ["make", "test"] in commands
    assert [".ci/run"] in commands
    stages = re.search(r"^stages=\((.*)\)", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert stages
    for program, *arguments in commands:
        if program == ".ci/run":
            assert set(arguments) <= set(stages[1].split())
        else:
            assert (program, arguments[0]) == ("make", "test")
            assert all((ROOT / name).is_file() for name in re.findall(r"tests/\S+", " ".join(arguments)))


def test_ci_run_refuses_an_unknown_stage_before_it_installs_anything() -> None:
    result = subprocess.run([ROOT / ".ci" / "run", "lint", "nonsense"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("run: error: no stage 'nonsense'")
    assert result.stdout == ""
