"""`report SWEEP --watch`: what is served, to whom, and when it changes."""

from __future__ import annotations

import http.client
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.sweep import watch
from minimind_ray.sweep.watch import WatchedReport, serving
from tests.sweep.synthetic import make_sweep

pytestmark = [pytest.mark.unit, pytest.mark.slow]


@pytest.fixture
def report(tmp_path: Path) -> WatchedReport:
    report = WatchedReport(make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.3"}, seeds=1, steps=10, examples=40))
    report.look()
    return report


@pytest.fixture
def port(report: WatchedReport) -> Iterator[int]:
    with serving(report, 0) as url:
        yield int(url.rstrip("/").rpartition(":")[2])


def get(port: int, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode()


def test_the_page_is_served_with_one_script_and_asked_for_again(report: WatchedReport, port: int) -> None:
    status, headers, text = get(port)
    assert status == 200
    [nonce] = re.findall(r'<script nonce="([\w-]+)">', text)
    assert f"script-src 'nonce-{nonce}'" in headers["Content-Security-Policy"]
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "http-equiv" not in text and text.count("<script") == 1 and f"'{headers['ETag']}'" in text
    assert "<script" not in report.page and "script" not in (Path(report.where) / "report.html").read_text()
    assert get(port, If_None_Match=headers["ETag"])[::2] == (304, "")
    report.page += "<p>new</p>"
    assert get(port, If_None_Match=headers["ETag"])[0] == 200


def test_only_this_machine_gets_only_the_page(port: int) -> None:
    assert [get(port, path)[0] for path in ("/report.png", "/?x", "/../sweep.json")] == [404] * 3
    strangers = ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "")
    assert [get(port, Host=host)[0] for host in strangers] == [403] * 4
    assert [get(port, Host=host)[0] for host in ("localhost", "localhost:1", "127.0.0.1")] == [200] * 3
    assert [get(port, method=method)[0] for method in ("POST", "PUT", "DELETE", "HEAD")] == [501] * 4
    with pytest.raises(UserError, match=f"--port {port} cannot be used"), serving(WatchedReport("s"), port):
        pass
    with pytest.raises(UserError, match="no such port"), serving(WatchedReport("s"), 70000):
        pass


def test_a_page_that_is_behind_is_rewritten(report: WatchedReport, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once if no process runs the sweep. Otherwise the sweep's process has a minute to do so."""
    sweep = Path(report.where)
    page, trial = sweep / "report.html", next(sweep.glob("trials/*/run.json"))

    def changed(seconds: float) -> str:
        """What is shown after a result that is so much newer than the page."""
        page.write_text("the sweep's own page")
        written, report.read_at = time.time() + 1000, 0
        os.utime(page, (written, written))
        os.utime(trial, (written + seconds, written + seconds))
        report.look()
        return report.page

    assert changed(-1) == "the sweep's own page"
    assert changed(1).startswith("<!doctype html>")
    monkeypatch.setattr(watch, "live_writer", lambda directory: True)
    assert changed(50) == "the sweep's own page"
    assert changed(70).startswith("<!doctype html>")
