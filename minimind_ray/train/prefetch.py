"""Work of a training step that is done in another thread, before the step needs it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the same items; make each one in another thread while the item before is in use.

    A GPU then does not wait for its next batches. A caller that stops early does not wait for the item under way.
    """

    def begin() -> Future[T | None]:
        coming = Future[T | None]()

        def make() -> None:
            try:
                coming.set_result(next(items, None))
            except BaseException as error:
                coming.set_exception(error)

        threading.Thread(target=make, name="ahead", daemon=True).start()
        return coming

    coming = begin()
    while (item := coming.result()) is not None:
        coming = begin()
        yield item
