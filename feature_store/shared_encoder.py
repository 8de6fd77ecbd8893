"""Clips of several videos → one batch → tokens: the encoder of a worker, shared by its videos (frames → features)."""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
import queue
import threading
import time
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from feature_store.encode import ClipEncoder

_Asked = tuple[Tensor, "Future[Tensor]"]


class _Batch(NamedTuple):
    """What was given to the network together."""

    asked: list[_Asked]
    tokens: Tensor
    """In host memory; from a GPU, they are there once it has come to its end."""
    begun_s: float
    """By the monotonic clock."""
    marks: "tuple[torch.cuda.Event, ...] | None"
    """The GPU's own marks of its beginning and its end."""


class SharedEncoder:
    """A ClipEncoder for many threads: what waits together goes through the network together.

    Joining never waits: a batch is what is there when the network is free, at most `most` clips. A token may differ in
    its last bit with what else is in its batch; without `join`, each call is a batch of its own. Clips come from host
    memory and go to a GPU while the batch before is in work there; tokens come back to host memory.

    Attributes:
        encoded: Clips that went through the network since the last `start_clock`.
        working_s: Seconds in which it worked; on a GPU, by the GPU's clock.
    """

    device = torch.device("cpu")

    def __init__(self, encoder: ClipEncoder, most: int, join: bool) -> None:
        self._encoder, self._most, self._join = encoder, most, join
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._held: _Asked | None = None
        self._closed = False
        self._copies = torch.cuda.Stream(encoder.device) if encoder.device.type == "cuda" else None
        self._busy_since: float | None = None
        self.start_clock()
        threading.Thread(target=self._work, name="encoder", daemon=True).start()

    @property
    def waiting_s(self) -> float:
        """Seconds in which the network had nothing to do since the last `start_clock`, until now."""
        busy_since = self._busy_since
        until = time.monotonic() if busy_since is None else max(busy_since, self._clock)
        return max(0.0, until - self._clock - self.working_s)

    def start_clock(self) -> None:
        """Forget the times so far."""
        self.working_s = 0.0
        self.encoded = 0
        self._clock = time.monotonic()

    def close(self) -> None:
        """End its thread; nobody may ask any more."""
        self._asked.put(None)

    def __call__(self, clips: Tensor, /) -> Tensor:
        """Tokens (B, F) float32 of clips, uint8 (B, T, H, W, 3), B <= most; blocks until they are made."""
        assert 0 < len(clips) <= self._most
        answer: Future[Tensor] = Future()
        self._asked.put((self._moved(clips), answer))
        return answer.result()

    def _moved(self, clips: Tensor) -> Tensor:
        """To where the network is; pageable memory would go at a fifth of the speed, one copy at a time."""
        if self._copies is None:
            return clips
        with torch.cuda.stream(self._copies):
            clips = clips.pin_memory().to(self._encoder.device, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # decoders want the cores that waiting threads would spin on
            done.record(self._copies)
        done.synchronize()
        return clips

    @torch.inference_mode()
    def _work(self) -> None:
        """Batch after batch; a GPU is given the next one before the last is finished."""
        flying: _Batch | None = None
        while True:
            asked = self._gather(wait=flying is None)
            if not asked and not flying:
                return
            begun = self._begin(asked) if asked else None
            if flying:
                self._finish(flying)
            if begun and begun.marks is None:
                self._finish(begun)
                begun = None
            flying = begun
            self._busy_since = flying.begun_s if flying else None

    def _gather(self, wait: bool) -> list[_Asked]:
        """What waits, up to a batch; nothing where none does, or once all is closed."""
        batch: list[_Asked] = []
        count = 0
        while not self._closed:
            if (batch and not self._join) or (not self._more() and (batch or not wait)):
                break
            asked = self._held or self._asked.get()
            self._held = None
            if asked is None:
                self._closed = True
            elif count + len(asked[0]) > self._most:
                self._held = asked
                break
            else:
                count += len(asked[0])
                batch.append(asked)
        return batch

    def _more(self) -> bool:
        return self._held is not None or not self._asked.empty()

    def _begin(self, asked: list[_Asked]) -> _Batch | None:
        """Give a batch to the network; a GPU goes on with it while this returns."""
        parts = [clips for clips, _ in asked]
        begun_s = time.monotonic()
        if self._busy_since is None:
            self._busy_since = begun_s
        try:
            if self._copies is None:
                return _Batch(asked, self._encoder(_joined(parts)), begun_s, None)
            marks = tuple(torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
            marks[0].record()
            made = self._encoder(_joined(parts))
            tokens = torch.empty(made.shape, pin_memory=True)
            tokens.copy_(made, non_blocking=True)  # before the next batch, which it would else wait for
            marks[1].record()
            return _Batch(asked, tokens, begun_s, marks)
        except BaseException as error:  # whoever asked must hear of it, or would wait for ever
            _fail(asked, error)
            return None

    def _finish(self, batch: _Batch) -> None:
        """Wait for a batch's end, and give everyone their own."""
        try:
            if batch.marks is None:
                took_s = time.monotonic() - batch.begun_s
            else:
                batch.marks[1].synchronize()
                took_s = batch.marks[0].elapsed_time(batch.marks[1]) / 1e3
            parts = batch.tokens.split([len(clips) for clips, _ in batch.asked])
        except BaseException as error:
            _fail(batch.asked, error)
            return
        self.working_s += took_s
        self.encoded += len(batch.tokens)
        for (_, answer), part in zip(batch.asked, parts, strict=True):
            answer.set_result(part)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _fail(asked: list[_Asked], error: BaseException) -> None:
    for _, answer in asked:
        answer.set_exception(error)
