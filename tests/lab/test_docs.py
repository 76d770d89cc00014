"""README and docs/: Python blocks run, commands exist, tables are those of the code, the layout is whole."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from pathlib import Path
from unittest import SkipTest

import pytest
import torch
import yaml
from lab.training import options
from scripting import load_script
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

import timm_sugar
from timm_sugar import surrogate

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page: page.read_text() for page in [*PAGES, ROOT / "CONTRIBUTING.md"]}
NAMES = {"argvalues": PAGES, "ids": lambda page: page.stem}
THEMES = ("light", "dark")
CURVES = {"relu", "bsilu", "elu", "gelu", "leaky_relu", "mish", "nelu", "selu", "silu"}

python = Sybil([PythonCodeBlockParser(), SkipParser()])


def run_added_lines(example: Example) -> None:
    """Run what a diff adds or leaves."""
    lines = [line[1:] for line in example.parsed.splitlines() if line[:1] in "+ "]
    exec("\n".join(lines), example.namespace)


def blocks(language: str) -> list[str]:
    """The code blocks of a language on all pages."""
    parser = Sybil([CodeBlockParser(language, evaluator=lambda example: None)])
    return [str(example.parsed) for page in TEXT for example in parser.parse(page).examples()]


COMMANDS = [
    line.partition("  #")[0].strip()
    for code in blocks("bash")
    for line in code.replace("\\\n", " ").splitlines()
    if not line.startswith("#")
]


@pytest.mark.parametrize("page", **NAMES)
def test_python_blocks_of_a_page_run_in_their_order_and_print_what_they_say(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(surrogate, "_surrogates", dict(surrogate._surrogates))  # an example registers one
    skipped = 0
    for example in python.parse(page).examples():
        try:
            example.evaluate()
        except SkipTest:
            skipped += 1
            continue
        printed = capsys.readouterr().out.splitlines()
        for text in re.findall(r"^ *print\(.+\)  # (\S.*)$", str(example.parsed), flags=re.MULTILINE):
            assert any(text in (line, line.partition("(")[0]) for line in printed), text
    assert skipped == TEXT[page].count("<!-- skip: next ")


def test_pages_have_the_blocks_that_the_tests_here_are_about() -> None:
    assert len(blocks("python")) >= 30
    assert len(COMMANDS) >= 30
    assert len(blocks("diff")) == 2


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "quickstart.md"], ids=lambda page: page.stem)
def test_the_script_after_the_change_trains_a_sugar_model(page: Path) -> None:
    (example,) = Sybil([CodeBlockParser("diff", evaluator=run_added_lines)]).parse(page).examples()
    example.evaluate()
    model = example.namespace["model"]
    assert set(timm_sugar.list_activations(model).values()) == {"SUGAR"}
    before = [line[1:] for line in str(example.parsed).splitlines() if line[:1] in "- "]
    assert "timm_sugar" not in "\n".join(before)
    compile("\n".join(before), str(page), "exec")


def test_names_in_blocks_that_download_exist() -> None:
    import timm

    skipped = r'<!-- skip: next "[^"]+" -->\n```python\n(.*?)^```$'
    found = [code for page in PAGES for code in re.findall(skipped, TEXT[page], flags=re.MULTILINE | re.DOTALL)]
    assert len(found) == sum(TEXT[page].count("<!-- skip: ") for page in PAGES)
    for code in found:
        compile(code, "page", "exec")
    names = re.findall(r'create_model\("([^"]+)", pretrained=True', "\n".join(found))
    pretrained = timm.list_models(pretrained=True)
    assert len(names) >= 4
    assert all(any(known == name or known.startswith(name + ".") for known in pretrained) for name in names)


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_command_is_one_that_its_script_takes(command: str) -> None:
    words = [word.removeprefix(".venv/bin/") for word in shlex.split(command)]
    words = words[1:] if words[0] == "PYTHONPATH=." else words
    if words[0] == "torchrun":
        words[:2] = ["python"]
    if words[0] == "python" and words[1].startswith("scripts/"):
        if words[1] == "scripts/sweep.py":  # has no parser to be asked
            return
        script = load_script(Path(words[1]).stem)
        parsed = getattr(script, "build_parser", options.build_parser)().parse_args(words[2:])
        config = getattr(parsed, "config", None)
        assert config is None or (ROOT / config).is_file()
    elif words[0] == "python":
        # timm's scripts are not here; what is left to check is that our part of the line is right.
        assert "timm_sugar" in words
        assert words[1] == "-m" or words[words.index("--device-modules") + 1] == "timm_sugar"
    elif words[0] == "make":
        assert words[1] in TARGETS
    else:
        assert words[:2] in (["pip", "install"], ["git", "clone"]) or words[0] in (".ci/run", "ruff", "rm", "cp")


TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_make_targets_exist() -> None:
    named = re.findall(r"`make ([a-z-]+)", "\n".join(TEXT.values()))
    assert {"quickstart", "docs"} <= set(named) <= set(TARGETS)


def test_readme_is_short() -> None:
    lines = TEXT[README].splitlines()
    assert len(lines) <= 200
    prose = re.sub(r"```.*?```|<!-- (\w+) -->.*?<!-- /\1 -->", "", TEXT[README], flags=re.DOTALL)
    for paragraph in prose.split("\n\n"):
        if not paragraph.lstrip().startswith(("|", "<picture>")):
            assert len(paragraph.strip().splitlines()) <= 4, paragraph


def test_every_page_is_in_a_table_of_contents_and_the_readme_leads_to_it() -> None:
    index = "\n".join(re.findall(r"```\{toctree\}(.*?)```", TEXT[ROOT / "docs" / "index.md"], flags=re.DOTALL))
    listed = re.findall(r"^(\w+)$", index, flags=re.MULTILINE)
    assert sorted([*listed, "index"]) == [page.stem for page in PAGES[1:]]
    linked = re.findall(r"\]\(docs/(\w+)\.md", TEXT[README])
    assert set(listed) - set(linked) == {"contribute", "changelog"}  # which include files that it leads to


def test_surrogate_table_is_that_of_the_code() -> None:
    text = TEXT[ROOT / "docs" / "surrogates.md"]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]*)\| ([^|]+) \|", text, flags=re.MULTILINE)
    assert sorted(name for name, *_ in rows) == timm_sugar.list_surrogates()
    for name, _, parameters, slope in rows:
        known = surrogate.get_surrogate(name).parameters
        assert parameters.strip() == ", ".join(f"{key}={value:g}" for key, value in known.items()), name
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        timm_sugar.sugar(x, name).sum().backward()
        assert x.grad is not None
        assert float(slope) == pytest.approx(x.grad.item(), abs=5e-5), name


def test_every_recipe_is_listed_and_there() -> None:
    listed = re.findall(r"^\| `(\w+\.yaml)`", TEXT[ROOT / "docs" / "training.md"], flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "scripts" / "recipes").glob("*.yaml"))


def test_layout_names_every_source_file_and_folder_and_nothing_else() -> None:
    layout = TEXT[ROOT / "CONTRIBUTING.md"].partition("## Layout")[2].partition("\n## ")[0]
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


@pytest.mark.parametrize("page", TEXT, ids=lambda page: page.stem)
def test_links_and_pictures_exist(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", TEXT[page], flags=re.DOTALL)
    local = re.findall(r"\]\((?!http)([^)#]+?)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert [name for name in local if not (page.parent / name.partition("#")[0]).is_file()] == []


def curves(path: Path) -> dict[str, torch.Tensor]:
    """Coordinates of the named curves of a picture."""
    found = re.findall(r'<g id="(\w+)">\s*<path d="([^"]+)" clip-path', path.read_text())
    return {
        name: torch.tensor([float(number) for number in re.findall(r"-?[\d.]+", d)])
        for name, d in found
        if name in timm_sugar.list_surrogates()
    }


def test_pictures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    assert load_script("figures").main(["--output", str(tmp_path)]) == 0
    shown = {"surrogates": CURVES} | {f"surrogate-{name}": {name} for name in timm_sugar.list_surrogates()}
    for (picture, names), theme in itertools.product(shown.items(), THEMES):
        file = f"{picture}-{theme}.svg"
        old, new = curves(ROOT / "figures" / file), curves(tmp_path / file)
        assert old.keys() == new.keys() == names
        for name in old:
            torch.testing.assert_close(old[name], new[name], atol=0.01, rtol=0)


def test_every_surrogate_has_its_picture_with_a_text_and_when_to_take_it() -> None:
    text = TEXT[ROOT / "docs" / "surrogates.md"]
    pictures = r"".join(
        rf"!\[(Derivative of [^\]]+)\]\(../figures/surrogate-(\w+)-{it}.svg\)\{{.only-{it}\}}" for it in THEMES
    )
    rows = re.findall(rf"^\| {pictures} \| \*\*[\w-]+\*\* `(\w+)` \| (\S.+) \|$", text, flags=re.MULTILINE)
    assert sorted(row[-2] for row in rows) == timm_sugar.list_surrogates()
    for light, name, dark, same, shown, _ in rows:
        assert (light, name, name) == (dark, same, shown)


def test_hooks_and_workflows_call_what_exists() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    workflows = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    assert set(workflows) == {"ci", "docs", "release"}
    jobs = [job for workflow in workflows.values() for job in workflow["jobs"].values()]
    scripts = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    lines = [line for script in scripts for line in script.strip().splitlines()]
    commands = [shlex.split(line) for line in [*lines, *(hook["entry"] for hook in hooks)]]
    assert [".ci/run"] in commands
    stages = re.search(r"^stages=\((.*)\)", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert stages
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for program, *arguments in commands:
        if program == ".ci/run":
            assert set(arguments) <= set(stages[1].split())
        elif program == "make":
            assert arguments[0] in targets
            assert all((ROOT / name).is_file() for name in re.findall(r"tests/\S+", " ".join(arguments)))
        elif program == "python":
            assert arguments[:2] in (["-m", name] for name in ("pip", "pytest", "build", "twine"))
        else:
            assert program in ("mkdir", "cp", "cd", "test")


def test_the_workflow_runs_the_tests_of_the_library_on_each_system() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    matrix = workflow["jobs"]["tests"]["strategy"]["matrix"]
    systems = {*matrix["os"], *(extra["os"] for extra in matrix["include"])}
    assert systems == {"ubuntu-latest", "macos-latest", "windows-latest"}
    assert all((ROOT / name).is_dir() for name in [*matrix["tests"], *(extra["tests"] for extra in matrix["include"])])


def test_ci_run_refuses_an_unknown_stage_before_it_installs_anything() -> None:
    result = subprocess.run([ROOT / ".ci" / "run", "lint", "nonsense"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("run: error: no stage 'nonsense'")
    assert result.stdout == ""
