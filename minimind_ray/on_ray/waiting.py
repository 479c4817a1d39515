"""A line on stderr for a sweep that waits for room on the cluster."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

from minimind_ray.config.schema import ScaleConfig

FIRST_S, AGAIN_S = 60.0, 300.0


def lacking(scale: ScaleConfig, have: Mapping[str, float], free: Mapping[str, float]) -> str | None:
    """What a trial waits for, in a sentence; None where the free CPUs and GPUs are enough for it."""
    need = {"CPU": scale.most * scale.cpus_per_worker + (scale.most > 1), "GPU": scale.most * scale.gpus_per_worker}
    if all(free.get(kind, 0) >= amount for kind, amount in need.items()):
        return None
    parts = [f"{free.get(kind, 0):g} of {have.get(kind, 0):g} {kind}s" for kind in need if need[kind]]
    return (
        f"waiting for room: a trial needs {' and '.join(f'{n:g} {kind}s' for kind, n in need.items() if n)}, and "
        f"{' and '.join(parts)} are free; other programs hold the rest (ray status). Ctrl-C stops waiting"
    )


@contextmanager
def telling(why: Callable[[], str | None], first: float = FIRST_S, again: float = AGAIN_S) -> Generator[None]:
    """While inside, print what `why` says when it has said so for `first` seconds, and then every `again` seconds."""
    ended = threading.Event()

    def look() -> None:
        due = time.monotonic() + first
        while not ended.wait(min(5.0, first)):
            reason = why()
            if reason is None:
                due = time.monotonic() + first
            elif time.monotonic() >= due:
                print(reason, file=sys.stderr)
                due = time.monotonic() + again

    thread = threading.Thread(target=look, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
