"""Tags of weights that were trained with SUGAR: what each is, and where its weights come from.

scripts/publish.py makes `weights.json` from the folders of model_cards/, so that an installed package, which has no
such folders, knows them too.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.models import PretrainedCfg

ORG = "timm-sugar"  # on the Hub
WEIGHTS = "model.safetensors"
# Full names whose weights are on the Hub under ORG: add a name after `scripts/publish.py push` has put it there.
PUBLISHED: frozenset[str] = frozenset()
MODEL_CARDS = Path(__file__).resolve().parents[2] / "model_cards"  # in a source checkout or editable install
WEIGHTS_FILE = Path(__file__).with_name("weights.json")


@dataclass(frozen=True)
class SugarTag:
    """One set of weights trained with SUGAR.

    `cfg` is what timm's registry shows: preprocessing, labels, licence, and the source of the weights if there is one.
    `model_args` are the arguments that the weights were trained with, surrogate included. `sha256` is that of the file.
    """

    name: str  # <architecture>_sugar.<tag>
    cfg: PretrainedCfg
    model_args: dict[str, Any]
    sha256: str

    def fetch(self, cache_dir: str | Path | None = None) -> str:
        """Path of the file of weights, whose content was checked; downloads it where it isn't there.

        Raises RuntimeError if there is no source or the content is not what the tag names, and what
        huggingface_hub raises for a repository or network that can't be reached.
        """
        if self.cfg.file:
            return self._checked(self.cfg.file)
        if not self.cfg.hf_hub_id:
            raise RuntimeError(
                f"the weights of {self.name} are not on the Hub yet: use a source checkout of timm_sugar, where they "
                "lie in model_cards/; or name a copy of the file, by --pretrained-path of timm's train.py or "
                'pretrained_cfg_overlay={"file": "model.safetensors"} of create_model; or name an organisation that '
                "has them in the environment variable TIMM_SUGAR_ORG"
            )
        with suppress(LocalEntryNotFoundError):  # what is there needs no network
            file = hf_hub_download(self.cfg.hf_hub_id, WEIGHTS, cache_dir=cache_dir, local_files_only=True)
            if HF_HUB_OFFLINE or _sha256(file) == self.sha256:
                return self._checked(file)
        # Nothing is there, or a damaged file, or another version: load what the Hub has now.
        file = hf_hub_download(self.cfg.hf_hub_id, WEIGHTS, cache_dir=cache_dir)
        if _sha256(file) != self.sha256:
            file = hf_hub_download(self.cfg.hf_hub_id, WEIGHTS, cache_dir=cache_dir, force_download=True)
        return self._checked(file)

    def _checked(self, file: str) -> str:
        if _sha256(file) != self.sha256:
            raise RuntimeError(
                f"{file} is not the file that {self.name} names (its SHA-256 differs): it was damaged or belongs to "
                "another version of timm_sugar; remove the file, or update timm_sugar"
            )
        return file


def _sha256(file: str | Path) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def describe(config: dict[str, Any], weights: Path) -> dict[str, Any]:
    """The entry of weights.json for a folder's config.json (as read) and its file of weights."""
    return {
        "sha256": _sha256(weights),
        "model_args": config["sugar"]["model_args"],
        "pretrained_cfg": {
            **config["pretrained_cfg"],
            "label_names": config.get("label_names"),
            "label_descriptions": config.get("label_descriptions"),
        },
    }


def load_tags(path: Path = WEIGHTS_FILE) -> dict[str, SugarTag]:
    """All tags by full name, with the source of their weights.

    That is the Hub if TIMM_SUGAR_ORG names an organisation to take all weights from; else the folder in model_cards/ if
    there is one; else the Hub if the name is in PUBLISHED; else none, and the name is not listed as pretrained.

    Raises:
        ImportError: if the file is missing or damaged.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ImportError(f"{path} is missing or damaged: install timm_sugar again, or restore the file") from error
    org = os.environ.get("TIMM_SUGAR_ORG")
    tags = {}
    for name, entry in entries.items():
        file = MODEL_CARDS / name / WEIGHTS
        source: dict[str, Any] = {"hf_hub_id": f"{org or ORG}/{name}" if org or name in PUBLISHED else None}
        if file.exists() and not org:
            source = {"hf_hub_id": f"{ORG}/{name}", "file": str(file)}
        settings = {key: tuple(v) if isinstance(v, list) else v for key, v in entry["pretrained_cfg"].items()}
        cfg = PretrainedCfg(**settings | {"architecture": name.partition(".")[0]} | source)
        tags[name] = SugarTag(name, cfg, entry["model_args"], entry["sha256"])
    return tags
