"""A double of the Hugging Face Hub's HTTP API on this machine, as far as huggingface_hub 2.4 uses it here.

It keeps repositories as whole trees, one per commit, in memory. It has no git, paging, gating, rate limits, YAML
validation or Xet, and knows one organisation with a token that may write and one that may read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

WRITE, READ = "hf_may_write", "hf_may_read"
Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]


@dataclass
class Repo:
    """Trees of files by commit, the last of them being `main`, and tags."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a tree; its id."""
        oid = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[oid] = files
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit that `main`, a tag or an id names."""
        if revision == "main":
            return list(self.commits)[-1]
        return self.tags.get(revision, revision if revision in self.commits else None)

    @property
    def files(self) -> dict[str, bytes]:
        """The tree of `main`."""
        return self.commits[list(self.commits)[-1]]


def is_lfs(path: str) -> bool:
    """Whether the Hub would keep a file in its large file storage."""
    return path.endswith((".safetensors", ".png"))


def blob_id(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class LoopbackHub:
    """The server, running as long as its `with` block, and what tests read and set on it."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # large files by SHA-256
        self.requests: list[str] = []
        self.alive_for: int | None = None  # requests that are answered still; then every connection is cut
        self.refuse: int | None = None  # the request (counted from 1) that is answered with status 400
        self.refusal = (400, "refused by the test")  # with which it is
        self.lose: int | None = None  # the request (counted from 1) that is carried out but not answered
        self.instead: object = ...  # what every request is answered with, with status 200, as by a proxy
        self.forget = ""  # what is answered as if it were done: commit, tag or settings
        self.truncate: set[str] = set()  # names of files whose next transfer breaks off half-way
        self.other_content: dict[str, bytes] = {}  # what is sent for a file instead, of the same size
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> LoopbackHub:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a process that takes this for the Hub, with its cache in `home`."""
        ours = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TIMM_SUGAR_ORG")
        kept = {key: value for key, value in os.environ.items() if key not in ours}
        settings = {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        return kept | settings | ({"HF_TOKEN": token} if token else {})

    def visible(self, token: str | None = None) -> dict[str, Repo]:
        """Repositories that this token, or nobody in particular, can see."""
        return {name: repo for name, repo in self.repos.items() if not repo.private or token in (WRITE, READ)}


class _Handler(BaseHTTPRequestHandler):
    """Routes of the API, by method and path; each returns status, body (bytes or JSON) and headers."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(length)
        hub.requests.append(f"{self.command} {path}")
        if hub.alive_for is not None:
            hub.alive_for -= 1
            if hub.alive_for < 0:
                self.close_connection = True
                return
        if hub.instead is not ...:
            return self.answer(200, hub.instead)
        if hub.refuse is not None:
            hub.refuse -= 1
            if hub.refuse == 0:
                status, reason = hub.refusal
                return self.answer(status, {"error": reason})
        for method, pattern, route in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                answer = route(self, **match.groupdict())
                if hub.lose is not None:
                    hub.lose -= 1
                    if hub.lose == 0:
                        self.close_connection = True
                        return
                return self.answer(*answer)
        return self.answer(404, {"error": "no such route"})

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if status == 200 and (broken := {name for name in self.hub.truncate if self.path.endswith(name)}):
            self.hub.truncate -= broken
            content, self.close_connection = content[: len(content) // 2], True
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass

    # ---- what the routes share

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def json(self) -> Any:
        return json.loads(self.body)

    def denied(self) -> Answer | None:
        """The refusal of a request that writes without a token for it."""
        if self.token not in (WRITE, READ):
            return 401, {"error": "Invalid username or password."}
        return None if self.token == WRITE else (403, {"error": "the token lacks write access"})

    def find(self, repo: str) -> Repo | None:
        return self.hub.visible(self.token).get(repo)

    # ---- routes

    def whoami(self) -> Answer:
        if self.token not in (WRITE, READ):
            return 401, {"error": "Invalid user token."}
        access = {"role": "write" if self.token == WRITE else "read", "displayName": "test"}
        return 200, {"name": "tester", "orgs": [], "auth": {"type": "access_token", "accessToken": access}}

    def create(self) -> Answer:
        if denied := self.denied():
            return denied
        asked = self.json()
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repos:
            return 409, {"error": "You already created this model repo", **url}
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[name] = Repo(private)
        self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return 200, url

    def settings(self, repo: str) -> Answer:
        if denied := self.denied():
            return denied
        if self.hub.forget == "settings":
            return 200, {}
        asked = self.json()
        self.hub.repos[repo].private = asked.get("visibility") == "private" or bool(asked.get("private"))
        return 200, {}

    def info(self, repo: str, revision: str = "main") -> Answer:
        found = self.find(repo)
        if not found:
            return NO_REPO
        oid = found.resolve(revision)
        if not oid:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        siblings = [{"rfilename": path} for path in found.commits[oid]]
        return 200, {"id": repo, "sha": oid, "private": found.private, "siblings": siblings, "tags": []}

    def tree(self, repo: str, revision: str) -> Answer:
        found = self.find(repo)
        if not found:
            return NO_REPO
        files = found.commits[found.resolve(revision) or ""]
        return 200, [self.entry(path, content) for path, content in files.items()]

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
        return entry | ({"lfs": large} if is_lfs(path) else {})

    def refs(self, repo: str) -> Answer:
        found = self.find(repo)
        if not found:
            return NO_REPO
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in found.tags.items()]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": found.resolve("main")}
        return 200, {"branches": [main], "converts": [], "tags": tags}

    def tag(self, repo: str, revision: str) -> Answer:
        if denied := self.denied():
            return denied
        if self.hub.forget == "tag":
            return 409, {"error": "Tag reference exists already"}
        tags, name = self.hub.repos[repo].tags, self.json()["tag"]
        if name in tags:
            return 409, {"error": "Tag reference exists already"}
        tags[name] = self.hub.repos[repo].resolve(revision) or ""
        return 200, {}

    def preupload(self, repo: str, revision: str) -> Answer:
        if denied := self.denied():
            return denied
        answers = []
        for asked in self.json()["files"]:
            path, there = asked["path"], self.hub.repos[repo].files.get(asked["path"])
            answer = {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False}
            if there is not None:
                answer["oid"] = hashlib.sha256(there).hexdigest() if is_lfs(path) else blob_id(there)
            answers.append(answer)
        return 200, {"files": answers}

    def batch(self, repo: str) -> Answer:
        if denied := self.denied():
            return denied
        objects = []
        for asked in self.json()["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
            objects.append(asked | ({} if asked["oid"] in self.hub.blobs else {"actions": upload}))
        answer = {"transfer": "basic", "objects": objects}
        return 200, answer, {"Content-Type": "application/vnd.git-lfs+json"}

    def upload(self, oid: str) -> Answer:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return 400, {"error": "the content is not what it was announced as"}
        self.hub.blobs[oid] = self.body
        return 200, {}

    def commit(self, repo: str, revision: str) -> Answer:
        if denied := self.denied():
            return denied
        files = dict(self.hub.repos[repo].files)
        if self.hub.forget == "commit":
            return 200, {"commitOid": 40 * "0", "commitUrl": f"{self.hub.url}/{repo}/commit/0", "pullRequestUrl": None}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return 400, {"error": "unknown large file"}
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = self.hub.repos[repo].commit(files)
        return 200, {"commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "pullRequestUrl": None}

    def resolve(self, repo: str, revision: str, path: str) -> Answer:
        found = self.find(repo)
        if not found:
            return NO_REPO
        oid = found.resolve(revision)
        content = found.commits[oid or ""].get(path) if oid else None
        if content is None:
            return 404, b"", {"X-Error-Code": "EntryNotFound" if oid else "RevisionNotFound"}
        etag = hashlib.sha256(content).hexdigest() if is_lfs(path) else blob_id(content)
        content = self.hub.other_content.get(path, content)
        return (
            200,
            content,
            {"ETag": f'"{etag}"', "X-Repo-Commit": oid or "", "Content-Type": "application/octet-stream"},
        )


NO_REPO = 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
REPO, REVISION = r"(?P<repo>[^/]+/[^/]+?)", r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", lambda _: (200, {"errors": [], "warnings": []})),
    ("PUT", f"/api/models/{REPO}/settings", _Handler.settings),
    ("GET", f"/api/models/{REPO}/refs", _Handler.refs),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}", _Handler.tree),
    ("GET", f"/api/models/{REPO}/revision/{REVISION}", _Handler.info),
    ("GET", f"/api/models/{REPO}", _Handler.info),
    ("POST", f"/api/models/{REPO}/tag/{REVISION}", _Handler.tag),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", _Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", _Handler.commit),
    ("POST", f"/{REPO}[.]git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.upload),
    ("GET HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", _Handler.resolve),
]
