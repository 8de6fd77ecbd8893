"""Visible video tokens of all ranks and micro-batches → the pool of negatives V' (between masks and loss, Eq. 5-9).

The raw features travel, in float16 and without gradient: every rank projects the pool with its own copy of the video
MLP (losses/nce.py). How large a pool gets with the number of GPUs, and what that costs, is in docs/loss.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlm_dist.data.batch import ClipBatch
from vlm_dist.data.rng import ClipKeys, Stream
from vlm_dist.errors import ConfigError
from vlm_dist.train import distributed
from vlm_dist.train.config import pool_form


@dataclass(frozen=True)
class MicroBatch:
    """Masked clips, and what the pool needs to know of them."""

    clips: ClipBatch
    videos: Tensor
    """(B,) int64, each clip's row in the store."""
    draws: Tensor
    """(B, V) float64 in [0, 1): which seconds a sampled pool takes; functions of the clips' keys alone."""

    @classmethod
    def of(cls, clips: ClipBatch, keys: ClipKeys) -> "MicroBatch":
        """Masked clips and their keys."""
        draws = keys.uniform(Stream.POOL, np.arange(clips.video.shape[1]))
        return cls(clips, torch.from_numpy(keys.video), torch.from_numpy(draws))

    def to(self, device: torch.device) -> "MicroBatch":
        """On another device; the draws, which nothing there needs, stay."""
        return MicroBatch(
            self.clips.to(device, non_blocking=True), self.videos.to(device, non_blocking=True), self.draws
        )


@dataclass(frozen=True)
class Pool:
    """N negatives."""

    features: Tensor
    """(N, F), raw."""
    videos: Tensor
    """(N,) int64, the row in the store of the video that each is of."""
    shift: float = 0.0
    """What is added to their scores: log(N_all / N) where they are a sample."""

    @classmethod
    def of(cls, micros: Sequence[MicroBatch], share: float = 1.0) -> "Pool":
        """Visible seconds of these clips: all, or those whose draw is below the share."""
        chosen = [m.clips.video_mask & ~m.clips.video_labels for m in micros]
        if share < 1:
            chosen = [visible & (m.draws < share) for visible, m in zip(chosen, micros, strict=True)]
        features = torch.cat([m.clips.video[mask] for m, mask in zip(micros, chosen, strict=True)])
        videos = [m.videos[:, None].expand_as(mask)[mask] for m, mask in zip(micros, chosen, strict=True)]
        return cls(features, torch.cat(videos))


@dataclass(frozen=True)
class Shared:
    """What the micro-batches of one update share over all ranks."""

    pool: Pool | None
    """None where every micro-batch has its own."""
    num_text: float
    """Masked words."""
    num_video: float
    """Masked seconds."""


class Negatives:
    """Makes the pools of one training run.

    Args:
        form: `train.nce_pool`.
        with_videos: Whether the loss needs the pool's videos; else they are not sent, and are this rank's only.

    Raises:
        ConfigError: the ranks can't be cut into such groups.
    """

    def __init__(self, form: str, with_videos: bool) -> None:
        self.kind, self.size = pool_form(form)
        self.with_videos = with_videos
        self.group = None
        world = distributed.world_size()
        if self.kind == "group" and world > self.size:
            if world % self.size:
                raise ConfigError(
                    f"train.nce_pool {form}: {world} ranks can't be cut into groups of {self.size}; "
                    f"give a divisor of {world}, or global"
                )
            self.group = distributed.neighbours(self.size)

    def share(self, micros: Sequence[MicroBatch], device: torch.device) -> Shared:
        """Counts of all ranks, and the pool that this rank's micro-batches share, selected where the batches come from.

        A collective; one more for the features, and for their sizes where they are a sample.
        """
        clips = [micro.clips for micro in micros]
        visible = sum(len(c.places.visible_video) for c in clips)
        own = [visible, sum(c.num_masked_text for c in clips), sum(c.num_masked_video for c in clips)]
        counts = distributed.all_gather_counts(own, device)
        everything, num_text, num_video = counts.sum(0).tolist()
        if self.kind == "local":
            return Shared(None, num_text, num_video)
        share = min(1.0, self.size / max(1, everything)) if self.kind == "sample" else 1.0
        pool = Pool.of(micros, share)
        sizes = None if share < 1 or self.group else counts[:, 0].tolist()
        features = distributed.all_gather_rows(pool.features.to(device, non_blocking=True), sizes, self.group)
        videos = pool.videos.to(device, non_blocking=True)
        if self.with_videos:
            videos = distributed.all_gather_rows(videos[:, None], sizes, self.group)[:, 0]
        return Shared(Pool(features, videos, -float(np.log(share))), num_text, num_video)


def received_bytes(sizes: Sequence[int], width: int, item: int = 2) -> int:
    """Bytes that each rank receives for one update's pool, of ranks with these numbers of visible tokens.

    All ranks send as many rows as the one with most: that is what collectives of one shape cost.
    """
    return (len(sizes) - 1) * max(1, *sizes) * width * item
