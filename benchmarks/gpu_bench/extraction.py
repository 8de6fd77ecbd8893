"""The whole extraction on one GPU: decoders on the other cores, a real Ray, a real store; how long the GPU waits."""

import shutil
import time
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import av
import ray
import torch

from feature_store.config import DecodeConfig, ExtractConfig
from feature_store.decode import SecondsReader
from feature_store.encode import calibration_clips
from feature_store.extract import ExtractProgress, extract_corpus
from feature_store.plan import PlannedVideo
from feature_store.weights import random_s3d


@dataclass(frozen=True)
class Extracted:
    """What an extraction did between its first finished chunk and its end."""

    seconds_per_s: float
    waiting: float
    failed: int
    start_s: float
    """Until the first chunk: Ray's workers, compilation."""


def uncompressed(video: Path, path: Path, length: int) -> Path:
    """A video of the network's own size and rate that is nearly free to decode, so that the GPU is what is measured."""
    frames = list(islice(SecondsReader(video, DecodeConfig()), 8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=30)
        stream.width = stream.height = 224
        stream.pix_fmt = "rgb24"
        for second in islice(cycle(frames), length):
            for image in second:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    return path


def extract(folder: Path, paths: list[Path], count: int, weights: Path, **settings: object) -> Extracted:
    """Extract `count` videos of these paths, over and over, into a store in `folder`."""
    store = folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    cfg = ExtractConfig(gpus_per_worker=1.0, weights=str(weights), **settings)  # type: ignore[arg-type]
    videos = [PlannedVideo(f"v{k}", str(path)) for k, path in enumerate(islice(cycle(paths), count))]
    began = time.monotonic()
    first: list[tuple[float, int]] = []

    def look(state: ExtractProgress) -> None:
        if state.encoded_s and not first:
            first.append((time.monotonic(), state.encoded_s))

    done = extract_corpus(store, videos, cfg, weights=weights, on_progress=look)
    if done.tally.failed:
        raise SystemExit(f"{done.tally.failed} videos failed ({done.tally.reasons}): the speed says nothing")
    (since, before), end = first[0], time.monotonic()
    rate = (done.tally.seconds - before) / (end - since)
    return Extracted(rate, done.waiting, done.tally.failed, since - began)


def save_weights(videos: list[Path], path: Path) -> Path:
    """Random weights as a file."""
    torch.save(random_s3d(0, calibration_clips(videos, DecodeConfig())).state_dict(), path)
    return path


def start_ray(store_gib: float) -> None:
    """A Ray of this machine alone, with its GPU."""
    ray.init(
        address="local", num_gpus=1, include_dashboard=False, logging_level="ERROR",
        object_store_memory=int(store_gib * 2**30),
    )  # fmt: skip
