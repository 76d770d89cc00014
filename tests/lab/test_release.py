"""`scripts/release.py` as a maintainer runs it: in a small checkout, against a double of the Hub, stop after stop."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from lab.cli import UserError
from lab.release.hub import verify
from loopback_hub import WRITE, LoopbackHub, Repo
from staging import make_folder, train

from timm_sugar.models._weights import describe
from timm_sugar.version import __version__

ROOT = Path(__file__).parents[2]
NAME = "test_resnet_sugar.bsilu_x"
REPO = f"timm-sugar/{NAME}"


def make_checkout(root: Path) -> Path:
    """A git repository of the library, the laboratory and one tiny model that is not published yet."""
    checkout = root / "checkout"
    for name in ("timm_sugar", "scripts", "docs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "MANIFEST.in", "CITATION.cff", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout)
    (checkout / ".gitignore").write_text("dist/\n__pycache__/\n")
    folder = make_folder(train(root, "test_resnet_sugar"), checkout / "model_cards" / NAME)
    tag = describe(json.loads((folder / "config.json").read_text()), folder / "model.safetensors")
    (checkout / "timm_sugar" / "models" / "weights.json").write_text(json.dumps({NAME: tag}))
    # As now, whatever it is later: no release, no address, nothing published.
    edit(checkout / "timm_sugar" / "version.py", r'"\d.*"', '"9.8.7.dev0"')
    edit(
        checkout / "timm_sugar" / "models" / "_weights.py",
        r"\nPUBLISHED: .*",
        "\nPUBLISHED: frozenset[str] = frozenset()",
    )
    edit(checkout / "pyproject.toml", r"\n(# )?Repository = .*", '\n# Repository = "https://github.com/OWNER/NAME"')
    (checkout / "README.md").write_text("# timm_sugar\n\nNothing is on the\nHub yet.\n")
    for page in (checkout / "docs").glob("*.md"):
        page.write_text("# A page\n")
    git(checkout, "init", "--quiet")
    return checkout


def edit(file: Path, pattern: str, new: str) -> None:
    """Replace what a pattern finds once."""
    text, count = re.subn(pattern, new.replace("\\", r"\\"), file.read_text())
    assert count == 1
    file.write_text(text)


def git(checkout: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", *who, *arguments], cwd=checkout, check=True, capture_output=True)


def commit(checkout: Path) -> None:
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message", "A release")


@pytest.mark.slow
def test_release_stops_at_each_thing_that_is_not_so_and_ends_with_a_wheel(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path)
    package = checkout / "timm_sugar"

    with LoopbackHub() as hub:
        environment = hub.environment(tmp_path / "home", WRITE) | {"PYTHONPATH": str(checkout)}

        def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, str(checkout / "scripts" / script), *arguments]
            return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)

        def push() -> None:
            done = run("publish.py", "push")
            assert done.returncode == 0, done.stderr

        def commit_twice() -> None:
            commit(checkout)
            git(checkout, "tag", "v9.8.7")
            git(checkout, "commit", "--quiet", "--allow-empty", "--message", "One more")

        log = (checkout / "CHANGELOG.md").read_text()
        (checkout / "CHANGELOG.md").write_bytes(b"\xff")
        stops: list[tuple[str, Callable[[], object]]] = [
            ("9.8.7.dev0 is no release", lambda: edit(package / "version.py", "9.8.7.dev0", "9.8.7")),
            ("can't read CHANGELOG.md", lambda: (checkout / "CHANGELOG.md").write_text(log)),
            (
                "CHANGELOG.md has no 9.8.7",
                lambda: edit(checkout / "CHANGELOG.md", "This becomes .*", "## [9.8.7] - 2027-01-01"),
            ),
            (
                "the repository has no address",
                lambda: edit(
                    checkout / "pyproject.toml", "# Repository = .*", 'Repository = "https://example.org/me/it"'
                ),
            ),
            (f"{REPO} is not on the Hub as it is here", push),
            ("SHA-256", hub.other_content.clear),
            (
                f"add to PUBLISHED in timm_sugar/models/_weights.py: {NAME}",
                lambda: edit(package / "models" / "_weights.py", r"= frozenset\(\)", f"= frozenset({[NAME]!r})"),
            ),
            ("README.md says 'Hub yet'", lambda: (checkout / "README.md").write_text("# timm_sugar\n\nIt is out.\n")),
            ("is not committed", lambda: (commit(checkout), (package / "forgotten.py").write_text(""))),
            ("timm_sugar/forgotten.py is not committed", commit_twice),
            ("git has v9.8.7 on another commit", lambda: git(checkout, "tag", "--delete", "v9.8.7")),
        ]
        git(checkout, "config", "status.showUntrackedFiles", "no")
        content = (checkout / "model_cards" / NAME / "model.safetensors").read_bytes()
        hub.other_content["model.safetensors"] = bytes(len(content))
        for message, mend in stops:
            done = run("release.py")
            (line,) = [text for text in done.stderr.splitlines() if "error" in text]
            assert message in line
            assert done.returncode == 2
            assert not (checkout / "dist").exists()
            mend()
        (checkout / "build" / "lib" / "timm_sugar").mkdir(parents=True)  # left by another build, and ignored
        (checkout / "build" / "lib" / "timm_sugar" / "stale.py").write_text("")
        (checkout / ".git" / "info" / "exclude").write_text("build/\n")
        done = run("release.py")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "Ready. Publish it: git tag v9.8.7 && git push origin v9.8.7"

    (wheel,) = (checkout / "dist").iterdir()
    assert wheel.name == "timm_sugar-9.8.7-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as files:
        assert NAME in files.read("timm_sugar/models/_weights.py").decode()
        assert not any("stale" in name for name in files.namelist())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its retries
    hub = LoopbackHub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    return hub


OLD, NEW = b"x" * 100, b"y" * 100


def test_download_is_that_of_the_tagged_commit_whatever_main_has(hub: LoopbackHub) -> None:
    with hub:
        hub.repos[REPO] = repo = Repo()
        tagged = repo.commit({"model.safetensors": OLD})
        repo.tags[f"v{__version__}"] = tagged
        repo.commit({"model.safetensors": NEW})
        assert verify(REPO, hashlib.sha256(OLD).hexdigest()) == tagged
        with pytest.raises(UserError, match="has SHA-256"):
            verify(REPO, hashlib.sha256(NEW).hexdigest())


@pytest.mark.parametrize("case", ["no repository", "private", "no tag", "no file"])
def test_download_that_not_everybody_can_have_is_one_line(
    case: str, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE)
    with hub:
        if case != "no repository":
            hub.repos[REPO] = repo = Repo(private=case == "private")
            oid = repo.commit({"README.md" if case == "no file" else "model.safetensors": OLD})
            repo.tags = {} if case == "no tag" else {f"v{__version__}": oid}
        with pytest.raises(UserError, match=r"has no public v.*: run scripts/publish.py push"):
            verify(REPO, "")
