#!/usr/bin/env python3
"""Walk through a release, and stop at the first thing that is not so, with what to do.

    python scripts/release.py

In this order: the version, the address of the repository, the folders of the models, their copies on the Hub, each
download by its SHA-256 at the commit of this version, the list of published names, what the pages say, git, the wheel.
Do what the line says and run it again. It changes nothing but dist/. docs/publish.md has the order with its reasons.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lab.cli import Parser
from lab.files import check_checkout
from lab.release.steps import STEPS

from timm_sugar.version import __version__


def walk(_: object) -> None:
    """Take all steps, one line each."""
    check_checkout()
    for title, step in STEPS.items():
        print(f"{title:11}", end="", flush=True)
        try:
            print(step(), flush=True)
        except BaseException:
            print("stop", flush=True)
            raise
    print(f"Ready. Publish it: git tag v{__version__} && git push origin v{__version__}")


def build_parser() -> Parser:
    """No options but --help."""
    return Parser("release.py", description=__doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 130 after Ctrl-C. A step that does not hold exits with status 2 and one line on stderr."""
    return build_parser().run(walk, argv)


if __name__ == "__main__":
    sys.exit(main())
