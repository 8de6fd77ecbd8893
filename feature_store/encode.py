"""Videos → tokens: THE one way from a file to features, used for the corpus and for a single video alike."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from feature_store.chunks import Chunk, ReadChunks, read_chunks
from feature_store.config import DecodeConfig, ExtractConfig
from feature_store.decode import DecodeError, SecondsReader
from feature_store.s3d import S3D
from feature_store.s3d_fused import FusedS3D
from feature_store.video_source import local_video
from vlm_dist.errors import ConfigError, ExtractionError

CALIBRATION_CLIPS = 48
_CLIPS_PER_VIDEO = 3
_SECONDS_APART = 4
_SHOWN = 3  # unreadable videos that an error names


class ClipEncoder(Protocol):
    """What turns clips into tokens; S3D is the one that is here."""

    @property
    def device(self) -> torch.device:
        """Where clips must lie."""
        ...

    def __call__(self, clips: Tensor, /) -> Tensor:
        """Tokens (B, F) float32 of clips, uint8 (B, T, H, W, 3): one second each; not normalised."""
        ...


class Extracted(NamedTuple):
    """Features of one video: one row per second of it."""

    features: np.ndarray
    """(n, F) float16; rows have length 1 where the config normalises."""
    decoded_s: float
    """Seconds of video that were decoded (the last row may cover less than a second)."""
    claimed_s: float
    """Seconds that the file claims to hold; 0.0 where it does not say."""
    seconds: float
    """Wall-clock seconds that it took."""


def clip_encoder(model: S3D, cfg: ExtractConfig, *, compiled: bool = False) -> FusedS3D:
    """S3D as a config asks for it: layer, precision, and where it runs (on a GPU, compiled if wanted).

    Raises:
        ConfigError: a GPU is asked for, and this machine or its torch has none; or float16 on a CPU.
    """
    on_gpu = cfg.gpus_per_worker > 0
    if cfg.precision == "float16" and not on_gpu:
        raise ConfigError("extract.precision=float16 is for GPUs, and far slower than float32 on a CPU; use bfloat16")
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError(
            "extract.gpus_per_worker asks for a GPU, and torch sees none here; extract on CPUs "
            "(--set extract.gpus_per_worker=0)"
        )
    fused = FusedS3D(model, cfg.layer, getattr(torch, cfg.precision), compiled=on_gpu and compiled)
    return fused.to("cuda" if on_gpu else "cpu")


@torch.inference_mode()
def features_from_file(
    path: Path | str,
    encoder: ClipEncoder,
    cfg: ExtractConfig,
    on_chunk: Callable[[Chunk], None] = lambda chunk: None,
    read: ReadChunks | None = None,
) -> Extracted:
    """Decode a video and encode each second of it; holds `cfg.chunk` seconds of frames, never the whole video.

    Args:
        path: Video file of any format that FFmpeg reads, or an object at s3://bucket/key.
        encoder: See `clip_encoder`, which makes one of S3D weights and the same config.
        cfg: Frame rate, size, normalisation.
        on_chunk: Called before each chunk is encoded; may raise to go no further.
        read: Where the chunks come from: another process, or (None) `read_chunks` here.

    Raises:
        DecodeError: the video is missing, broken or too slow (see `SecondsReader`).
        ExtractionError: the encoder's output is not finite.
    """
    start = time.monotonic()
    rows: list[np.ndarray] = []
    decoded_s = claimed_s = 0.0
    with closing(read(str(path)) if read else read_chunks(str(path), cfg.decode, cfg.chunk)) as chunks:
        for chunk in chunks:
            on_chunk(chunk)
            decoded_s, claimed_s = chunk.decoded_s, chunk.claimed_s
            tokens = encoder(torch.from_numpy(chunk.frames).to(encoder.device))
            if cfg.normalise:
                tokens = functional.normalize(tokens, dim=-1)
            rows.append(tokens.half().cpu().numpy())
    features = np.concatenate(rows)
    if not np.isfinite(features).all():
        raise ExtractionError(f"{path}: the encoder's output is not finite; are its weights damaged?")
    return Extracted(features, decoded_s, claimed_s, time.monotonic() - start)


def calibration_clips(paths: Iterable[Path | str], cfg: DecodeConfig) -> np.ndarray:
    """A sample of a corpus for `random_s3d`: one-second clips a few seconds apart from the first readable videos.

    The order in which videos are tried depends on their paths' names only, so the same corpus gives the same sample.

    Returns:
        uint8 (n, fps, size, size, 3), 1 <= n <= 48; at most three clips of a video.

    Raises:
        ExtractionError: none of the videos can be read; names the first of them (of a single video: its DecodeError).
    """
    clips: list[np.ndarray] = []
    errors: list[DecodeError] = []
    for path in sorted(paths, key=lambda path: (zlib.crc32(Path(path).name.encode(errors="replace")), str(path))):
        try:
            with local_video(str(path)) as file:
                clips.extend(islice(SecondsReader(file, cfg), 0, _CLIPS_PER_VIDEO * _SECONDS_APART, _SECONDS_APART))
        except DecodeError as error:
            errors.append(error)
        if len(clips) >= CALIBRATION_CLIPS:
            break
    if not clips and len(errors) == 1:
        raise errors[0]
    if not clips:
        more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        raise ExtractionError(
            f"none of the {len(errors)} videos can be read, so there is nothing to calibrate random weights on: "
            + "; ".join(map(str, errors[:_SHOWN]))
            + more
        )
    return np.stack(clips[:CALIBRATION_CLIPS])
