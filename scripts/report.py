#!/usr/bin/env python3
"""All evidence on one page: the method, the paired experiments, the cost, the published models, and their commands.

    python scripts/report.py                     # output/report.html

The page is one file: pictures are inside, nothing is loaded from elsewhere, it opens from disk. What it says is what
README.md, docs/, results/ and the cards in model_cards/ say.
"""

from __future__ import annotations

import argparse
import base64
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment
from lab.cli import Parser, explained
from lab.files import write_atomically
from markdown_it import MarkdownIt
from markupsafe import Markup

from timm_sugar.version import __version__

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = Path(__file__).with_name("report.html")
TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")


@dataclass
class Part:
    """A titled piece of the page."""

    title: str
    body: Markup
    cards: list[Part] = field(default_factory=list)

    @property
    def id(self) -> str:
        """What links to it are made of."""
        return re.sub(r"\W+", "-", self.title.lower())


def cut(text: str, heading: str) -> str:
    """The part of a Markdown text under a heading, up to the next one of its level or above."""
    level = heading.index(" ")
    start = f"\n{text}".index(f"\n{heading}\n") + len(heading) + 1
    lines, fenced = [], False
    for line in text[start:].splitlines():
        fenced ^= line.startswith("```")  # a comment in a shell block is no heading
        if not fenced and re.match(rf"#{{1,{level}}} ", line):
            break
        lines.append(line)
    return "\n".join(lines)


def embedded(match: re.Match[str], folder: Path) -> str:
    """An attribute that names a file, with the file's content in the place of its name."""
    file = folder / match[2]
    return f'{match[1]}="data:{TYPES[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode()}"'


# A picture for light backgrounds and, on the next line, the same one for dark ones, as the pages of docs/ have them.
THEMED = re.compile(r"!\[(.*)\]\((.*)\)\{\.only-light\}\n!\[.*\]\((.*)\)\{\.only-dark\}")
PICTURE = r'<picture><source media="(prefers-color-scheme: dark)" srcset="\3"><img alt="\1" src="\2"></picture>'


def rendered(text: str, folder: Path, deeper: int = 0) -> Markup:
    """HTML of a Markdown text that lies in `folder`: headings moved down, pictures inside, no links to files."""
    tokens = MARKDOWN.parse(THEMED.sub(PICTURE, text))
    for token in tokens:
        if token.type.startswith("heading"):
            token.tag = f"h{int(token.tag[1]) + deeper}"
    html = MARKDOWN.renderer.render(tokens, MARKDOWN.options, {})
    html = re.sub(r'\b(src|srcset)="(?!data:|https?:)([^"]+)"', lambda match: embedded(match, folder), html)
    html = re.sub(r'<a href="(?!https?:)[^"]*">(.*?)</a>', r"\1", html, flags=re.DOTALL)
    return Markup(
        html.replace("<table>", '<div class="wide" tabindex="0"><table>').replace("</table>", "</table></div>")
    )


def collect() -> list[Part]:
    """All parts of the page. Raises OSError for a missing file."""
    readme = (ROOT / "README.md").read_text()
    cards = []
    for path in sorted((ROOT / "model_cards").glob("*/README.md")):
        body = path.read_text().split("---\n", 2)[2]  # what is before it is for the Hub
        title, body = body.strip().split("\n", 1)
        cards.append(Part(title.removeprefix("# Model card for "), rendered(body, path.parent, deeper=1)))
    docs = ROOT / "docs"
    method = readme.split("\n", 1)[1].partition("\nTwo lines")[0]
    evidence, cost = ((docs / f"{name}.md").read_text().split("\n", 1)[1] for name in ("evidence", "cost"))
    results = ROOT / "results"
    how_to_read = (results / "README.md").read_text().split("\n", 1)[1]
    pages = [path.read_text() for path in sorted(results.glob("*.md")) if path.name != "README.md"]
    tables = [rendered(text, results, deeper=2) for text in pages]
    return [
        Part("The method", rendered(method, ROOT)),
        Part("Does it help?", rendered(evidence, docs, deeper=1)),
        Part("Every table", Markup().join([rendered(how_to_read, results, 1), *tables])),
        Part("What it costs", rendered(cost, docs, deeper=1)),
        Part("Published models", rendered(cut(readme, "## Weights"), ROOT), cards),
    ]


def run(args: argparse.Namespace) -> None:
    """Write the page."""
    page = Environment(autoescape=True).from_string(TEMPLATE.read_text()).render(parts=collect(), version=__version__)
    with explained(f"can't write {args.output}"):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output, page)
    print(args.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 130 after Ctrl-C. A user's mistake exits with status 2 and one line on stderr."""
    parser = Parser("report.py", description=__doc__)
    default = Path("output/report.html")
    parser.add_argument("--output", type=Path, default=default, metavar="FILE", help="(default: %(default)s)")
    return parser.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
