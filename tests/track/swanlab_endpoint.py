"""As much of a SwanLab server on loopback as a run and `swanlab sync` talk to: it keeps what it is sent."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

USER = "someone"


@dataclass
class ServedRun:
    """What the server has of one run. `scalars` are all points that were sent, as (key, step, value)."""

    creations: list[dict[str, Any]] = field(default_factory=list)
    scalars: list[tuple[str, int, float]] = field(default_factory=list)
    media: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    states: list[str] = field(default_factory=list)

    def steps(self, key: str) -> list[int]:
        return [step for name, step, _ in self.scalars if name == key]

    def summary(self) -> dict[str, Any]:
        """The last step of each curve and each text, from which a resumed run goes on."""
        scalars = {key: step for key, step, _ in sorted(self.scalars, key=lambda point: point[1])}
        media = {item["key"]: item["index"] for item in sorted(self.media, key=lambda item: item["index"])}
        return {
            "log": [],
            "scalar": [{"key": key, "step": step} for key, step in scalars.items()],
            "media": [{"key": key, "step": int(step)} for key, step in media.items()],
        }


class SwanlabEndpoint(ThreadingHTTPServer):
    """Answers on `url` until `close`. With `refuses`, it knows no key."""

    daemon_threads = True

    def __init__(self, refuses: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.refuses = refuses
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: dict[str, ServedRun] = defaultdict(ServedRun)
        self.requests: list[tuple[str, str, str]] = []
        self.uploads: list[str] = []
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A run's process hangs up when it ends."""

    def answer(self, method: str, path: str, body: str) -> tuple[int, Any]:
        given = json.loads(body) if body.startswith("{") else {}
        if path == "/api/login/api_key":
            user = {"username": USER, "name": USER}
            return (401, {}) if self.refuses else (200, {"sid": "1", "expiredAt": "2999-01-01T00:00:00.000Z",
                                                        "userInfo": user})  # fmt: skip
        if re.fullmatch(r"/api/project/[^/]+/[^/]+/experiment", path):
            run = self.runs[given["cuid"]]
            run.creations.append(given)
            found = {"cuid": given["cuid"], "slug": given["cuid"], "name": given["name"],
                     "createdAt": "2026-01-01T00:00:00Z"}  # fmt: skip
            return 201 if len(run.creations) == 1 else 200, found
        if method == "GET" and (project := re.fullmatch(r"/api/project/([^/]+)/([^/]+)", path)):
            return 200, {"cuid": "2", "name": project[2], "path": f"/{project[1]}/{project[2]}", "version": 1,
                         "visibility": "PRIVATE", "group": {"username": project[1]},
                         "_count": {"experiments": len(self.runs)}}  # fmt: skip
        if summary := re.match(r"/api/house/metrics/summaries/2/(\w+)", path):
            return 200, self.runs[summary[1]].summary()
        if path == "/api/house/metrics":
            run = self.runs[given["experimentId"]]
            if given["type"] == "scalar":
                run.scalars += [(m["key"], int(m["index"]), m["data"]) for m in given["metrics"]]
            elif given["type"] == "media":
                run.media += given["metrics"]
        elif change := re.fullmatch(r"/api/project/[^/]+/[^/]+/runs/(\w+)/(profile|state)", path):
            run = self.runs[change[1]]
            if change[2] == "state":
                run.states.append(given["state"])
            elif "config" in given:
                run.config = {key: entry["value"] for key, entry in given["config"].items()}
        elif path == "/api/resources/presigned/put":
            return 200, {"urls": [f"{self.url}/upload/{number}" for number, _ in enumerate(given["paths"])]}
        elif path.startswith("/upload/"):
            self.uploads.append(body)
        return 200, {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SwanlabEndpoint

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        self.server.requests.append((self.path, str(self.headers), body))
        status, answer = self.server.answer(self.command, self.path, body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _serve
