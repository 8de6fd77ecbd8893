"""Clips of several videos → one batch → tokens: the encoder of a worker, shared by its videos (frames → features)."""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
import queue
import threading
import time
from concurrent.futures import Future

import torch
from torch import Tensor

from feature_store.encode import ClipEncoder

_Asked = tuple[Tensor, "Future[Tensor]"]


class SharedEncoder:
    """A ClipEncoder for many threads: what waits together goes through the network together.

    Joining never waits: a batch is what is there when the network is free, at most `most` clips. A token may differ in
    its last bit with what else is in its batch; without `join`, each call is a batch of its own.

    Attributes:
        encoded: Clips that went through the network since the last `start_clock`.
        working_s: Seconds in which it worked.
    """

    def __init__(self, encoder: ClipEncoder, most: int, join: bool) -> None:
        self._encoder, self._most, self._join = encoder, most, join
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._held: _Asked | None = None
        self._idle_since: float | None = time.monotonic()
        self.start_clock()
        threading.Thread(target=self._work, name="encoder", daemon=True).start()

    @property
    def device(self) -> torch.device:
        """Where clips must lie."""
        return self._encoder.device

    @property
    def waiting_s(self) -> float:
        """Seconds in which the network had nothing to do since the last `start_clock`, until now."""
        since = self._idle_since
        return self._waited_s + (time.monotonic() - max(since, self._clock) if since is not None else 0.0)

    def start_clock(self) -> None:
        """Forget the times so far."""
        self._waited_s = self.working_s = 0.0
        self.encoded = 0
        self._clock = time.monotonic()

    def close(self) -> None:
        """End its thread; nobody may ask any more."""
        self._asked.put(None)

    def __call__(self, clips: Tensor, /) -> Tensor:
        """Tokens (B, F) float32 of clips, uint8 (B, T, H, W, 3), B <= most; blocks until they are made."""
        assert 0 < len(clips) <= self._most
        answer: Future[Tensor] = Future()
        self._asked.put((clips, answer))
        return answer.result()

    @torch.inference_mode()
    def _work(self) -> None:
        while batch := self._gather():
            begun = time.monotonic()
            self._waited_s, self._idle_since = self.waiting_s, None
            try:
                tokens = self._encode([clips for clips, _ in batch])
            except BaseException as error:  # whoever asked must hear of it, or would wait for ever
                for _, answer in batch:
                    answer.set_exception(error)
            else:
                self.encoded += sum(len(part) for part in tokens)
                for (_, answer), part in zip(batch, tokens, strict=True):
                    answer.set_result(part)
            self._idle_since = time.monotonic()
            self.working_s += self._idle_since - begun

    def _gather(self) -> list[_Asked]:
        """What waits, up to a batch; waits for the first. Nothing once it is closed."""
        first = self._held or self._asked.get()
        self._held = None
        batch = [first] if first else []
        count = len(first[0]) if first else self._most
        while self._join and not self._asked.empty() and count < self._most:
            more = self._asked.get()
            if more is None:
                self._asked.put(None)
                break
            if count + len(more[0]) > self._most:
                self._held = more
                break
            count += len(more[0])
            batch.append(more)
        return batch

    def _encode(self, parts: list[Tensor]) -> list[Tensor]:
        counts = [len(part) for part in parts]
        clips = parts[0] if len(parts) == 1 else torch.cat(parts)
        tokens = self._encoder(clips)
        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)  # else the work would be counted as the next batch's waiting
        return list(tokens.split(counts))
