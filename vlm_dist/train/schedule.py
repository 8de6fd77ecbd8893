"""Steps -> learning rate and length of a run (paper 5.2; reference facts 3.4)."""

import math

from vlm_dist.train.config import OptimConfig, TrainConfig


def learning_rate(applied: int, optim: OptimConfig) -> float:
    """Rate of the update after `applied` updates: linear warm-up to `lr`, then linear decay to 0 at `decay_steps`.

    A step that fp16 skipped is not counted, so the rate is a pure function of the updates that took effect.
    """
    update = applied + 1
    if update <= optim.warmup_steps:
        return optim.lr * update / optim.warmup_steps
    left = (optim.decay_steps - update) / max(1, optim.decay_steps - optim.warmup_steps)
    return optim.lr * max(0.0, left)


def total_steps(train: TrainConfig, videos: int, clips_per_video: int) -> int:
    """Updates of a run: `max_steps` where it is given, else `epochs` visits of every training video."""
    if train.max_steps:
        return train.max_steps
    return max(1, math.ceil(train.epochs * videos * clips_per_video / train.global_batch))
