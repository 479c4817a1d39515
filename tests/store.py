"""An S3 server on loopback (moto's) that can be told to fail."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from pyarrow import fs


class Store:
    """One bucket, `bucket`; while `failing` it answers every request with 500, while `silent` not at all.

    While `refusal` is set, an error code of S3's and a status, it refuses every request that `refuses` names.

    `requests` are method and path.
    """

    def __init__(self) -> None:
        from moto.moto_api._internal import moto_api_backend
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.failing, self.silent, self.requests = False, False, list[str]()
        self.refusal: tuple[str, str] | None = None
        self.refuses = ("GET", "HEAD", "PUT", "POST", "DELETE")
        moto_api_backend.reset()  # All servers of a process have the same buckets, an earlier test's among them.
        self.app = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self.answer, threaded=True)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server.server_port}",
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip

    def answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        self.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        while self.silent:
            time.sleep(0.05)
        if self.failing:
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        if self.refusal and environ["REQUEST_METHOD"] in self.refuses:
            code, status = self.refusal
            body = b"" if environ["REQUEST_METHOD"] == "HEAD" else f"<Error><Code>{code}</Code></Error>".encode()
            start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        return self.app(environ, start_response)

    def open(self) -> fs.FileSystem:
        """The file system; with the environment set."""
        found = fs.FileSystem.from_uri("s3://bucket?allow_bucket_creation=true")[0]
        found.create_dir("bucket")
        return found

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def names(filesystem: fs.FileSystem, folder: str) -> set[str]:
    """The files in a folder, from it on."""
    infos = filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    return {info.path.removeprefix(f"{folder}/") for info in infos if info.type == fs.FileType.File}
