"""Run a chat template in a separate process, with limits on its time and memory.

Jinja's sandbox keeps a template from reaching Python, but it does not stop a template that loops for ever or fills the
memory. The operating system does so here: the process has limited memory, and it is killed when one rendering takes too
much processor time. The next rendering starts another process. After MOST_OVERRUNS overruns the template is not
rendered any more; otherwise a template that loops on every row of a file would take hours. For the same reason the
renderings together may take only SPARE_SECONDS, and SECONDS_EACH for each of them.

The process gets only the environment variables that Python needs, and no signals from the terminal. It ends when this
process ends, because its standard input ends then.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from typing import Any

from minimind_ray.data import template_sandbox
from minimind_ray.data.template_sandbox import HEADER, MARKS_ANSWERS, OUT_OF_MEMORY, OUT_OF_TIME, TemplateError

# The arguments of `render`: messages, tools, whether to add the generation prompt.
Arguments = tuple[list[dict[str, Any]], list[Any] | None, bool]

MOST_SECONDS = 10.0  # processor time of one rendering; a conversation takes less than a millisecond
SPARE_SECONDS, SECONDS_EACH = 30.0, 0.05  # processor time of all renderings together: some, and more for each of them
MOST_MEMORY = 1 << 30  # bytes of address space; the process starts with some 30 MB. macOS does not enforce the bound.
MOST_OVERRUNS = 3
MOST_EXPECTED = 512  # renderings in one request
VARIABLES = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")


class LimitedTemplate:
    """Like `template_sandbox.Template`, but in a separate process.

    Raises:
        TemplateError: the template does not compile, or takes too much time or memory.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        self._definition = pickle.dumps((source, special_tokens))
        self._lock = threading.Lock()
        self._expected: dict[bytes, None] = {}
        self._rendered: dict[bytes, str] = {}
        self._overruns = 0
        self._budget = _Budget()
        self._process = _Process(self._budget)
        self.marks_answers = self._process.ask(self._definition) == MARKS_ANSWERS

    def expect(self, renderings: Iterable[Arguments]) -> None:
        """Announce renderings. The first call of `render` for one of them renders all in one exchange with the process.

        Only the last MOST_EXPECTED are remembered.
        """
        requests = [pickle.dumps(arguments) for arguments in islice(renderings, MOST_EXPECTED)]
        with self._lock:  # Not while iterating: `renderings` may call `render`.
            self._expected = dict.fromkeys([*self._expected, *requests][-MOST_EXPECTED:])

    def render(self, *arguments: Any) -> str:
        """Return the conversation as text. The arguments and the text are those of `Template.render`.

        Raises:
            TemplateError: the template fails on these messages or refuses them, takes too much time or memory, or has
                taken too much MOST_OVERRUNS times, or in all renderings together, before.
        """
        request = pickle.dumps(arguments)
        with self._lock:
            if self._overruns >= MOST_OVERRUNS:
                raise TemplateError(f"it took too much time or memory {MOST_OVERRUNS} times, and is not tried again")
            self._budget.check()
            if request in self._expected:
                self._render_expected()
            if request in self._rendered:
                return self._rendered.pop(request)
            self._budget.check()
            try:
                return self._usable_process().ask(request)
            except _OverrunError:
                self._overruns += 1
                raise
            except _EndedError:  # Something else ended the process, perhaps long ago. Another process may succeed.
                return self._usable_process().ask(request)

    def _render_expected(self) -> None:
        """Render all expected conversations. Leave out failed ones: `render` repeats them, to get each one's error."""
        requests = list(self._expected)
        self._expected.clear()
        answers = self._usable_process().answers(requests)
        self._rendered = {request: text for request, (succeeded, text) in zip(requests, answers) if succeeded}

    def _usable_process(self) -> _Process:
        if not self._process.is_usable:
            self._process = _Process(self._budget)
            self._process.ask(self._definition)
        return self._process


class _OverrunError(TemplateError):
    """The template takes too much time or memory."""


class _EndedError(TemplateError):
    """The process ended, but did not reach a limit."""


class _Budget:
    """The processor time that a template may take in all its renderings together."""

    def __init__(self) -> None:
        self.renderings, self.spent = 0, 0.0

    def left(self) -> float:
        """Return the number of seconds left."""
        return SPARE_SECONDS + SECONDS_EACH * self.renderings - self.spent

    def check(self) -> None:
        """Raise TemplateError if no time is left."""
        if self.left() < 0:
            raise TemplateError(f"it takes more than {SECONDS_EACH:g} s of processor time for each of many renderings")


class _Process:
    """A process that runs template_sandbox.py. `budget` counts its processor time."""

    def __init__(self, budget: _Budget) -> None:
        self._budget = budget
        python_path = os.pathsep.join(filter(None, sys.path))  # The process uses the same Jinja as this one.
        self._popen = subprocess.Popen(
            [sys.executable, "-S", "-P", template_sandbox.__file__, str(MOST_SECONDS), str(MOST_MEMORY)],
            env={name: os.environ[name] for name in VARIABLES if name in os.environ} | {"PYTHONPATH": python_path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # After Ctrl-C, this process may still have conversations to render.
        )
        self._owner = os.getpid()
        self._end = weakref.finalize(self, _end, self._popen)

    @property
    def is_usable(self) -> bool:
        """Whether the process still answers, and the current process started it (a fork of the starter did not)."""
        return self._end.alive and self._owner == os.getpid()

    def ask(self, request: bytes) -> str:
        """Return the answer to a request.

        Raises:
            TemplateError: the template fails.
            _OverrunError: the template takes too much time or memory.
            _EndedError: the process ended for another reason.
        """
        for succeeded, text in self.answers([request]):
            if succeeded:
                return text
            raise TemplateError(text)
        code = self._popen.returncode
        if code == OUT_OF_TIME:
            self._budget.check()
        if code == -signal.SIGPROF:
            raise _OverrunError(f"it takes more than {MOST_SECONDS:g} s of processor time")
        if code == OUT_OF_MEMORY:
            raise _OverrunError(f"it needs more than {MOST_MEMORY >> 20:,} MiB of memory")
        raise _EndedError(f"its process ended with exit code {code}")

    def answers(self, requests: list[bytes]) -> list[tuple[bool, str]]:
        """Return for each request whether it succeeded, and its text. There are fewer answers if the process ends."""
        assert self._popen.stdin
        answers: list[tuple[bool, str]] = []
        self._budget.renderings += len(requests)
        try:
            self._popen.stdin.write(pickle.dumps((self._budget.left(), requests)))
            self._popen.stdin.flush()
            for _ in requests:
                succeeded, seconds, size = HEADER.unpack(self._read(HEADER.size))
                self._budget.spent += seconds
                answers.append((succeeded, self._read(size).decode("utf-8", "surrogatepass")))
        except (BrokenPipeError, EOFError):
            code = self._popen.wait()
            self._budget.spent += {OUT_OF_TIME: math.inf, -signal.SIGPROF: MOST_SECONDS}.get(code, 0.0)
        finally:
            if len(answers) < len(requests):  # Also after Ctrl-C: the next request must not get old answers.
                self._end()
        return answers

    def _read(self, size: int) -> bytes:
        assert self._popen.stdout
        data = self._popen.stdout.read(size)
        if len(data) < size:
            raise EOFError
        return data


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin and process.stdout
    process.kill()
    process.wait()
    process.stdout.close()
    with suppress(BrokenPipeError):  # `close` writes the rest of an unfinished request.
        process.stdin.close()
