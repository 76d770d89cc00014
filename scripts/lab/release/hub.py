"""Publishing a model's folder on the Hugging Face Hub: what would change, and the upload."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import HfApi, get_session, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoFile

from lab.cli import UserError
from lab.release.stage import FILES
from timm_sugar.models._weights import WEIGHTS
from timm_sugar.version import __version__

_NOT_OURS = {".gitattributes"}  # the Hub's own
_PASSING = (404, 408, 409, 425, 429)  # client errors that another try may not meet
ODD_TOKEN = "the token has a character that no token has: set it anew"
PATIENCE = 60.0  # seconds in which the Hub has to answer; huggingface_hub's client waits for ever


@contextmanager
def _one_line(repo_id: str) -> Iterator[None]:
    """Turn what the Hub or the network answers into a UserError that says what to do."""
    get_session().timeout = PATIENCE
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError("no token: run `hf auth login`, or set HF_TOKEN to a token that can write") from error
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: around what broke the upload of a large file
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        said = (cause.server_message or "") if isinstance(cause, HfHubHTTPError) else ""
        reason = " ".join(said.split()) or (str(cause or error).strip().splitlines() or [type(error).__name__])[0]
        if "Bearer" in reason:  # what httpx says of a header that can't be sent, with all that is in it
            raise UserError(ODD_TOKEN) from None
        if status == 401:
            advice = "the token is not known there, or has run out: run `hf auth login`, or set HF_TOKEN"
        elif status == 403 or (isinstance(cause, PermissionError) and cause.errno is None):  # the latter is xet's
            advice = "use a token with write access to the organisation, if that is what is missing"
        elif status and 400 <= status < 500 and status not in _PASSING:
            advice = "mend that, then run the same command again"
        else:
            advice = "run the same command again, it goes on where it stopped"
        raise UserError(f"{repo_id}: {reason.rstrip('.')}; {advice}") from error
    except (KeyError, TypeError, AttributeError, JSONDecodeError) as error:  # another form: {}, null, a web page
        raise UserError(
            f"{repo_id}: the answer is not that of a Hub; check HF_ENDPOINT and what lies between"
        ) from error
    except UnicodeEncodeError:  # what Python says of such a header
        raise UserError(ODD_TOKEN) from None
    except ValueError as error:  # a name or metadata that the Hub wouldn't take
        raise UserError(f"{repo_id}: {' '.join(str(error).split())}") from error


def check_token(api: HfApi, org: str) -> None:
    """Raises UserError if there is no token, or it can only read."""
    with _one_line(org):
        role = api.whoami()["auth"]["accessToken"]["role"]
    if role == "read":
        raise UserError("the token can only read: use one that can write")


def plan(api: HfApi, repo_id: str, folder: Path, private: bool) -> list[str]:
    """What a push would do, one line each: `changes`, the tag, and who can see the repository; empty if nothing.

    Raises UserError as `push` would before it changes anything.
    """
    lines, version = changes(api, repo_id, folder), f"v{__version__}"
    with _one_line(repo_id):
        try:
            tagged, hidden = _is_tagged(api, repo_id, folder, lines), _info(api, repo_id).private
        except RepositoryNotFoundError:
            tagged, hidden = False, True  # as it is made
    lines += [] if tagged else [f"tag {version}"]
    return lines + ([] if hidden == private else [_visibility(private)])


def _visibility(private: bool) -> str:
    return f"make {'private' if private else 'public'}"


def changes(api: HfApi, repo_id: str, folder: Path, revision: str | None = None) -> list[str]:
    """What would change in a repository: that it is made, files added, changed or deleted; empty if nothing."""
    with _one_line(repo_id):
        try:
            _info(api, repo_id)  # of an empty answer the next line would make an empty repository
            entries = list(api.list_repo_tree(repo_id, recursive=True, revision=revision))
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
        if f"create {repo_id}" in done:
            api.create_repo(repo_id, private=True, exist_ok=True)
        tagged = _is_tagged(api, repo_id, folder, done)
        if done:
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                delete_patterns="*",  # of what the folder doesn't have
                commit_message=f"timm_sugar {__version__}",
            )
        if not tagged:
            commit = _info(api, repo_id).sha
            for missing in changes(api, repo_id, folder, commit):
                raise _not_done(repo_id, missing)
            api.create_tag(repo_id, tag=version, revision=commit, exist_ok=True)
            done.append(f"tag {version}")
            if not _is_tagged(api, repo_id, folder, []):
                raise _not_done(repo_id, done[-1])
        if _info(api, repo_id).private != private:
            api.update_repo_settings(repo_id, private=private)
            done.append(_visibility(private))
            if _info(api, repo_id).private != private:
                raise _not_done(repo_id, done[-1])
    return done


def verify(repo_id: str, sha256: str) -> str:
    """Download the weights that are tagged with the package's version, without a token; returns their commit.

    Raises UserError if not everybody can have them, or their SHA-256 is another one.
    """
    version = f"v{__version__}"
    with _one_line(repo_id), tempfile.TemporaryDirectory() as cache:
        try:
            commit = str(_info(HfApi(token=False), repo_id, version).sha)
            file = Path(hf_hub_download(repo_id, WEIGHTS, revision=commit, cache_dir=cache, token=False))
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
            raise UserError(f"{repo_id} has no public {version}: run scripts/publish.py push") from error
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(
            f"{repo_id} at {commit}: {WEIGHTS} has SHA-256 {found}, not {sha256}: push it again under a new version"
        )
    return commit


def _info(api: HfApi, repo_id: str, revision: str | None = None) -> ModelInfo:
    """What the Hub says of a repository, in time."""
    found = api.repo_info(repo_id, revision=revision, timeout=PATIENCE)
    assert isinstance(found, ModelInfo)
    return found


def _is_tagged(api: HfApi, repo_id: str, folder: Path, done: list[str]) -> bool:
    """Whether the version's tag is there. Raises UserError if it, or what lies above it, has other files."""
    version = f"v{__version__}"
    if not _has_tag(api, repo_id, version):
        return False
    if done or changes(api, repo_id, folder, version):
        raise UserError(f"{repo_id} has {version} with other files: raise the version in timm_sugar/version.py")
    return True


def _has_tag(api: HfApi, repo_id: str, name: str) -> bool:
    return name in [ref.name for ref in api.list_repo_refs(repo_id).tags]


def _not_done(repo_id: str, what: str) -> UserError:
    """The error for a request that was answered as if it were carried out, as by a proxy."""
    return UserError(f"{repo_id}: the Hub took it, but would still {what}; run the same command again")
