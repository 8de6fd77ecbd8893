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
        waiting_s: Seconds in which the network had nothing to do, since the last `start_clock`.
        working_s: Seconds in which it worked.
    """

    def __init__(self, encoder: ClipEncoder, most: int, join: bool) -> None:
        self._encoder, self._most, self._join = encoder, most, join
        self._asked: queue.SimpleQueue[_Asked] = queue.SimpleQueue()
        self._held: _Asked | None = None
        self.start_clock()
        threading.Thread(target=self._work, name="encoder", daemon=True).start()

    @property
    def device(self) -> torch.device:
        """Where clips must lie."""
        return self._encoder.device

    def start_clock(self) -> None:
        """Forget the times so far."""
        self.waiting_s = self.working_s = 0.0
        self._clock = time.monotonic()

    def __call__(self, clips: Tensor, /) -> Tensor:
        """Tokens (B, F) float32 of clips, uint8 (B, T, H, W, 3), B <= most; blocks until they are made."""
        assert 0 < len(clips) <= self._most
        answer: Future[Tensor] = Future()
        self._asked.put((clips, answer))
        return answer.result()

    @torch.inference_mode()
    def _work(self) -> None:
        while True:
            before = time.monotonic()
            batch = self._gather()
            begun = time.monotonic()
            try:
                tokens = self._encode([clips for clips, _ in batch])
            except BaseException as error:  # whoever asked must hear of it, or would wait for ever
                for _, answer in batch:
                    answer.set_exception(error)
            else:
                for (clips, answer), part in zip(batch, tokens, strict=True):
                    assert len(part) == len(clips)
                    answer.set_result(part)
            self.waiting_s += max(0.0, begun - max(before, self._clock))
            self.working_s += time.monotonic() - begun

    def _gather(self) -> list[_Asked]:
        batch = [self._held or self._asked.get()]
        self._held = None
        count = len(batch[0][0])
        while self._join and not self._asked.empty():
            more = self._asked.get()
            count += len(more[0])
            if count > self._most:
                self._held = more
                break
            batch.append(more)
        return batch

    def _encode(self, parts: list[Tensor]) -> list[Tensor]:
        counts = [len(part) for part in parts]
        clips = parts[0] if len(parts) == 1 else torch.cat(parts)
        tokens = self._encoder(clips)
        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)  # else the work would be counted as the next batch's waiting
        return list(tokens.split(counts))
