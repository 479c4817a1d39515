"""The process in which one run talks to SwanLab. swanlab.py starts it.

SwanLab allows one run per process, and changes how the process handles Ctrl-C and exceptions. So each tracked run has a
process of its own, and runs that are trained together in one process stay apart.

The first line on standard input opens the run; each further line is a request; the last line finishes the run. Lines
are JSON. Standard output answers the first and the last line, or says which error ended the process. If the input ends
too early, the run has crashed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO, cast

OFF = ("hardware", "runtime", "requirements", "conda", "git", "swanlab", "monitor")
STATES = {"failed": "crashed", "running": "aborted", "stopped": "aborted"}
"""SwanLab's names of the states of a run that did not succeed."""


def main() -> None:
    """Serve one run; see the module's text."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # SwanLab's greetings.
    try:
        _serve(answers)
    except Exception as error:
        _answer(answers, {"error": " ".join(str(error).split()) or type(error).__name__})


def _serve(answers: TextIO) -> None:
    run, answer = _open(json.loads(sys.stdin.readline()))
    _answer(answers, answer)
    if run is None:
        return
    for line in sys.stdin:
        request = json.loads(line)
        if state := request.get("finish"):
            run.finish(STATES.get(state, "success"), error=request["error"])
            _answer(answers, {})
            return
        _handle(run, request)
    run.finish("crashed", error="the process that trained this run has ended")


def _answer(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _open(opening: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Open the run. Return it with the answer: its mode and, online, its URL. The run is None if none is opened."""
    import swanlab

    settings = swanlab.Settings()
    has_key, asked = settings.api_key is not None, opening["mode"]
    if asked == "auto":
        asked = {"disabled": "off", "offline": "offline", "local": "offline"}.get(settings.mode)
        asked = asked or ("online" if has_key else "offline")
    if asked == "off" or asked == "online" and not has_key or opening.get("only_check"):
        return None, {"mode": asked, "has_key": has_key}
    run = swanlab.init(
        **opening["run"],
        mode=cast("Any", asked),
        resume="allow",
        settings=swanlab.Settings.model_validate(
            {
                "interactive": False,
                "probe": dict.fromkeys(OFF, False),
                "terminal": {"proxy_type": "none"},
                "run": {"dir": f"{asked}-{opening['run']['id']}"},
            }
        ),
    )
    return run, {"mode": asked, "url": run.url if asked == "online" else None}


def _handle(run: Any, request: dict[str, Any]) -> None:
    import swanlab

    if facts := request.get("config"):
        run.config.update(facts)
        return
    data: dict[str, Any] = dict(request.get("numbers", {}))
    for name, texts in request.get("texts", {}).items():
        data[name] = [swanlab.Text(text, caption=f"{name} {number}") for number, text in enumerate(texts, start=1)]
    if table := request.get("table"):
        data[table["name"]] = swanlab.echarts.Table().add(table["columns"], table["rows"])
    if page := request.get("page"):
        data[page["name"]] = swanlab.Html(Path(page["path"]))
    run.log(data, step=request["step"])
