"""Keep a signal that is meant for a command away from the Ray that the command has started.

Ray starts its processes in the command's process group, where a closed terminal, or `kill -TERM -GROUP`, would end them
before a run has written its checkpoint. And Ray replaces the command's handler of SIGTERM: by one in Python, and by one
that dumps the stack of every thread.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial

from ray._private import services, utils

from minimind_ray.train import interrupts


@contextmanager
def own_signals() -> Generator[None]:
    """While inside, Ray starts its processes in sessions of their own; afterwards signals do what they did before.

    The processes still end when the command does, however it ends: Ray has asked the kernel for it.
    """
    before = utils.set_sigterm_handler, services.ConsolePopen
    utils.set_sigterm_handler = lambda sigterm_handler: None
    services.ConsolePopen = partial(services.ConsolePopen, start_new_session=True)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        utils.set_sigterm_handler, services.ConsolePopen = before
        interrupts.reinstall()
