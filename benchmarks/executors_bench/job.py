"""What every executor has to do: decode a video into chunks, encode a chunk, keep what came of it (videos → features).

A video's name can carry a fault, so that all executors meet the same one at the same place: after its first chunk of
frames the decoding process kills itself (`kill_once` only the first time, `kill_always` each time) or stops (`hang`).
"""

import os
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from feature_store.config import DecodeConfig
from feature_store.decode import SecondsReader
from feature_store.s3d import S3D
from feature_store.s3d_fused import FusedS3D


class Job(NamedTuple):
    """Videos, and how they are decoded and encoded; plain values, because it goes to every process."""

    videos: list[list[str]]
    """Pairs of id and path."""
    weights: str
    out: str
    size: int = 64
    fps: int = 16
    batch_seconds: int = 8
    decoders: int = 1
    encoders: int = 1
    balanced: bool = False
    """Whether an executor may move processes between decoding and encoding, where it can."""
    limit_s: float = 20.0
    """Longest silence of a decoder before it counts as hung, where the executor lets us say so."""

    @property
    def decode(self) -> DecodeConfig:
        """Frame rate and size."""
        return DecodeConfig(fps=self.fps, size=self.size)


def chunks(job: Job, path: str) -> Iterator[np.ndarray]:
    """The frames of a video, uint8 (n, fps, size, size, 3) with n <= batch_seconds; DecodeError where it is broken."""
    seconds = iter(SecondsReader(path, job.decode))
    while batch := list(islice(seconds, job.batch_seconds)):
        yield np.stack(batch)
        _fault(Path(path))


def _fault(path: Path) -> None:
    met = path.with_suffix(".met")
    if path.stem == "kill_always" or (path.stem == "kill_once" and not met.exists()):
        met.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if path.stem == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)


class Encoder:
    """S3D with one thread: uint8 (n, fps, size, size, 3) → (n, 512) float16, rows of length 1."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(1)
        model = S3D()
        model.load_state_dict(torch.load(job.weights, weights_only=True))
        self.network = FusedS3D(model)

    @torch.inference_mode()
    def __call__(self, clips: np.ndarray) -> np.ndarray:
        """Encode one batch."""
        clips = clips if clips.flags.writeable else clips.copy()  # the object store's memory is read-only
        return functional.normalize(self.network(torch.from_numpy(clips)), dim=-1).half().numpy()


def keep(job: Job, video: str, rows: list[np.ndarray]) -> None:
    """A video's features, as a file that appears whole."""
    part = Path(job.out, f"{video}.part")
    with part.open("wb") as file:
        np.save(file, np.concatenate(rows))
    part.rename(part.with_suffix(".npy"))


def refuse(job: Job, video: str, reason: str) -> None:
    """A video that gives no features, and why."""
    Path(job.out, f"{video}.reason").write_text(reason)
