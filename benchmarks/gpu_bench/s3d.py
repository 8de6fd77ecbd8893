"""S3D on a GPU: clips a second in each form, share of the card's ceilings, and the error of its features."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from feature_store.config import DecodeConfig
from feature_store.decode import SecondsReader
from feature_store.encode import calibration_clips
from feature_store.graphed_encoder import GraphedEncoder
from feature_store.s3d import S3D
from feature_store.s3d_fused import FusedS3D
from feature_store.weights import random_s3d
from gpu_bench.timing import seconds

CLIP_FLOP = 70.5e9  # of one clip of 30 frames of 224 pixels (docs/extraction.md)
CHECKED = 48  # clips whose features are compared
_PER_VIDEO = 8


@dataclass(frozen=True)
class Form:
    """One form of the network."""

    name: str
    clips_per_s: dict[int, float]
    """By the size of the batch."""
    error: float
    """Of the centred features against float32 on the CPU, as a share of the distance of neighbouring seconds."""
    largest_error: float
    """Of any feature, not normalised, against float32 on the CPU."""


def measure(videos: list[Path], batches: tuple[int, ...], compiled: bool) -> Iterator[Form]:
    """Each form on the same clips of real or rendered videos, with random weights that tell them apart."""
    cfg = DecodeConfig()
    decoded = (list(islice(SecondsReader(path, cfg), _PER_VIDEO)) for path in videos)
    clips = np.stack([clip for video in decoded if len(video) == _PER_VIDEO for clip in video])
    model = random_s3d(0, calibration_clips(videos, cfg))
    few = torch.from_numpy(clips[:CHECKED])
    exact = torch.cat([FusedS3D(model)(part) for part in few.split(8)])
    most = max(batches)
    for name, network, sizes in _forms(model, cfg, batches, most, compiled):
        rates: dict[int, float] = {}
        for size in sizes:
            batch = torch.from_numpy(np.resize(clips, (size, *clips.shape[1:]))).cuda()
            rates[size] = size / seconds(lambda batch=batch, network=network: network(batch))
        error = torch.cat([network(part.cuda()) for part in few.split(8)]).float().cpu() - exact
        steps = torch.cat([part.diff(dim=0) for part in exact.split(_PER_VIDEO)]).norm(dim=1).mean()
        share = float((error - error.mean(0)).norm(dim=1).mean() / steps)
        yield Form(name, rates, share, float(error.abs().max()))


def _forms(
    model: S3D, cfg: DecodeConfig, batches: tuple[int, ...], most: int, compiled: bool
) -> Iterator[tuple[str, Callable[[Tensor], Tensor], tuple[int, ...]]]:
    yield "plain, float32", _plain(model, torch.float32), batches
    yield "plain, float16", _plain(model, torch.float16), batches
    yield "fused, float32", FusedS3D(model).cuda(), batches
    yield "fused, bfloat16", FusedS3D(model, dtype=torch.bfloat16).cuda(), batches
    yield "fused, float16", FusedS3D(model, dtype=torch.float16).cuda(), batches
    if compiled:
        network = FusedS3D(model, dtype=torch.float16, compiled=True).cuda()
        yield "compiled, as graphs, float16", GraphedEncoder(network, cfg, most), batches


def _plain(model: S3D, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """As the reference writes and runs it: eager, channels first; without TF32, as everywhere here."""
    network = S3D()
    network.load_state_dict(model.state_dict())
    network = network.cuda().to(dtype).eval()

    @torch.inference_mode()
    def run(clips: Tensor) -> Tensor:
        return network(clips.permute(0, 4, 1, 2, 3).to(dtype) / 255)

    return run
