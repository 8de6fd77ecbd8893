"""Plain Ray actors: decoders whose streaming generators give chunks of frames, an encoder with a thread per stream
(videos → features).

A decoder works at one video at a time and its stream belongs to one thread of the encoder, so a decoder that dies or
is silent for too long is known by its video. Ray holds a generator back that is two chunks ahead.
"""

from collections.abc import Iterator
from queue import Queue
from threading import Lock
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from executors_bench.job import Encoder, Job, chunks, keep, refuse
from feature_store.decode import DecodeError

ATTEMPTS = 2
AHEAD = 2  # streams of one decoder: while the end of one video is encoded, the next one begins


class Decoder:
    """Decodes one video at a time."""

    def chunks(self, job: Job, path: str) -> Iterator[np.ndarray | None]:
        """None as soon as the video is begun, then its frames."""
        yield None
        yield from chunks(job, path)


class Streams:
    """The network, and a thread for each stream that it takes from its decoders."""

    def __init__(self, job: Job) -> None:
        self.job, self.encode, self.lock = job, Encoder(job), Lock()
        self.decoders = [self._decoder() for _ in range(job.decoders)]
        self.idle: Queue[int] = Queue()
        for _ in range(AHEAD):
            for number in range(job.decoders):
                self.idle.put(number)

    def extract(self, video: str, path: str) -> None:
        """One video, to its file; one that takes its decoder down, or silences it, is named."""
        reason, deaths = "", 0
        while deaths < ATTEMPTS:
            number = self.idle.get()
            stream = _Stream(self.decoders[number], self.job, path)
            try:
                keep(self.job, video, [self._rows(part) for part in stream])
                return
            except RayTaskError as error:
                if not isinstance(error.cause, DecodeError):
                    raise
                refuse(self.job, video, error.cause.reason)
                return
            except TimeoutError:
                reason, deaths = "timeout", ATTEMPTS
                self._replace(number, stream.decoder)
            except (ActorDiedError, ActorUnavailableError):
                reason, deaths = "decoder_crash", deaths + stream.begun
                self._replace(number, stream.decoder)
            finally:
                self.idle.put(number)
        refuse(self.job, video, reason)

    def _rows(self, part: np.ndarray) -> np.ndarray:
        with self.lock:
            return self.encode(part)

    def _replace(self, number: int, dead: Any) -> None:
        with self.lock:
            if self.decoders[number] is dead:  # the other stream of this decoder has not been here yet
                ray.kill(dead)
                self.decoders[number] = self._decoder()

    def _decoder(self) -> Any:
        return ray.remote(num_cpus=1 / self.job.decoders)(Decoder).remote()


class _Stream:
    """The chunks of one video; TimeoutError when the decoder is silent for longer than the limit."""

    def __init__(self, decoder: Any, job: Job, path: str) -> None:
        self.decoder, self.limit_s, self.begun = decoder, job.limit_s, False
        method = decoder.chunks.options(num_returns="streaming", _generator_backpressure_num_objects=2)
        self.refs: Any = method.remote(job, path)

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            ready, _ = ray.wait([self.refs], timeout=self.limit_s if self.begun else None)
            if not ready:
                raise TimeoutError
            try:
                part: Any = ray.get(next(self.refs))
            except StopIteration:
                return
            if self.begun:
                yield part
            self.begun = True


def run(job: Job) -> None:
    """Give every video to an encoder; its threads take them in turn."""
    threads = AHEAD * job.decoders
    made: Any = ray.remote(num_cpus=1)(Streams)
    streams = [made.options(max_concurrency=threads).remote(job) for _ in range(job.encoders)]
    ray.get([streams[k % len(streams)].extract.remote(*video) for k, video in enumerate(job.videos)])
