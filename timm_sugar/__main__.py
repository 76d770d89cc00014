"""`python -m timm_sugar SCRIPT ARGS...`: run a script of timm's (validate.py, benchmark.py, ...) with our models in it.

timm's scripts know only the models that something has imported. timm's train.py can be told to (`--device-modules
timm_sugar`), the others need this launcher:

    python -m timm_sugar PATH/TO/validate.py --data-dir DATA --model resnet18_sugar --pretrained

timm and its scripts come from different places: the scripts lie in a checkout of timm's repository, next to a `timm`
folder that may be of another version. The installed timm is used, since it is the one the models are registered in.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import timm_sugar  # noqa: F401  registers the models, and thereby imports the installed timm before a checkout's


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script as `python SCRIPT ARGS...` would; its exit status is ours."""
    parser = argparse.ArgumentParser(
        "python -m timm_sugar", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", metavar="SCRIPT", help="path of a timm script, e.g. validate.py of timm's repository")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(argv)
    if not Path(options.script).is_file():
        parser.error(f"no such script: {options.script} (timm's scripts are in its repository, not in its package)")
    sys.argv = [options.script, *options.args]
    sys.path[0] = str(Path(options.script).resolve().parent)  # as for any script, for what lies next to it
    runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main()
