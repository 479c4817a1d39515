"""Ctrl-C, SIGTERM and SIGHUP end a command in the same way: as KeyboardInterrupt in the main thread.

A run turns the first of them into a stop after its step, with a checkpoint: in a plain process by `first_stops`, on Ray
by `interruptible` in on_ray/session.py. The second one ends the command at once. Signals that follow within ECHO_S of
the first are part of it: a closed terminal and `timeout` send theirs twice. `exit_code` is that of the shell, 128 and
the signal's number.
"""

from __future__ import annotations

import os
import signal
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
"""The first signal since `install`, and when it came."""


def install() -> None:
    """Let the three signals raise KeyboardInterrupt in this process's main thread.

    A signal that is ignored stays ignored: nohup's SIGHUP, and the SIGINT of a command in a shell's background.
    """
    _first.clear()
    _terminals[:] = [fd for fd in (1, 2) if _is_terminal(fd)]
    _handlers.update((s, signal.SIG_IGN if signal.getsignal(s) == signal.SIG_IGN else _interrupt) for s in SIGNALS)
    reinstall()


def reinstall() -> None:
    """Install the handlers again, after Ray has replaced some; does nothing where `install` was not called."""
    for number, handler in _handlers.items():
        signal.signal(number, handler)


def uninstall() -> None:
    """Give the signals back to the system, except Ctrl-C, which raises KeyboardInterrupt as in any Python program."""
    for number, handler in _handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _handlers.clear()


def exit_code(otherwise: int) -> int:
    """128 and the number of the first signal that has come since `install`; `otherwise` if none has."""
    return 128 + _first[0][0] if _first else otherwise


def exit_at_once() -> None:
    """End a command without leaving Ray first, where its threads are at work; Ray's processes here end with it.

    Returns, having done nothing, in a process that has not called `install`, such as a notebook's.
    """
    if _handlers:
        for fd in _terminals:
            os.write(fd, SHOW_CURSOR)
        os._exit(exit_code(130))


@contextmanager
def first_stops(stop: Callable[[], object]) -> Generator[None]:
    """While inside, the first signal calls `stop`, and the second one has the effect that it has outside."""
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
    """Whether a signal is part of the first one, which is remembered."""
    _leave_closed_terminal()
    if not _first:
        _first.append((number, time.monotonic()))
        return False
    return time.monotonic() < _first[0][1] + ECHO_S


def _leave_closed_terminal() -> None:
    """Write to nowhere from now on where writing would be an error."""
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
