"""Positions in the data -> batches of an update, loaded ahead in a thread (between clips and the training loop)."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

_AHEAD = 2


class Feed:
    """Loads the next updates' batches while one trains.

    Args:
        load: position -> this rank's batches; called in one thread, in order.
        end: positions from here on are not loaded ahead.
    """

    def __init__(self, load: Callable[[int], list[Any]], end: int) -> None:
        self._load = load
        self._end = end
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._coming: dict[int, Future[list[Any]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, position: int, then: Callable[[int], int]) -> tuple[list[Any], float]:
        """The batches of a position, and the seconds that they were waited for.

        Args:
            position: of the update.
            then: gives the position of the update that many updates later, where windows of the data are left out.
        """
        wanted = [position, *(then(k) for k in range(1, _AHEAD + 1))]
        for other in self._coming.keys() - set(wanted):
            self._coming.pop(other).cancel()
        for one in wanted:
            if one not in self._coming and (one == position or one < self._end):
                self._coming[one] = self._thread.submit(self._load, one)
        began = time.perf_counter()
        return self._coming.pop(position).result(), time.perf_counter() - began
