"""Ctrl-C, SIGTERM and SIGHUP do the same, and what is ignored stays ignored."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from minimind_ray.train import interrupts
from minimind_ray.train.context import PlainContext

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    before = {s: signal.getsignal(s) for s in interrupts.SIGNALS}
    for s in interrupts.SIGNALS:
        signal.signal(s, signal.default_int_handler if s == signal.SIGINT else signal.SIG_DFL)
    interrupts.install()
    yield
    interrupts.uninstall()
    interrupts.install()
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.mark.parametrize("sent", interrupts.SIGNALS)
def test_the_first_signal_asks_and_the_second_one_interrupts(
    sent: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = PlainContext()
    assert interrupts.exit_code(1) == 1
    with pytest.raises(KeyboardInterrupt), context.stop_on_interrupt():
        os.kill(os.getpid(), sent)
        assert context.should_stop()
        os.kill(os.getpid(), sent)
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(interrupts, "ECHO_S", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
    assert interrupts.exit_code(1) == 128 + sent
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), sent)


def test_what_is_ignored_stays_ignored_though_another_handler_was_installed() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupts.install()
    with (context := PlainContext()).stop_on_interrupt():
        os.kill(os.getpid(), signal.SIGHUP)
        assert not context.should_stop()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    interrupts.reinstall()
    os.kill(os.getpid(), signal.SIGHUP)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert interrupts.exit_code(130) == 143


def test_another_thread_leaves_signals_alone() -> None:
    outcomes: list[object] = []

    def work() -> None:
        with PlainContext().stop_on_interrupt():
            outcomes.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcomes == [before]
