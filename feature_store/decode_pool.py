"""Videos → chunks in processes of their own, so that a video can take down or hang no more than its decoder.

A decoder is a Ray actor on its worker's node whose method is a stream: Ray lets it run two chunks ahead of the encoder
and no further, so that the object store holds a bounded number of chunks whatever the videos are.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import queue
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from feature_store.chunks import Chunk, read_chunks
from feature_store.config import DecodeConfig
from feature_store.decode import DecodeError
from vlm_dist.errors import ExtractionError, VlmDistError

AHEAD = 2  # chunks that a decoder may be ahead of the encoder
HANG_GRACE_S = 60.0  # beyond a video's own time limit, which the decoder checks after every frame
_START_DEATHS = 5  # decoders in a row that die before they have opened a video: it is not the videos


class DecoderLostError(Exception):
    """A decoder died in the middle of a video."""


class NoDecoderError(ExtractionError):
    """Decoders die before they open any video, so that nothing can be extracted on this node."""


class Decoder:
    """Decodes one video after another; the Ray actor."""

    def __init__(self, cfg: DecodeConfig, seconds: int) -> None:
        self.cfg, self.seconds = cfg, seconds

    def read(self, path: str) -> Iterator[Chunk | VlmDistError | None]:
        """None once it is about to open the video, then its chunks, and an error at the end where it is broken."""
        yield None
        try:
            yield from read_chunks(path, self.cfg, self.seconds)
        except VlmDistError as error:
            yield error


class DecodePool:
    """The decoders of one worker. As many threads may read at once as it has decoders; further ones wait."""

    def __init__(self, size: int, cfg: DecodeConfig, seconds: int) -> None:
        self.size = size
        self._cfg, self._seconds = cfg, seconds
        self._hang_s = cfg.timeout_s + HANG_GRACE_S
        here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Its worker has asked for the cores of both.
        self._actor: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(Decoder)
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(size):
            self._free.put(self._start())

    def read(self, path: str) -> Generator[Chunk]:
        """The chunks of a video; the same as `read_chunks`, from another process.

        Raises:
            DecodeError: the video is broken, or its decoder hung (reason `timeout`).
            StoreUnreachableError: see `read_chunks`.
            DecoderLostError: its decoder died; another may try.
            NoDecoderError: decoders die before they open any video.
        """
        decoder = self._free.get()
        whole, deaths = False, 0
        try:
            while True:
                chunks = decoder.read.options(
                    num_returns="streaming", _generator_backpressure_num_objects=AHEAD
                ).remote(path)
                try:
                    self._next(chunks, path)
                    break
                except DecoderLostError as error:
                    deaths += 1
                    if deaths == _START_DEATHS:
                        raise NoDecoderError(f"{deaths} decoders died before they opened a video: {error}") from error
                    time.sleep(deaths)  # the node may be short of memory for a moment
                    decoder = self._start()
            while (item := self._next(chunks, path)) is not None:
                if isinstance(item, VlmDistError):
                    whole = True
                    raise item
                yield item
            whole = True
        finally:
            try:
                if not whole:  # dead, hung, or at a video that is not wanted to its end
                    with suppress(Exception):
                        ray.kill(decoder)
                    decoder = self._start()
            finally:
                self._free.put(decoder)  # even a dead one: a reader that waits for it would wait for ever

    def _next(self, chunks: Any, path: str) -> Chunk | VlmDistError | None:
        """What comes next, or None at the end (and first, when the video is about to be opened)."""
        ready, _ = ray.wait([chunks], timeout=self._hang_s, fetch_local=True)
        if not ready:
            raise DecodeError(f"{path}: the decoder hung", "timeout")
        try:
            item: Any = ray.get(next(chunks))
            return item
        except StopIteration:
            return None
        except RayTaskError:
            raise  # an error of ours
        except RayError as error:  # an actor that died, or that Ray killed because its node was out of memory
            raise DecoderLostError(str(error)) from error

    def _start(self) -> Any:
        return self._actor.remote(self._cfg, self._seconds)
