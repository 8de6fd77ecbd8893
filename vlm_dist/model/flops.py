"""A batch of clips → arithmetic of a pre-training step, for MFU and for planning (beside the model).

Model FLOPs: what the mathematics asks for, on real places and masked rows. Padding, and what is computed a second time
to save memory, are not in them, so that a share of a card's rate (MFU) only rises by being faster.
"""

from dataclasses import dataclass
from typing import Self

from vlm_dist.data.batch import ClipBatch
from vlm_dist.model.config import ModelConfig


@dataclass(frozen=True)
class Work:
    """What a step's clips ask for, as counts; those of micro-batches and ranks add up, but for the pool."""

    tokens: int
    """Real places, of all clips."""
    pairs: int
    """Of real places of one clip: what attention compares."""
    seconds: int
    """Real video places."""
    masked_text: int
    masked_video: int
    pool: int
    """Video tokens that are negatives, N."""

    @classmethod
    def of(cls, batch: ClipBatch, pool: int | None = None) -> Self:
        """From a masked batch; without another pool, its own visible seconds are the negatives."""
        lengths = batch.video_mask.sum(1) + batch.text_mask.sum(1)
        return cls(
            tokens=int(lengths.sum()),
            pairs=int(lengths.square().sum()),
            seconds=int(batch.video_mask.sum()),
            masked_text=batch.num_masked_text,
            masked_video=batch.num_masked_video,
            pool=len(batch.visible_video()) if pool is None else pool,
        )


def forward_flops(config: ModelConfig, work: Work) -> float:
    """FLOPs of encoder, head and joint loss (Eq. 8, 9) forwards; a multiplication and an addition are two.

    Of matrix products only: all the rest is less than a hundredth. Every negative is projected once.
    """
    d, width = config.hidden_size, config.feature_dim
    layer = work.tokens * (4 * d * d + 2 * d * config.intermediate_size) + 2 * work.pairs * d
    masked = work.masked_text + work.masked_video
    projected = work.seconds + work.masked_video + work.pool  # in the clip, as a positive, as a negative
    scores = masked * d * (config.vocab_size + work.pool)
    return 2.0 * (config.num_layers * layer + projected * (width * d + d * d) + masked * d * d + scores)


def step_flops(config: ModelConfig, work: Work) -> float:
    """FLOPs of a whole training step: the backward pass asks for twice the forward pass."""
    return 3.0 * forward_flops(config, work)
