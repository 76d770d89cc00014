"""Give the package README.md as its description, with links that work outside of the repository, too.

Everything else is in pyproject.toml. There `Repository` in [project.urls] is the one place for the address. Without it
a link becomes its text, the picture is left out, and the description says so.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from setuptools import setup

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent
LINK = re.compile(r"\[([^\[\]]+)\]\((?!https?:|#)([^)\s]+)\)")  # in Markdown, to a file of the repository
PICTURE = re.compile(r"<picture>.*?</picture>\n*", flags=re.DOTALL)
NO_LINKS = "*Links to the pages of the repository are left out here: its address is not known yet.*"
SOURCE = re.compile(r'(src|srcset)="(?!https?:)([^"]+)"')


def description(readme: str, repository: str | None, version: str) -> str:
    """The text of README for PyPI. `repository` is an address on GitHub, whose files are taken at the version's tag."""
    if not repository:
        title, text = LINK.sub(r"\1", PICTURE.sub("", readme)).split("\n\n", 1)
        return f"{title}\n\n{NO_LINKS}\n\n{text}"
    repository = repository.rstrip("/")
    revision = "HEAD" if "dev" in version else f"v{version}"
    readme = LINK.sub(rf"[\1]({repository}/blob/{revision}/\2)", readme)
    return SOURCE.sub(rf'\1="{repository}/raw/{revision}/\2"', readme)


if __name__ == "__main__":
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    (version,) = re.findall(r'"(\d\S*)"', (ROOT / "timm_sugar" / "version.py").read_text(encoding="utf-8"))
    text = description((ROOT / "README.md").read_text(encoding="utf-8"), urls.get("Repository"), version)
    setup(long_description=text, long_description_content_type="text/markdown")
