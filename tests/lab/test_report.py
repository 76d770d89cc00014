"""scripts/report.py: one file with everything in it, as a parser and a real browser see it."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from scripting import SCRIPTS, error_line, load_script

report = load_script("report")
ROOT = SCRIPTS.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]
MEASURE = """<!doctype html><iframe width=390 height=800 srcdoc="{page}"></iframe><script>
onload = () => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument, root = page.documentElement;
  document.body.textContent = JSON.stringify({{
    width: root.scrollWidth, room: root.clientWidth, titles: [...page.querySelectorAll("h2")].map(h => h.textContent),
    images: page.images.length, broken: [...page.images].filter(i => !i.complete || !i.naturalWidth).length,
    loaded: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name.slice(0, 30)),
    background: getComputedStyle(page.body).backgroundColor, text: getComputedStyle(page.body).color,
    figure: page.querySelector("picture img").currentSrc.length,
  }});
}}</script>"""


class Attributes(HTMLParser):
    """All attributes of a page as (tag, name, value), and all its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "new" / "page.html"
    assert report.main(["--output", str(path)]) == 0
    return path.read_text()


def test_nothing_comes_from_elsewhere_and_every_link_leads_somewhere(page: str) -> None:
    attributes = Attributes(page).found
    ids = {value for _, name, value in attributes if name == "id"}
    for tag, name, value in attributes:
        if name in ("src", "srcset") or (name == "href" and tag != "a"):
            assert value.startswith("data:"), (tag, value[:80])
        elif name == "href":
            assert value.startswith("https://") or value.removeprefix("#") in ids, value
    assert not re.search(r"url\(|@import|<script", page)


def strip(text: str) -> str:
    """A text without Markdown's marks and the targets of links, with single spaces."""
    return " ".join(re.sub(r"[`*]|!?\[|\](\(\S*?\))?", "", text).split())


def test_every_number_and_picture_of_the_results_is_on_it(page: str) -> None:
    seen = Attributes(page)
    text = strip(seen.text)
    sources = [*ROOT.glob("results/*.md"), *ROOT.glob("model_cards/*/README.md")]
    pictures = set()
    for source in sources:
        markdown = source.read_text()
        for name in re.findall(r"^!\[.*\]\((.*)\)$", markdown, flags=re.MULTILINE):
            pictures.add(f"data:image/png;base64,{base64.b64encode((source.parent / name).read_bytes()).decode()}")
        for line in markdown.splitlines():
            if line.startswith("| ") and "---" not in line:
                cells = [strip(cell) for cell in line.split("|")]
                assert all(cell in text for cell in cells), line
        for command in re.findall(r"^.*python scripts/.*$", markdown, flags=re.MULTILINE):
            assert strip(command).removeprefix("- ") in text
    assert {value for _, name, value in seen.found if name == "src" and value.startswith("data:image/png")} == pictures
    assert len(pictures) > 3


def test_a_part_ends_at_the_next_heading_of_its_level_and_not_in_a_code_block() -> None:
    text = "# A\n\n## B\none\n```bash\n# no heading\n```\n### C\ntwo\n## D\nthree\n"
    assert report.cut(text, "## B") == "one\n```bash\n# no heading\n```\n### C\ntwo"
    with pytest.raises(ValueError, match="substring not found"):
        report.cut(text, "## E")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    line = error_line(report.main, ["--output", str(tmp_path / "file" / "page.html")], capsys)
    assert "can't write" in line


@pytest.mark.skipif(not BROWSER, reason="needs Chromium (apt-get install chromium)")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_on_a_phone_without_asking_the_network(page: str, dark: bool, tmp_path: Path) -> None:
    (tmp_path / "frame.html").write_text(MEASURE.format(page=html.escape(page)))
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    place = [f"--user-data-dir={tmp_path / 'profile'}", scheme, "--dump-dom", f"file://{tmp_path / 'frame.html'}"]
    shown = subprocess.run(
        [str(BROWSER), *QUIET, *place], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    found = json.loads(re.sub(r"<[^>]*>", "", shown[shown.index("<body") :]))
    assert 300 < found["room"] <= 390
    assert found["width"] <= found["room"]
    assert found["titles"] == [part.title for part in report.collect()]
    assert len(found["titles"]) == 5
    assert found["images"] > 5
    assert found["broken"] == 0
    assert [name for name in found["loaded"] if not name.startswith("data:")] == []
    assert found["background"] == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    assert found["text"] == ("rgb(230, 237, 243)" if dark else "rgb(31, 35, 40)")
