"""As much of a W&B server on loopback as a run and `wandb sync` talk to: it keeps what it is sent."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class ServedRun:
    """What the server has of one run."""

    upserts: list[dict[str, Any]] = field(default_factory=list)
    history: dict[int, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(self.history[line]) for line in sorted(self.history)]

    @property
    def config(self) -> dict[str, Any]:
        configs = [json.loads(u["config"]) for u in self.upserts if u.get("config")]
        return {key: value["value"] for key, value in configs[-1].items()}


class Endpoint(ThreadingHTTPServer):
    """Answers on `url` until `close`.

    `status` is what every answer to /graphql says. With `stopped`, somebody has pressed stop in the web page.
    """

    daemon_threads = True
    entity = "someone"

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self.stopped = False
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: dict[str, ServedRun] = defaultdict(ServedRun)
        self.requests: list[tuple[str, str, str]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.used: list[str] = []
        self.views: list[dict[str, Any]] = []
        self.alerts: list[dict[str, Any]] = []
        self.uploads: dict[str, str] = {}
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """wandb-core hangs up on its connections when it ends."""

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        match operation:
            case "Viewer":
                return {"viewer": {"id": "1", "entity": self.entity, "username": self.entity, "flags": "{}",
                                   "teams": {"edges": []}}}  # fmt: skip
            case "RunResumeStatus":
                project = {"id": "2", "name": given["project"], "entity": {"id": "1", "name": self.entity}}
                return {"model": {**project, "bucket": self._bucket(given["name"])}}
            case "UpsertBucket":
                self.runs[given["name"]].upserts.append(given)
                project = {"id": "2", "name": given["project"], "entity": {"id": "1", "name": self.entity}}
                bucket = {"id": "3", "name": given["name"], "displayName": given["displayName"], "description": "",
                          "config": "{}", "sweepName": None, "project": project,
                          "historyLineCount": len(self.runs[given["name"]].history)}  # fmt: skip
                return {"upsertBucket": {"bucket": bucket, "inserted": len(self.runs[given["name"]].upserts) == 1}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
                return {"createRunFiles": {"runID": "3", "uploadHeaders": [], "files": files}}
            case "ArtifactType":
                return {"project": {"artifact": None}}
            case "CreateArtifact":
                self.artifacts.append(given["input"])
                artifact = {"id": given["input"]["artifactCollectionName"], "state": "PENDING",
                            "artifactSequence": {"latestArtifact": None}}  # fmt: skip
                return {"createArtifact": {"artifact": artifact}}
            case "CreateArtifactManifest":
                file = {
                    "id": "4",
                    "uploadUrl": f"{self.url}/upload/{given['artifactID']}/manifest",
                    "uploadHeaders": [],
                }
                return {"createArtifactManifest": {"artifactManifest": {"id": given["artifactID"], "file": file}}}
            case "CreateArtifactFiles":
                files = [
                    {"storagePath": "", "uploadUrl": f"{self.url}/upload/{f['artifactID']}/{f['name']}",
                     "uploadHeaders": [], "uploadMultipartUrls": None, "artifact": {"id": f["artifactID"]}}
                    for f in given["input"]["artifactFiles"]
                ]  # fmt: skip
                return {"createArtifactFiles": {"files": {"edges": [{"node": file} for file in files]}}}
            case "CommitArtifact":
                return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": ""}}}
            case "ArtifactByID":
                entity = {"id": "1", "name": self.entity}
                project = {"id": "2", "internalId": "2", "name": "minimind-ray", "entity": entity}
                name, kind = next((a["artifactCollectionName"], a["artifactTypeName"]) for a in self.artifacts
                                  if a["artifactCollectionName"] == given["id"])  # fmt: skip
                sequence = {"__typename": "ArtifactSequence", "id": name, "name": name, "project": project}
                artifact = {
                    "__typename": "Artifact", "id": name, "artifactSequence": sequence, "versionIndex": 0,
                    "artifactType": {"name": kind}, "description": None, "metadata": "{}", "ttlDurationSeconds": -2,
                    "ttlIsInherited": True, "tags": [], "historyStep": None, "state": "COMMITTED", "size": 0,
                    "digest": "", "commitHash": None, "fileCount": 1, "createdAt": "2026-01-01T00:00:00Z",
                    "updatedAt": None, "aliases": [],
                }  # fmt: skip
                return {"artifact": artifact}
            case "UseArtifact":
                self.used.append(given["input"]["artifactID"] if "input" in given else given["artifactID"])
                return {"useArtifact": {"artifact": {"id": "4"}}}
            case "NotifyScriptableRunAlert":
                self.alerts.append(given)
                return {"notifyScriptableRunAlert": {"success": True}}
            case "UpsertView2":
                self.views.append(given)
                return {"upsertView": {"view": {"id": "5", "name": given["name"]}, "inserted": True}}
            case _:
                return {}

    def _bucket(self, name: str) -> dict[str, Any] | None:
        if name not in self.runs:
            return None
        run = self.runs[name]
        tail = [run.history[line] for line in sorted(run.history)][-1:]
        return {
            "id": "3", "name": name, "displayName": name, "summaryMetrics": json.dumps(run.summary), "config": "{}",
            "tags": [], "notes": None, "wandbConfig": '{"t": 1}', "logLineCount": 0, "eventsLineCount": 0,
            "historyLineCount": len(run.history), "historyTail": json.dumps(tail), "eventsTail": "[]",
        }  # fmt: skip

    def stream(self, run: ServedRun, body: dict[str, Any]) -> None:
        """Take a part of a run's files, as lines from an offset on."""
        files = body.get("files") or {}
        if history := files.get("wandb-history.jsonl"):
            run.history |= dict(enumerate(history["content"], start=history["offset"]))
        if summary := files.get("wandb-summary.json"):
            run.summary = json.loads(summary["content"][-1])
        if body.get("complete"):
            run.exit_code = body["exitcode"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            request = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            assert operation
            answer = {"data": self.server.answer(operation[1], request.get("variables") or {})}
            self._send(self.server.status, answer if self.server.status == 200 else {"errors": [{"message": "no"}]})
        elif stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self.server.stream(self.server.runs[stream[1]], json.loads(body))
            self._send(200, {"stopped": self.server.stopped})
        else:
            self._send(404, {})

    def do_PUT(self) -> None:
        self.server.uploads[self.path.removeprefix("/upload/")] = self._body()
        self._send(200, {})

    def _body(self) -> str:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        self.server.requests.append((self.path, str(self.headers), body))
        return body

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
