"""Publishing a model's folder on the Hugging Face Hub: what is refused, what would change, and the upload."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from lab.cli import UserError, explained
from lab.release.card import CARD, CONFIG, card
from lab.release.stage import FILES
from timm_sugar.models._weights import MODEL_CARDS, WEIGHTS, WEIGHTS_FILE, describe
from timm_sugar.version import __version__

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".tar")
_NOT_OURS = {".gitattributes"}  # the Hub's own


def check(folder: Path) -> None:
    """Raises UserError, with the first reason, for a folder that must not be published.

    Refused are: a missing or additional file, above all a pickle; weights that are not finite or not those of the
    registered model; a config that disagrees with the folder's name, its weights or the registered model, or names no
    licence; a card that isn't what the other files make; a model of model_cards/ whose tag says something else.
    """
    there = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    if pickles := [name for name in there if name.endswith(_PICKLES)]:
        raise UserError(f"{folder / pickles[0]} may hold pickled code: remove it")
    if unknown := sorted(set(there) - set(FILES)):
        raise UserError(f"{folder / unknown[0]} doesn't belong into a model's folder: remove it")
    if missing := [name for name in FILES if name not in there]:
        raise UserError(f"{folder} has no {missing[0]}: make the folder with scripts/publish.py stage")
    with explained(f"{folder / CONFIG} is not the config of a model"):
        config = json.loads((folder / CONFIG).read_text())
        cfg, arguments = config["pretrained_cfg"], config["sugar"]["model_args"]
        labels = config["label_names"]
    if not cfg.get("license"):
        raise UserError(f"{folder / CONFIG} names no licence: add pretrained_cfg.license")
    with explained(f"{folder / WEIGHTS} is not a whole safetensors file"):
        weights = safetensors.torch.load_file(folder / WEIGHTS)
    if broken := [key for key, value in weights.items() if not value.isfinite().all()]:
        raise UserError(f"{folder / WEIGHTS}: {broken[0]} has values that are NaN or infinite")
    architecture, _, tag = folder.name.partition(".")
    for what, said, found in (
        ("pretrained_cfg.tag", cfg.get("tag"), tag),
        ("num_classes", config.get("num_classes"), cfg.get("num_classes")),
        ("label_names", len(labels), config.get("num_classes")),
    ):
        if said != found:
            raise UserError(f"{folder / CONFIG}: {what} is {said!r} and should be {found!r}")
    with explained(f"{folder / WEIGHTS} doesn't load into {architecture}"):
        local: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        model: Any = timm.create_model(architecture, num_classes=config["num_classes"], **arguments).eval()
        model.load_state_dict(weights)
    image = torch.randn(2, *cfg["input_size"], generator=torch.Generator().manual_seed(0))
    with explained(f"{folder / CONFIG} doesn't agree with {architecture}"), torch.inference_mode():
        if not torch.equal(local(image), model(image)):
            raise ValueError("their outputs differ")
    if (folder / CARD).read_text() != card(folder):
        raise UserError(f"{folder / CARD} is out of date: run scripts/publish.py cards")
    if folder.resolve().parent == MODEL_CARDS:  # the project's own
        entry = json.loads(WEIGHTS_FILE.read_text()).get(folder.name)
        if entry != describe(config, folder / WEIGHTS):
            raise UserError(f"{WEIGHTS_FILE} disagrees with {folder}: run scripts/publish.py cards")


@contextmanager
def _one_line(repo_id: str) -> Iterator[None]:
    """Turn what the Hub or the network answers into a UserError that says what to do."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError("no token: run `hf auth login`, or set HF_TOKEN to a token that can write") from error
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: around what broke the upload of a large file
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if status in (401, 403):
            message = f"{repo_id}: the token may not write there; use one with write access to the organisation"
        else:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            message = f"{repo_id}: {reason}; run the same command again, it goes on where it stopped"
        raise UserError(message) from error
    except ValueError as error:  # a name or metadata that the Hub wouldn't take
        raise UserError(f"{repo_id}: {' '.join(str(error).split())}") from error


def check_token(api: HfApi, org: str) -> None:
    """Raises UserError if there is no token, or it can only read."""
    with _one_line(org):
        role = api.whoami()["auth"]["accessToken"]["role"]
    if role == "read":
        raise UserError("the token can only read: use one that can write")


def changes(api: HfApi, repo_id: str, folder: Path) -> list[str]:
    """What a push would do, one line each: create the repository, add, change or delete a file; empty if nothing."""
    with _one_line(repo_id):
        try:
            entries = list(api.list_repo_tree(repo_id, recursive=True))
        except RepositoryNotFoundError:
            return [f"create {repo_id}", *(f"add {name}" for name in FILES)]
    there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile) and entry.path not in _NOT_OURS}
    lines = [
        f"{'change' if name in there else 'add'} {name}" for name in FILES if not _same(there.get(name), folder / name)
    ]
    return lines + [f"delete {path}" for path in sorted(there.keys() - set(FILES))]


def _same(entry: RepoFile | None, file: Path) -> bool:
    """Whether a file on the Hub has the content of a local one: SHA-256 of large files, git's blob id of others."""
    if entry is None:
        return False
    content = file.read_bytes()
    if entry.lfs:
        return entry.lfs.sha256 == hashlib.sha256(content).hexdigest()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def push(api: HfApi, repo_id: str, folder: Path, private: bool) -> list[str]:
    """Make a repository hold a checked folder: one commit, tagged with the package's version; returns what changed.

    A new repository is private until all is there, so cut off anywhere nothing half-made can be seen, and the same call
    completes it. Raises UserError if the Hub or the network refuses, or this version is there with other files.
    """
    done = changes(api, repo_id, folder)
    version = f"v{__version__}"
    with _one_line(repo_id):
        if not api.repo_exists(repo_id):
            api.create_repo(repo_id, private=True, exist_ok=True)
        tags = [ref.name for ref in api.list_repo_refs(repo_id).tags]
        if done and version in tags:
            raise UserError(f"{repo_id} has {version} with other files: raise the version in timm_sugar/version.py")
        if done:
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                delete_patterns="*",  # of what the folder doesn't have
                commit_message=f"timm_sugar {__version__}",
            )
        if version not in tags:
            api.create_tag(repo_id, tag=version, exist_ok=True)
            done.append(f"tag {version}")
        if api.repo_info(repo_id).private != private:
            api.update_repo_settings(repo_id, private=private)
            done.append(f"make {'private' if private else 'public'}")
    return done
