"""Videos → chunks: some seconds of frames at a time, as they pass from decoding to the encoder (frames → features)."""

from collections.abc import Callable, Generator
from typing import NamedTuple

import numpy as np

from feature_store.config import DecodeConfig
from feature_store.decode import SecondsReader
from feature_store.video_source import local_video


class Chunk(NamedTuple):
    """The next seconds of a video, and how far decoding has come."""

    frames: np.ndarray
    """uint8 (n, fps, size, size, 3): n whole seconds, the video's last one padded with black frames."""
    decoded_s: float
    claimed_s: float


ReadChunks = Callable[[str], Generator[Chunk]]
"""A path → the chunks of its video: `read_chunks` in this process, `DecodePool.read` in another."""


def read_chunks(path: str, cfg: DecodeConfig, seconds: int) -> Generator[Chunk]:
    """Decode a video, a local file or an object at s3://, `seconds` at a time; holds one chunk.

    Raises:
        DecodeError: see `SecondsReader` and `local_video`; what came before it is of no use.
        StoreUnreachableError: this node's disk does not take a copy of the object.
    """
    with local_video(path) as file:
        frames, count = _empty(cfg, seconds), 0
        reader = SecondsReader(file, cfg, lambda: frames[count])
        for _ in reader:
            count += 1
            if count == seconds:
                yield Chunk(frames, reader.decoded_s, reader.claimed_s)
                frames, count = _empty(cfg, seconds), 0  # whoever has the last chunk may still be at it
        if count:
            yield Chunk(frames[:count], reader.decoded_s, reader.claimed_s)


def _empty(cfg: DecodeConfig, seconds: int) -> np.ndarray:
    return np.empty((seconds, cfg.fps, cfg.size, cfg.size, 3), np.uint8)
