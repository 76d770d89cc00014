"""What the built package says of itself: the description that PyPI shows, and its links."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from email.parser import Parser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from timm_sugar.version import __version__

ROOT = Path(__file__).parents[2]
ADDRESS = "https://github.com/someone/timm_sugar"
BUILD = "from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_wheel('metadata'))"


def description(folder: Path, repository: str | None, version: str = __version__) -> str:
    """The long description of the package, built in a folder from what the build reads, with an address or none."""
    for name in ("README.md", "LICENSE", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "timm_sugar", folder / "timm_sugar", ignore=shutil.ignore_patterns("__pycache__"))
    version_file = folder / "timm_sugar" / "version.py"
    version_file.write_text(version_file.read_text().replace(__version__, version))
    project = re.sub(r"\n(# )?Repository = .*", "", (folder / "pyproject.toml").read_text())
    line = f'Repository = "{repository}"\n' if repository else ""
    (folder / "pyproject.toml").write_text(project.replace("[project.urls]\n", f"[project.urls]\n{line}"))
    (folder / "metadata").mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    metadata = Parser().parsestr((folder / "metadata" / done.stdout.split()[-1] / "METADATA").read_text())
    assert metadata["Version"] == version
    assert metadata["Description-Content-Type"] == "text/markdown"
    return str(metadata.get_payload())


def links(text: str) -> list[str]:
    """Where the links and pictures of a Markdown text lead, as a renderer sees them."""
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    return [target for found in re.findall(r'(?:href|src|srcset)="([^"]*)"', page) for target in found.split()]


@pytest.mark.parametrize(("version", "revision"), [("0.2.0.dev0", "HEAD"), ("0.2.0", "v0.2.0")])
def test_links_of_the_description_are_absolute_and_lead_to_the_files_of_the_version(
    version: str, revision: str, tmp_path: Path
) -> None:
    readme = links((ROOT / "README.md").read_text())
    built = links(description(tmp_path, ADDRESS, version))
    relative = [target for target in readme if not target.startswith("https:")]
    assert len(relative) >= 30
    assert len(built) == len(readme)
    for before, after in zip(readme, built, strict=True):
        folder = "raw" if before.endswith(".svg") else "blob"
        assert after == (f"{ADDRESS}/{folder}/{revision}/{before}" if before in relative else before)


def test_without_an_address_no_link_leads_nowhere_and_the_description_says_so(tmp_path: Path) -> None:
    text = description(tmp_path, None)
    assert "its address is not known yet" in text.split("\n\n")[1]
    assert links(text)
    assert all(target.startswith("https://") for target in links(text))
    assert not any(name in text for name in ("OWNER", ".svg", "](docs/"))
