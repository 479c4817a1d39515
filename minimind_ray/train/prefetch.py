"""Prepare the next step's batches in another thread, so that a GPU does not wait for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the same items, but make each item in another thread while the caller uses the item before.

    A caller that stops early does not wait for the item that is being made.
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
