"""The folder of a training run, which one process at a time writes."""

from __future__ import annotations

import argparse
import math
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from lab.cli import UserError, explained, say
from lab.files import write_atomically, write_rows
from lab.training.options import folder_of
from lab.training.runs import (
    BEFORE,
    DAMAGE,
    FORK,
    START,
    numbered_checkpoints,
    plot_curves,
    read_checkpoint,
    read_summary,
    write_summary,
)
from lab.training.seal import SealedSaver

LOCK = ".lock"  # stays in the folder
_LEFT_BY_A_KILL = (LOCK, "tmp-args.yaml")  # before the run began
_PATIENCE = 8  # seconds, in which the loader processes of a killed run end, that an old filelock lets hold the lock


class RunFolder:
    """The files of a run. `resumed` says whether the run goes on in the folder that it was in."""

    def __init__(self, path: Path, resume: Path | None) -> None:
        """Lock the folder of a run that goes on; raises UserError if another process trains in it."""
        self.path, self.resume, self.rows = path, resume, list[dict[str, Any]]()
        self.resumed = resume is not None and folder_of(resume).resolve() == path.resolve()
        self.lock = FileLock(path / LOCK)
        self.saver: Any = None
        if self.resumed:
            self.acquire()

    def acquire(self) -> None:
        """Make the folder, if need be, and keep other processes out of it."""
        with explained(f"can't write to output folder {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self.lock.acquire(timeout=_PATIENCE)
            except Timeout:
                raise UserError(f"another process trains in {self.path}: wait for it or end it") from None
            for left in self.path.glob("tmp-*-*/"):  # by an export that was killed
                shutil.rmtree(left, ignore_errors=True)
            for path in self.path.iterdir():
                if path.is_symlink():  # what is written there would go elsewhere
                    raise UserError(f"{path} is a link: put a copy of the file there")

    def check_unused(self) -> None:
        """Raises UserError if there are files of another run."""
        with explained(f"can't write to output folder {self.path}"):  # as for a name that is too long
            used = self.path.is_dir() and any(path.name not in _LEFT_BY_A_KILL for path in self.path.iterdir())
            used = used or self.path.is_file()
        if used:
            raise UserError(
                f"output folder {self.path} exists: choose another --experiment or continue it with --resume"
            )

    def open(self, args: argparse.Namespace, start: int) -> None:
        """Write the settings; read the summary of the epochs before `start`."""
        if not self.resumed:
            self.check_unused()
            self.acquire()
            self.check_unused()  # by a process that was faster
        if self.resume and not self.resumed:  # of the folders the names: the log is published
            self.log(f"{FORK}{folder_of(self.resume).resolve().name} goes on in {self.path.name}")
        with explained(f"can't write to output folder {self.path}"):
            if self.resume and not self.resumed:
                for path in (folder_of(self.resume) / name for name in BEFORE):
                    if path.exists():
                        shutil.copyfile(path, self.path / path.name)
            write_atomically(self.path / "args.yaml", yaml.safe_dump(args.given, default_flow_style=False))
        self.rows = read_summary(self.path, start) if self.resumed else []

    def keep(self, saver: SealedSaver, start: int, history: dict[str, Any]) -> None:
        """Save with `saver` from now on; finish the save that a kill may have cut short."""
        self.saver = saver
        if start:
            history = history if self.resumed else {}  # the best of a fork is one of its own epochs
            with explained(f"what {self.resume} says about other checkpoints can't be used", *DAMAGE), self.saving():
                for name, _ in history.get("checkpoint_files", ()):  # which the saver deletes when better ones come
                    if not re.fullmatch(r"checkpoint-\d+\.pth\.tar", name):
                        raise ValueError(f"{name!r} is no checkpoint of a run")
                metric = history.get("pending", (None, None))[1]
                saver.load_state_dict({**history, "pending": (None, None)})
                for known in (metric, saver.best_metric, *(value for _, value in saver.checkpoint_files)):
                    math.isfinite(known or 0)  # raises TypeError for what is no number
                saver.save_checkpoint(start - 1, metric)
                if self.resumed and self.resume and (self.resume.is_file() or self.later_checkpoints(start)):
                    self.go_back(start, saver.best_epoch)
                plot_curves(self.path, self.rows)

    def go_back(self, start: int, best: int | None) -> None:
        """Remove the checkpoints of later epochs, which the run makes anew, perhaps with other options.

        model_best.pth.tar becomes that of epoch `best`, the best one before `start`, or goes if there is no copy of it.
        It changes first: after a kill the later checkpoints that are left say that this has to be done again.
        """
        kept = self.path / "model_best.pth.tar"
        numbered = numbered_checkpoints(self.path)
        gone = self.later_checkpoints(start)
        with suppress(UserError):  # a damaged one is of no use to anybody
            if kept.exists() and read_checkpoint(kept, None)["epoch"] >= start:
                gone.append(kept)
        if kept in gone and best in numbered:
            write_atomically(kept, numbered[best].read_bytes())
        elif kept in gone:
            kept.unlink()
        for path in gone:
            if path != kept:
                path.unlink()
        if gone:
            self.log(f"back to epoch {start}: later checkpoints are gone ({', '.join(path.name for path in gone)})")

    def later_checkpoints(self, start: int) -> list[Path]:
        """The numbered checkpoints of epochs from `start` on."""
        return [path for epoch, path in sorted(numbered_checkpoints(self.path).items()) if epoch >= start]

    def save(self, epoch: int, row: dict[str, Any], metric: float) -> None:
        """Summary first, checkpoint second: a kill in between leaves a row that the resumed run replaces."""
        self.rows.append(row)
        with self.saving():
            write_summary(self.path, self.rows)
            self.saver.save_checkpoint(epoch, metric)
            plot_curves(self.path, self.rows)

    def save_start(self, row: dict[str, Any], name: str = START) -> None:
        """What the weights do before training, as start.csv or another file."""
        with self.saving():
            write_rows(self.path / name, [row], list(row))

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Where a full disk ends the run with a line, leaving the checkpoint before this one."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
            for path in self.path.glob("tmp[-.]*"):  # of write_atomically and of timm's saver
                with suppress(OSError):
                    path.unlink()
            reason = " ".join(str(error).split())
            if "inline_container" in reason:  # how torch says it
                reason = "the file can't be written whole, as on a full disk or beyond the limit of `ulimit -f`"
            raise UserError(f"can't save to {self.path} ({reason}); mend that, then {self.resume_command}") from error

    def log(self, line: str) -> None:
        """Print a line, and add it to train.log."""
        say(line)
        with self.saving(), open(self.path / "train.log", "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")

    @property
    def resume_command(self) -> str:
        """What a user types to go on."""
        if self.resume and not self.resumed and not any(self.path.glob("*.pth.tar")):  # a fork that has nothing yet
            return f"remove {self.path} and give the same command again"
        return f"continue with: python {shlex.quote(sys.argv[0])} --resume {shlex.quote(str(self.path))}"
