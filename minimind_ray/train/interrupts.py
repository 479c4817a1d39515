"""Make Ctrl-C, SIGTERM and SIGHUP end a command in the same way: by KeyboardInterrupt in the main thread.

A training run handles the first signal differently: it finishes its step, writes a checkpoint and ends. In a plain
process `first_stops` does this, on Ray `interruptible` in on_ray/session.py. A second signal ends the command at once.
A signal within ECHO_S seconds of the first is ignored, because a closed terminal and `timeout` send each signal twice.

The exit code follows the shell's convention: 128 plus the number of the signal.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO_S = 1.0
SHOW_CURSOR = b"\x1b[?25h\n"

_handlers: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
_terminals: list[int] = []
_first: list[tuple[int, float]] = []
"""The first signal since `install` and the time it came; empty if no signal has come."""


def install() -> None:
    """Let the three signals raise KeyboardInterrupt in this process's main thread.

    An ignored signal stays ignored: SIGHUP under nohup, and SIGINT in a shell's background job.
    """
    _first.clear()
    _terminals[:] = [fd for fd in (1, 2) if _is_terminal(fd)]
    _handlers.update((s, signal.SIG_IGN if signal.getsignal(s) == signal.SIG_IGN else _interrupt) for s in SIGNALS)
    reinstall()


def reinstall() -> None:
    """Install the handlers again after Ray has replaced some of them. Does nothing if `install` was not called."""
    for number, handler in _handlers.items():
        signal.signal(number, handler)


def uninstall() -> None:
    """Restore the system's handlers; Ctrl-C raises KeyboardInterrupt as in any Python program."""
    for number, handler in _handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _handlers.clear()


def exit_code(otherwise: int) -> int:
    """Return 128 plus the number of the first signal since `install`; `otherwise` if no signal has come."""
    return 128 + _first[0][0] if _first else otherwise


def exit_at_once() -> None:
    """End the command at once, without disconnecting from Ray, whose threads may still be at work.

    Ray's processes on this machine end with the command. In a process that has not called `install`, such as a
    notebook, this function does nothing and returns.
    """
    if _handlers:
        for fd in _terminals:
            os.write(fd, SHOW_CURSOR)
        os._exit(exit_code(130))


@contextmanager
def first_stops(stop: Callable[[], object]) -> Generator[None]:
    """Inside, the first signal calls `stop`. The second signal has its usual effect.

    Outside of the main thread, Python allows no change of signals: they keep their usual effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if _is_echo(number):
            return
        if asked:
            restore()
            signal.raise_signal(number)
        asked = True
        stop()

    def restore() -> None:
        for s, handler in before.items():
            signal.signal(s, handler)

    heard = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, ask) for s in heard}
    try:
        yield
    finally:
        restore()


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not _is_echo(number):
        raise KeyboardInterrupt


def _is_echo(number: int) -> bool:
    """Whether a signal is a repetition of the first one. Remembers the signal if it is the first."""
    _leave_closed_terminal()
    if not _first:
        _first.append((number, time.monotonic()))
        return False
    return time.monotonic() < _first[0][1] + ECHO_S


def _leave_closed_terminal() -> None:
    """Redirect output to the null device if its terminal was closed; writing there would raise an error."""
    for fd in _terminals:
        if not _is_terminal(fd):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, fd)
            os.close(nowhere)


def _is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False
