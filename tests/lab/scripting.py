"""What the tests of the scripts share: the scripts as modules, tiny images, and the check of an error message."""

from __future__ import annotations

import errno
import importlib.util
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"
CLASSES = ("cat", "dog", "owl")
TINY = ("--model", "test_resnet_sugar", "--num-classes", "3", "--img-size", "32")


def load_script(name: str) -> ModuleType:
    """A script as a module, without running it."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def make_images(root: Path, train: int = 8, validation: int = 4, classes: tuple[str, ...] = CLASSES) -> Path:
    """A folder of noisy 36 x 36 PNG files whose classes differ in colour, the same at every call."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", validation)):
        for channel, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (36, 36, 3), dtype=np.uint8)
                pixels[..., channel % 3] //= 3
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def deny_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no process, not even root's, list a folder."""
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A limit on the size of files, in bytes, which stands for a full disk: the system refuses to write the rest."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def error_line(main: object, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a script prints before it exits with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(argv)  # type: ignore[operator]
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert ": error: " in lines[0]
    return lines[0]
