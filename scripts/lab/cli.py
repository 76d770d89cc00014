"""What the scripts' command lines have in common: errors of one line, name=value options, choice of a device."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import io
import math
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from timm.utils import ParseKwargs

# What timm, torch and the file system raise for a user's mistake; anything else is a bug and keeps its traceback.
_MISTAKES = (
    *(RuntimeError, ValueError, TypeError, KeyError, AssertionError, OSError),
    *(EOFError, pickle.UnpicklingError, SafetensorError, yaml.YAMLError, ArithmeticError, MemoryError),
    HTTPError,  # of a connection that breaks
)

_NO_MORE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what a stdout that takes no more gives
_NO_ENTRY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY)  # of a path


class UserError(Exception):
    """A user's mistake; the message is one line that says what was wrong and what to do."""


@contextmanager
def explained(what: str, *more: type[Exception]) -> Iterator[None]:
    """Turn a user's mistake inside the block into a UserError of one line that starts with `what`.

    `more` are exceptions that are a user's mistake in this block alone.
    """
    mistakes: tuple[type[Exception], ...] = (*_MISTAKES, *more)
    try:
        yield
    except mistakes as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if len(text) > 600:  # what went wrong stands at the beginning, what to do at the end
            text = f"{text[:300]} ... {text[-300:]}"
        raise UserError(f"{what}: {text}") from error


def one_line(text: str) -> str:
    """A text with what can't be printed, such as the end of a line in the name of a file, as an escape sequence."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def outside(error: OSError) -> str:
    """The line for what the machine refuses; raises the error again if it is anything else, and so a bug."""
    if error.errno in _NO_MORE:
        return f"can't write: {error.strerror}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many open files: give fewer --workers, or raise the limit (ulimit -n)"
    if error.errno in _NO_ENTRY and error.filename:
        return f"can't use {error.filename}: {error.strerror}"
    raise error


class Parser(argparse.ArgumentParser):
    """Argument parser that takes no abbreviations and whose errors are one line on stderr, exit status 2."""

    def __init__(self, prog: str, **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, allow_abbrev=False, formatter_class=formatter, **options)
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed, as of a daemon: the next file that opens would be in its place
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal can't show ends no run, as on stderr
            sys.stdout.reconfigure(errors="backslashreplace")

    def error(self, message: str) -> NoReturn:
        """Print the message and exit; of an error from a loader process only the last line is the message."""
        lines = str(message).strip().splitlines() or [""]
        line = lines[-1] if "Original Traceback" in message else one_line(str(message).strip())
        self.exit(2, f"{self.prog}: error: {line.removeprefix('lab.training.data.DataError: ')}\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Exit; if what --help printed can't be written, with status 2 and a line that says so."""
        try:
            _flush()
        except OSError as failure:
            _mute()
            if not message:
                status, message = 2, f"{self.prog}: error: can't write: {failure.strerror}\n"
        super().exit(status, message)

    def run(self, do: Callable[[argparse.Namespace], object], argv: Sequence[str] | None) -> int:
        """Parse `argv` (None: the command line) and call `do(options)`; a UserError becomes an `error`.

        So does a stdout that is full, or that nobody reads. Returns the exit status: 0, or 130 after Ctrl-C.
        """
        args = self.parse_args(argv)
        try:
            do(args)
            _flush()
        except UserError as error:
            self.error(str(error))
        except OSError as error:
            self.error(outside(error))
        except KeyboardInterrupt:
            return 130
        return 0


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that is a whole number in a range: `add("-b", type=whole(1))`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, not {text!r}") from None
        if number < least or (most is not None and number > most):
            span = f"{least} or more" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"expected {span}, not {text}")
        return number

    return parse


def real(
    least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], float]:
    """The type of an option that is a finite number from `least` to `most`, above `above` and below `below`."""
    words = {f"{least:g} or more": least, f"above {above:g}": above}
    words |= {f"at most {most:g}": most, f"below {below:g}": below}
    span = " and ".join(text for text, bound in words.items() if math.isfinite(bound)) or "a finite number"

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, not {text!r}") from None
        if not (math.isfinite(number) and least <= number <= most and above < number < below):
            raise argparse.ArgumentTypeError(f"expected {span}, not {text}")
        return number

    return parse


def say(line: str) -> None:
    """Print a line, also where nobody reads any more (`| head`) or the disk of a redirected output is full."""
    try:
        print(line, flush=True)
    except OSError:
        _mute()


def _flush() -> None:
    if sys.stdout:  # None where it was closed
        sys.stdout.flush()


def _mute() -> None:
    """Let what is printed, and flushed, later go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class KeyValues(ParseKwargs):
    """timm's `name=value ...` option, with an error instead of a traceback where the = is missing."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for value in values:
            if "=" not in value:
                parser.error(f"argument {option_string}: expected name=value, not {value!r}")
        super().__call__(parser, namespace, values, option_string)


def import_modules(names: Sequence[str] | None) -> None:
    """Import what --device-modules names. Raises UserError for a module that isn't there."""
    try:
        for name in names or ():
            if not all(part.isidentifier() for part in name.split(".")):
                raise UserError(f"--device-modules: {name!r} can't be the name of a module")
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--device-modules: {error} (is its folder in PYTHONPATH?)") from error


def choose_device(name: str | None) -> str:
    """The named device, or the first of cuda, mps and cpu that there is. Raises UserError if it is missing."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not name:
        return next(kind for kind, usable in there.items() if usable)
    with explained(f"--device {name}"):
        device = torch.device(name)
    missing = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if missing or not there.get(device.type, True):
        raise UserError(f"--device {name}: this machine has none; leave --device out to use what there is")
    if device.type not in there:
        with explained(f"--device {name}: nothing can be computed there"):
            torch.ones(1, device=device).item()
    return name


def as_option(key: str) -> str:
    """The option of a setting."""
    return "--" + key.replace("_", "-")


def as_options(key: str, value: Any) -> list[str]:
    """A setting as it stands on the command line; True is a flag, a dictionary `name=value ...`."""
    option = as_option(key)
    if value is True:
        return [option]
    if isinstance(value, dict):
        value = [f"{name}={item}" for name, item in value.items()]
    return [option, *map(_word, value)] if isinstance(value, (list, tuple)) else [f"{option}={value}"]


def _word(value: Any) -> str:
    """One of several values of an option; argparse takes -1e-05 for another option, but -0.00001 for a number."""
    return format(Decimal(repr(value)), "f") if isinstance(value, float) and value < 0 else str(value)


class UniqueKeys(yaml.SafeLoader):
    """YAML as safe_load reads it; raises YAMLError for a key that stands twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]} stands there twice")
        return super().construct_mapping(node, deep)


def yaml_options(path: str | Path, parser: Parser) -> list[str]:
    """The keys and values of a YAML file as command line options, so that one parser checks both."""
    with explained(f"can't read {path}"):
        try:
            values = yaml.load(Path(path).read_text(), UniqueKeys) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(error) from error
    known = {key: value for key, value in vars(parser.parse_args([])).items() if key not in ("config", "resume")}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected 'option: value' lines")
    options: list[str] = []
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            raise UserError(f"{path}: unknown key {key!r}" + (f", did you mean {close[0]!r}?" if close else ""))
        if value is None:
            if known[key] is not None and known[key] is not False and known[key] != "":
                raise UserError(f"{path}: {key} has no value; leave the line out for the default ({known[key]})")
        elif value is not False or known[key] is not False:
            options += as_options(key, value)
    return options
