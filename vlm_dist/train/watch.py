"""A rank that makes no progress -> its stacks on disk and its end, so that Ray starts it again (beside the loop)."""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

EXIT_CODE = 71
_SLACK = 10  # a rank may take so many times longer than the longest of its beats so far, and than the limit at first
_FIRST = 3  # beats that may take that long: libraries are loaded, kernels compiled


class Watch:
    """Ends this process when nothing beats for too long.

    Args:
        folder: gets a file with the stacks of all threads.
        rank: of this process, for the file's name.
        limit_s: seconds without a beat; 0 watches nothing.
        say: gets a line before the end.
    """

    def __init__(self, folder: Path, rank: int, limit_s: float, say: Callable[[str], None]) -> None:
        self._folder, self._rank, self._limit, self._say = folder, rank, limit_s, say
        self._last = time.monotonic()
        self._longest = 0.0
        self._beats = 0
        self._paused = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Self:
        if self._limit:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()

    def beat(self) -> None:
        """Something was done: a micro-batch."""
        now = time.monotonic()
        if self._beats >= _FIRST:
            self._longest = max(self._longest, now - self._last)
        self._last = now
        self._beats += 1

    @contextmanager
    def paused(self) -> Generator[None]:
        """Do not look during the block: validation and slow disks are no hangs."""
        self._paused = True
        yield
        self._last = time.monotonic()
        self._paused = False

    def _look(self) -> None:
        while not self._over.wait(min(1.0, self._limit / 4)):
            limit = max(self._limit * (_SLACK if self._beats <= _FIRST else 1), _SLACK * self._longest)
            silent = time.monotonic() - self._last
            if silent > limit and not self._paused:
                self._end(silent)

    def _end(self, silent: float) -> None:
        file = self._folder / f"rank-{self._rank}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with file.open("w") as out:
                out.write(f"rank {self._rank} made no progress for {silent:.0f} s\n")
                out.flush()
                faulthandler.dump_traceback(out, all_threads=True)
            self._say(f"rank {self._rank} made no progress for {silent:.0f} s and was ended; its stacks are in {file}")
            time.sleep(1)  # the line is on its way
        finally:
            os._exit(EXIT_CODE)
