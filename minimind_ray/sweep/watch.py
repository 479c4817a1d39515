"""Show the report of a sweep in a browser of this machine, and reload the open page when the report changes.

The file report.html holds no script. The served copy gets one, which asks for the page again every two seconds.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from minimind_ray.config.errors import UserError
from minimind_ray.config.paths import input_path
from minimind_ray.data.claim import live_writer
from minimind_ray.data.storage import is_url, url_of
from minimind_ray.sweep.compare import compare
from minimind_ray.sweep.report import PAGE, write_page
from minimind_ray.sweep.trials import open_sweep, read_sweep

LOOK_S, LOOK_AT_STORE_S = 1.0, 30.0
REST = 20
"""After a look, wait at least this many times as long as the look took."""
BEHIND_S = 60.0
"""While the sweep runs, its own process rewrites the page. A page that is older than this is rewritten here."""
CHANGING = ("run.json", "metrics.jsonl", "validation.parquet")
"""The files of a trial that the page shows."""
SECURITY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
SCRIPT = """<script nonce="{nonce}">
addEventListener("load", () => {{
  const place = sessionStorage.getItem("place");
  if (place) scrollTo(0, place);
  sessionStorage.removeItem("place");
}});
setInterval(async () => {{
  const asked = {{headers: {{"If-None-Match": '{version}'}}, cache: "no-store"}};
  const answer = await fetch("/", asked).catch(() => null);
  if (!answer?.ok) return;
  sessionStorage.setItem("place", scrollY);
  location.reload();
}}, 2000);
</script>"""


class WatchedReport:
    """The report of the sweep at `where`. `look` brings `page`, the text of report.html, up to date."""

    def __init__(self, where: str | Path) -> None:
        self.where = url_of(input_path(where))
        self.page = ""
        self.read_at = 0.0
        """When the file was written that `page` was read from, in seconds since 1970."""

    def look(self) -> None:
        """Read report.html, or write it first if it is missing or too old.

        Raises:
            UserError: the directory holds no sweep or no trials yet, a file is damaged, or the store fails.
        """
        directory = open_sweep(self.where, "live")
        file = directory / PAGE
        written = file.stat().st_mtime if file.exists() else None
        patience = BEHIND_S if live_writer(directory) else 0.0
        if written is None or max(written, self.read_at) + patience < last_change(directory):
            sweep = read_sweep(self.where, "live")
            file = write_page(sweep, compare([sweep]), sweep.path)
        elif written <= self.read_at:
            return
        self.read_at = file.stat().st_mtime
        self.page = file.read_text(encoding="utf-8")

    def follow(self) -> None:
        """Look again and again, until a KeyboardInterrupt. Print each new error on stderr."""
        known = ""
        while True:
            began = time.monotonic()
            try:
                self.look()
                error = ""
            except UserError as failure:
                error = str(failure)
            if error and error != known:
                print(f"the page is not up to date: {error}", file=sys.stderr)
            known = error
            least = LOOK_AT_STORE_S if is_url(self.where) else LOOK_S
            time.sleep(max(least, REST * (time.monotonic() - began)))


def last_change(directory: Path) -> float:
    """Return when the results in a sweep's directory last changed, in seconds since 1970."""
    files = [directory / "sweep.json", *(file for name in CHANGING for file in directory.glob(f"trials/*/{name}"))]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def version_of(page: str) -> str:
    """Return the ETag of a page."""
    return f'"{hashlib.sha256(page.encode()).hexdigest()[:16]}"'


def with_script(page: str, nonce: str) -> str:
    """Return the page with the script that reloads it. Its own security policy is left out: the headers have one."""
    return SECURITY.sub(lambda _: SCRIPT.format(nonce=nonce, version=version_of(page)), page, count=1)


@contextmanager
def serving(report: WatchedReport, port: int) -> Generator[str]:
    """Inside, serve the report to this machine only. Yields the URL. With `port` 0, take a free port.

    Raises:
        UserError: the port is taken or not allowed.
    """
    try:
        server = _Server(report, port)
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else "there is no such port"
        raise UserError(f"--port {port} cannot be used: {why}; leave --port out to take a free port") from None
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="report", daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, report: WatchedReport, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.report = report


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer with the page, or that it has not changed."""
        # A page of another site cannot read the report by giving its own name this machine's address.
        if re.sub(r":\d+$", "", self.headers.get("Host") or "") not in ("127.0.0.1", "localhost"):
            self.send_error(403, "ask for 127.0.0.1 or localhost")
        elif self.path != "/":
            self.send_error(404)
        else:
            self._send_page()

    def _send_page(self) -> None:
        page, nonce = self.server.report.page, secrets.token_urlsafe(16)
        unchanged = self.headers.get("If-None-Match") == version_of(page)
        content = b"" if unchanged else with_script(page, nonce).encode()
        self.send_response(304 if unchanged else 200)
        headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Length": str(len(content)),
            "Content-Security-Policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "Cache-Control": "no-store",
            "ETag": version_of(page),
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
