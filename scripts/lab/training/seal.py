"""A SHA-256 of a checkpoint's content inside the checkpoint: what changed on the disk is not trained on."""

from __future__ import annotations

import argparse
import hashlib
import re
from typing import Any

import torch
from timm.utils import CheckpointSaver

_CONTENT = ("epoch", "metric", "args", "state_dict", "state_dict_ema", "optimizer", "amp_scaler")
_BESIDE = ("arch", "version", "saver")  # what else a checkpoint has


class SealedSaver(CheckpointSaver):
    """timm's saver, whose own state in a checkpoint also holds the SHA-256 of all that training goes on with."""

    def state_dict(self, epoch: int | None = None, metric: float | None = None) -> dict[str, Any]:
        """The saver's state as timm stores it, and `sha256`."""
        state = {"epoch": epoch, "metric": metric, "args": self.args, "optimizer": self.optimizer.state_dict()}
        for ema in (False, True):
            state.update(self.task.get_checkpoint_state(ema=ema, unwrap_fn=self.unwrap_fn))
        if self.amp_scaler is not None:
            state[self.amp_scaler.state_dict_key] = self.amp_scaler.state_dict()
        saver = super().state_dict(epoch, metric)
        return {**saver, "sha256": digest(state, saver)}


def check_seal(state: Any) -> None:
    """Raises ValueError for a checkpoint whose content isn't what was saved; one without a SHA-256 passes."""
    parts = {key: part for key, part in state.items() if isinstance(part, dict)} if isinstance(state, dict) else {}
    seals = [(key, name) for key, part in parts.items() for name, value in part.items() if _is_seal(name, value)]
    if not seals:
        return
    if seals != [("saver", "sha256")] or state.keys() - {*_CONTENT, *_BESIDE}:  # which would leave something unchecked
        raise ValueError("it has other keys than were saved, so it has changed since it was written")
    saver = state["saver"]
    rest = {key: value for key, value in saver.items() if key != "sha256"}
    if digest(state, rest) != saver["sha256"]:
        raise ValueError("its SHA-256 differs, so the file has changed since it was written; use another checkpoint")


def _is_seal(name: Any, value: Any) -> bool:
    return name == "sha256" or (isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value)))


def digest(state: dict[str, Any], saver: dict[str, Any]) -> str:
    """The SHA-256 of the values of a checkpoint, in hexadecimal."""
    hasher = hashlib.sha256()
    _feed(hasher, [[key, state.get(key)] for key in _CONTENT])
    _feed(hasher, saver)
    return hasher.hexdigest()


def _feed(hasher: Any, value: Any) -> None:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, torch.Tensor):
        hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
        hasher.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        _feed(hasher, list(value.items()))
    elif isinstance(value, (list, tuple)):
        hasher.update(f"[{len(value)}]".encode())
        for item in value:
            _feed(hasher, item)
    else:
        hasher.update(repr(value).encode())
