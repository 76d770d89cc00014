"""The steps of a release, in their order; each returns what holds, or raises UserError saying what to do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi

from lab.cli import UserError, explained
from lab.release.card import CONFIG
from lab.release.checks import check
from lab.release.hub import plan, verify
from timm_sugar.models._weights import MODEL_CARDS, ORG, PUBLISHED, WEIGHTS_FILE
from timm_sugar.version import __version__

ROOT = MODEL_CARDS.parent
# What pages say as long as nothing is published.
UNPUBLISHED = re.compile(r"\b(PyPI|Hub|address isn't known) yet\b|has no SUGAR weights")
PUSH = "run scripts/publish.py push"


def models() -> list[Path]:
    """The folders of the project's models, by name."""
    return sorted(path.parent for path in MODEL_CARDS.glob(f"*/{CONFIG}"))


def _read(path: Path) -> str:
    """The text of a file. Raises UserError if it isn't there or isn't text."""
    with explained(f"can't read {path.name}"):
        return path.read_text(encoding="utf-8")


def look_at_version() -> str:
    """The version is one to be released, and the changelog has it."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", __version__):
        raise UserError(f"{__version__} is no release: set the version in timm_sugar/version.py, e.g. 0.2.0")
    if f"\n## [{__version__}] - " not in _read(ROOT / "CHANGELOG.md"):
        raise UserError(f"CHANGELOG.md has no {__version__}: write '## [{__version__}] - DATE' over what is unreleased")
    return __version__


def look_at_address() -> str:
    """The address of the repository is known, for the links of PyPI's page."""
    found = re.search(r'^Repository = "(https://\S+)"', _read(ROOT / "pyproject.toml"), flags=re.MULTILINE)
    if not found or "OWNER" in found[1]:
        raise UserError("the repository has no address: fill in Repository in [project.urls] of pyproject.toml")
    return found[1]


def look_at_folders() -> str:
    """Each model's folder may be published, and weights.json has it."""
    for folder in models():
        check(folder)
    if names := json.loads(WEIGHTS_FILE.read_text()).keys() ^ {folder.name for folder in models()}:
        raise UserError(f"{WEIGHTS_FILE.name} and model_cards/ differ in {min(names)}: run scripts/publish.py cards")
    return f"{len(models())} models"


def look_at_hub() -> str:
    """Each model is on the Hub as it is here, tagged and public."""
    api = HfApi(library_name="timm_sugar", library_version=__version__)
    for folder in models():
        if lines := plan(api, f"{ORG}/{folder.name}", folder, private=False):
            raise UserError(f"{ORG}/{folder.name} is not on the Hub as it is here ({lines[0]}): {PUSH}")
    return f"as in {MODEL_CARDS.name}/"


def look_at_downloads() -> str:
    """Each model's weights come down whole, at the commit of this version."""
    tags = json.loads(WEIGHTS_FILE.read_text())
    pinned = [verify(f"{ORG}/{folder.name}", tags[folder.name]["sha256"]) for folder in models()]
    return "SHA-256 as in weights.json, at " + ", ".join(commit[:8] for commit in pinned)


def look_at_published() -> str:
    """The library lists each model as published."""
    there = {folder.name for folder in models()}
    if missing := sorted(there - PUBLISHED):
        raise UserError(f"add to PUBLISHED in timm_sugar/models/_weights.py: {', '.join(missing)}")
    if unknown := sorted(PUBLISHED - there):
        raise UserError(f"remove from PUBLISHED in timm_sugar/models/_weights.py: {', '.join(unknown)}")
    return f"{len(there)} names"


def look_at_pages() -> str:
    """No page says any longer that nothing is published."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if found := UNPUBLISHED.search(" ".join(page.read_text().split())):
            raise UserError(f"{page.relative_to(ROOT)} says '{found[0]}': write what holds once this is out")
    return "none says 'yet'"


def look_at_git() -> str:
    """All of it is committed, and the version's tag is free, or on this commit."""
    if changed := _run("git", "status", "--porcelain", "--untracked-files=all").splitlines():
        raise UserError(f"{changed[0][3:]} is not committed: commit what changed")
    tag, head = f"v{__version__}", _run("git", "rev-parse", "HEAD").strip()
    if tag in _run("git", "tag").split() and _run("git", "rev-list", "-1", tag).strip() != head:
        raise UserError(f"git has {tag} on another commit: raise the version in timm_sugar/version.py")
    return head[:8]


def build() -> str:
    """The wheel, built from a clone, where nothing lies that isn't committed."""
    with tempfile.TemporaryDirectory() as folder:
        _run("git", "clone", "--quiet", str(ROOT), folder)
        wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"]
        _run(*wheel, str(ROOT / "dist"), folder)
    return f"dist/timm_sugar-{__version__}-py3-none-any.whl"


def _run(*command: str) -> str:
    """What a command prints. Raises UserError with its last line if it fails."""
    with explained(f"can't run {command[0]}"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command[:4])} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout


STEPS: dict[str, Callable[[], str]] = {
    "version": look_at_version,
    "address": look_at_address,
    "folders": look_at_folders,
    "on the Hub": look_at_hub,
    "downloads": look_at_downloads,
    "published": look_at_published,
    "pages": look_at_pages,
    "committed": look_at_git,
    "wheel": build,
}
