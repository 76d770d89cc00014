"""Settings of Sphinx: Markdown pages, the reference from docstrings, and nothing that is loaded from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

from timm_sugar.version import __version__

project = "timm_sugar"
author = "The timm_sugar authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["build"]
default_role = "code"  # docstrings write `name`
myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # pages that include a file of the repository start with its second heading
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them
napoleon_use_ivar = True

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"timm_sugar {version}"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#bc4c00", "color-brand-content": "#0969da"},
    "dark_css_variables": {"color-brand-primary": "#ffa657", "color-brand-content": "#58a6ff"},
}


def escape_bars(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep |x| in a docstring from being read as a substitution of reStructuredText."""
    lines[:] = [line.replace("|", "\\|") for line in lines]


def show_results(app: Sphinx, page: str, source: list[str]) -> None:
    """Show the pages of results/ in the place of results.md and results/*.md, their links as they are from here."""
    if page != "results" and not page.startswith("results/"):
        return
    index, name = page == "results", page.removeprefix("results/")
    path = Path(__file__).parents[1] / "results" / ("README.md" if index else f"{name}.md")
    app.env.note_dependency(str(path))
    text = path.read_text()
    if index:
        text = re.sub(r"\]\((\w+\.md)\)", r"](results/\1)", text.replace("# Results", "# Every table", 1))
        text += "\n```{toctree}\n:glob:\n:hidden:\n\nresults/*\n```\n"
    else:
        text = text.replace("](README.md)", "](../results.md)").replace("](../scripts/", "](../../scripts/")
        text = re.sub(r"\]\((?!\.\./|https?:|#)", "](../../results/", text)  # CSV files and pictures
    source[0] = text


def refuse_what_loads_from_elsewhere(app: Sphinx, error: Exception | None) -> None:
    """Raise ExtensionError for a page that takes a script, style, font or picture from the network."""
    for page in [] if error else Path(app.outdir).rglob("*.html"):
        loads = re.findall(r"<(?!a\b)\w+ [^>]*?(?:src|href)=\"(https?:[^\"]*)\"", page.read_text())
        if loads:
            raise ExtensionError(f"{page.name} loads {loads[0]}")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("build-finished", refuse_what_loads_from_elsewhere)
    app.connect("source-read", show_results)
    app.connect("autodoc-process-docstring", escape_bars, priority=0)
