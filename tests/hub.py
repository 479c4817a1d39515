"""A small Hugging Face Hub on loopback that can be told to fail.

`server.put("me/model", {"config.json": b"…"})` makes a commit of `main`, and returns its id. In this process, the
fixture `hub` of tests/conftest.py sends `huggingface_hub` here; `server.environment` does so for other processes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar
from urllib.parse import unquote

Files = dict[str, bytes]


@dataclass
class Repo:
    """One repository: its commits, and the branches and tags that name them."""

    commits: dict[str, Files] = field(default_factory=dict[str, Files])
    refs: dict[str, str] = field(default_factory=dict[str, str])
    gated: bool = False
    private: bool = False
    messages: list[str] = field(default_factory=list[str])

    def commit(self, files: Files, branch: str = "main") -> str:
        """Make a commit that has exactly these files, and return its id."""
        content = repr((sorted(files.items()), len(self.commits)))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha], self.refs[branch] = dict(files), sha
        return sha


class Hub:
    """The server. `requests` are "METHOD /path".

    `status` answers every request with this status. `cut` ends each large download after half of its bytes, once for
    each file. `slow` waits so many seconds before each answer. `token` is the only one that may read or write.
    `refused` has the statuses of single requests, by a part of `METHOD /path`. `user` owns the repositories that are
    made without an owner, and `large` has the large files that were uploaded.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.status: int | None = None
        self.stopped = False
        self.cut, self.slow, self.token = False, 0.0, ""
        self.cut_already = set[str]()
        self.user, self.large, self.refused = "me", dict[str, bytes](), dict[str, int]()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """What sends another process here, with an empty cache below `home`."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}

    def put(self, name: str, content: Files | Path, kind: str = "models", branch: str = "main") -> str:
        """Make a commit of a repository that has these files, or those of a directory; return its id."""
        if isinstance(content, Path):
            files = [file for file in sorted(content.rglob("*")) if file.is_file()]
            content = {str(file.relative_to(content)): file.read_bytes() for file in files}
        return self.repos.setdefault(f"{kind}/{name}", Repo()).commit(content, branch)

    def stop(self) -> None:
        """Stop answering: connections are refused. May be called twice."""
        if not self.thread.is_alive():
            return
        self.stopped = True
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


Route = Callable[["Handler", re.Match[str]], None]


class Handler(BaseHTTPRequestHandler):
    """The routes for reading. Others may be added to `routes`: method, pattern of the path, and what answers."""

    hub: ClassVar[Hub]
    routes: ClassVar[list[tuple[str, re.Pattern[str], Route]]] = []
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        time.sleep(self.hub.slow)
        refused = (status for part, status in self.hub.refused.items() if part in f"{self.command} {path}")
        if self.hub.stopped:  # A connection that was open already: its thread outlives the server.
            self.close_connection = True
        elif status := self.hub.status or next(refused, None):
            self.refuse(status)
        # Large files are sent to an address that needs no token.
        elif (
            self.hub.token and self.command != "PUT" and self.headers.get("Authorization") != f"Bearer {self.hub.token}"
        ):
            self.refuse(401, "RepoNotFound")
        else:
            self.answer(self.command.replace("HEAD", "GET"), path)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

    def answer(self, method: str, path: str) -> None:
        for wanted, pattern, answer in self.routes:
            if wanted == method and (found := pattern.fullmatch(path)):
                answer(self, found)
                return
        self.refuse(404)

    def repo(self, kind: str | None, name: str) -> Repo | None:
        """Return the repository; answer and return None if there is none or it cannot be read."""
        repo = self.hub.repos.get(f"{kind or 'models'}/{name}")
        if repo is None:
            self.refuse(404, "RepoNotFound")
        return repo

    def files(self, repo: Repo, revision: str) -> tuple[str, Files] | None:
        """Return a revision's commit and files; answer and return None if there is no such revision."""
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            self.refuse(404, "RevisionNotFound")
            return None
        return sha, repo.commits[sha]

    def refuse(self, status: int, code: str = "", message: str = "refused by the test") -> None:
        self.reply(b"{}", status, {"X-Error-Code": code, "X-Error-Message": message} if code else {})

    def json(self, content: Any, status: int = 200) -> None:
        self.reply(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def reply(self, content: bytes, status: int = 200, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


REPO = r"(?P<name>[^/]+(?:/[^/]+)?)"


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    """Add what answers a method at paths of a pattern."""

    def add(answer: Route) -> Route:
        Handler.routes.append((method, re.compile(pattern), answer))
        return answer

    return add


@route("GET", rf"/api/(?P<kind>models|datasets)/{REPO}/tree/(?P<revision>[^/]+)/?(?P<under>.*)")
def tree(handler: Handler, found: re.Match[str]) -> None:
    repo = handler.repo(found["kind"], found["name"])
    if repo and (commit := handler.files(repo, found["revision"])):
        names = {name: content for name, content in commit[1].items() if name.startswith(found["under"])}
        handler.json([entry(name, content) for name, content in names.items()])


def entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}


@route("GET", rf"/api/(?P<kind>models|datasets)/{REPO}(?:/revision/(?P<revision>[^/]+))?")
def info(handler: Handler, found: re.Match[str]) -> None:
    repo = handler.repo(found["kind"], found["name"])
    if repo and (commit := handler.files(repo, found["revision"] or "main")):
        files = [{"rfilename": name, "size": len(content)} for name, content in commit[1].items()]
        facts = {"gated": repo.gated, "private": repo.private}
        handler.json({"id": found["name"], "sha": commit[0], **facts, "siblings": files})


@route("GET", rf"/(?:(?P<kind>datasets)/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
def resolve(handler: Handler, found: re.Match[str]) -> None:
    repo = handler.repo(found["kind"], found["name"])
    if repo and repo.gated:
        handler.refuse(403, "GatedRepo")
    elif repo and (commit := handler.files(repo, found["revision"])):
        if found["file"] in commit[1]:
            send(handler, commit[0], commit[1][found["file"]], handler.path)
        else:
            handler.refuse(404, "EntryNotFound")


def send(handler: Handler, sha: str, content: bytes, path: str) -> None:
    """Answer with a file or the part that Range asks for; cut the answer if the hub is told to."""
    headers = {
        "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": sha, "X-Linked-Size": str(len(content)),
        "Accept-Ranges": "bytes",
    }  # fmt: skip
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range") or "")
    if wanted:
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        content = content[first : last + 1]
    hub, whole = handler.hub, len(content)
    if hub.cut and handler.command == "GET" and whole > 10_000 and path not in hub.cut_already:
        hub.cut_already.add(path)
        content = content[: whole // 2]
        handler.close_connection = True
    handler.reply(content, 206 if wanted else 200, {**headers, "Content-Length": str(whole)})


@route("POST", "/api/validate-yaml")
def validate(handler: Handler, found: re.Match[str]) -> None:
    handler.json({"errors": [], "warnings": []})


@route("POST", "/api/repos/create")
def create(handler: Handler, found: re.Match[str]) -> None:
    asked = json.loads(handler.body)
    name = f"{asked['organization'] or handler.hub.user}/{asked['name']}"
    exists = f"models/{name}" in handler.hub.repos
    repo = handler.hub.repos.setdefault(f"models/{name}", Repo())
    if not exists:
        repo.private = bool(asked.get("private") or asked.get("visibility") == "private")
        repo.commit({".gitattributes": b""})
    handler.json({"url": f"{handler.hub.endpoint}/{name}"}, 409 if exists else 200)


@route("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)")
def make_branch(handler: Handler, found: re.Match[str]) -> None:
    if repo := handler.repo("models", found["name"]):
        if found["branch"] in repo.refs:
            handler.refuse(409)
        else:
            repo.refs[found["branch"]] = repo.refs["main"]
            handler.json({})


@route("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)")
def preupload(handler: Handler, found: re.Match[str]) -> None:
    files = [file["path"] for file in json.loads(handler.body)["files"]]
    modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
    handler.json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def large_files(handler: Handler, found: re.Match[str]) -> None:
    def action(file: dict[str, Any]) -> dict[str, Any]:
        return {**file, "actions": {"upload": {"href": f"{handler.hub.endpoint}/large/{file['oid']}"}}}

    handler.json({"transfer": "basic", "objects": [action(file) for file in json.loads(handler.body)["objects"]]})


@route("PUT", r"/large/(?P<oid>\w+)")
def large_file(handler: Handler, found: re.Match[str]) -> None:
    assert hashlib.sha256(handler.body).hexdigest() == found["oid"]
    handler.hub.large[found["oid"]] = handler.body
    handler.json({})


@route("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)")
def commit(handler: Handler, found: re.Match[str]) -> None:
    repo = handler.repo("models", found["name"])
    if not repo or not (before := handler.files(repo, found["revision"])):
        return
    files = dict(before[1])
    for line in map(json.loads, handler.body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = handler.hub.large[value["oid"]]
        elif line["key"] == "header":
            repo.messages.append(value["summary"])
    sha = repo.commit(files, found["revision"])
    address = f"{handler.hub.endpoint}/{found['name']}/commit/{sha}"
    handler.json({"commitUrl": address, "commitOid": sha, "success": True})
