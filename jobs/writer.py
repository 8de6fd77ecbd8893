"""One thread that sends everything a run has to say to the tracking server, in order, and never in the run's way.

A server that cannot be reached costs nothing but memory: what it has not taken stays queued and is tried again.
What the server refuses (a bad request) is dropped and reported, since trying again would not change its mind.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

_LOG = logging.getLogger("vlm_dist")
_FLUSH_EVERY_S = 2.0
_RETRY_MAX_S = 10.0
_KINDS: dict[type, str] = {Metric: "metrics", Param: "params", RunTag: "tags"}
_BATCH: dict[type, int] = {Metric: 1000, Param: 100, RunTag: 100}  # the most that one request may carry


@dataclass
class _Call:
    """Something else than a metric, param or tag: an upload, a dataset."""

    name: str
    send: Callable[[], None]


@dataclass
class RunWriter:
    """Queue and sender of one run."""

    client: MlflowClient
    run_id: str
    lost: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self._queue: deque[Metric | Param | RunTag | _Call] = deque()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._give_up = math.inf
        self._reachable = True
        self._thread = threading.Thread(target=self._run, name=f"tracking-{self.run_id[:8]}", daemon=True)
        self._thread.start()

    def put(self, *items: Metric | Param | RunTag) -> None:
        """Queue values; they leave within two seconds."""
        self._queue.extend(items)

    def call(self, name: str, send: Callable[[], None]) -> None:
        """Queue an upload; it leaves after everything queued before it."""
        self._queue.append(_Call(name, send))
        self._wake.set()

    def close(self, timeout_s: float) -> list[str]:
        """Send what is left for at most `timeout_s`; return what did not arrive, in words."""
        self._give_up = time.monotonic() + timeout_s
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        left = len(self._queue)
        if left:
            self.lost.append(f"{left} values or files that {self.client.tracking_uri} did not take in time")
        return self.lost

    def _run(self) -> None:
        pause = 0.0
        while not self._closing.is_set() or (self._queue and time.monotonic() < self._give_up):
            if not self._closing.is_set():
                self._wake.wait(max(_FLUSH_EVERY_S, pause))
                self._wake.clear()
            else:
                time.sleep(min(pause, 1.0))
            while self._queue:
                if not self._send_next():
                    pause = min(2 * pause + 0.5, _RETRY_MAX_S)
                    break
                pause = 0.0

    def _send_next(self) -> bool:
        """Send the values of one kind at the head of the queue, or one call; False when it must be tried again."""
        batch = self._head()
        kind = _KINDS.get(type(batch[0]))
        what = f"{len(batch)} {kind}" if kind else batch[0].name
        try:
            if kind:
                self.client.log_batch(self.run_id, **{kind: batch}, synchronous=True)
            else:
                batch[0].send()
        except Exception as error:
            if not _is_refusal(error):
                if self._reachable:
                    _LOG.warning("tracking server out of reach, kept for later: %s", _first_line(error))
                self._reachable = False
                return False
            self.lost.append(f"{what}: {_first_line(error)}")
            _LOG.warning("tracking server refused %s: %s", what, _first_line(error))
        for _ in batch:
            self._queue.popleft()
        self._reachable = True
        return True

    def _head(self) -> list[Any]:
        """The first item of the queue with those of its kind that follow it, as many as one request may carry.

        A request may name a param or tag once only, so a second value of one waits for the next request.
        """
        kind = type(self._queue[0])
        batch: list[Any] = []
        named: set[str] = set()
        for place in range(min(len(self._queue), _BATCH.get(kind, 1))):
            item = self._queue[place]
            if type(item) is not kind or (isinstance(item, (Param, RunTag)) and item.key in named):
                break
            batch.append(item)
            if not isinstance(item, _Call):
                named.add(item.key)
        return batch


def _is_refusal(error: Exception) -> bool:
    """Whether the request itself is at fault (or a file that is not there), not the way to the server."""
    if isinstance(error, MlflowException):
        return 400 <= error.get_http_status_code() < 500 and error.get_http_status_code() not in (408, 429)
    return isinstance(error, (FileNotFoundError, IsADirectoryError, PermissionError, TypeError, ValueError))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
