"""Settings + corpus -> what a pre-training will take: updates, memory, bytes, hours (before the run, `--dry-run`).

Numbers of clips, tokens and bytes are exact or drawn from the corpus; time and memory rest on what was measured on one
GPU and on two CPU cores (benchmarks/README.md), and say so.
"""

import math
from dataclasses import dataclass

import numpy as np

from vlm_dist.data.clips import CaptionIndex, sample_spans
from vlm_dist.data.config import ClipConfig, MaskConfig
from vlm_dist.data.sampler import GlobalOrder
from vlm_dist.model.config import ModelConfig
from vlm_dist.model.flops import Work, forward_flops, step_flops
from vlm_dist.train.config import TrainConfig, pool_form
from vlm_dist.train.negatives import received_bytes
from vlm_dist.train.schedule import total_steps

GPU_FLOPS = 0.19 * 989e12
"""Of a training step of BERT-base with dropout on one H100, measured: 19 % of the dense half-precision rate."""
CORE_FLOPS = 100e9
"""The same on a core of an Intel Xeon with AVX-512, in float32."""
_ACTIVATIONS = {"fp32": 110, "fp16": 55, "bf16": 55}
"""Bytes that a token keeps in a layer for each hidden unit until the backward pass, measured without `recompute`."""
_SAMPLED = 4096  # clips that are drawn for the means


@dataclass(frozen=True)
class TrainPlan:
    """What one pre-training takes; bytes and FLOPs are of one rank."""

    ranks: int
    on_gpu: bool
    precision: str
    steps: int
    epochs: float
    global_batch: int
    micro_batches: int
    micro_batch: int
    parameters: int
    tokens_per_clip: float
    masked_per_clip: float
    negatives: int
    received_bytes: int
    """Raw features that a rank receives for one update."""
    gradient_bytes: int
    """What it sends and receives for gradients and weights (ZeRO: a reduction and a gather of all weights)."""
    step_flops: float
    nce_share: float
    """Of the loss against all negatives in the step's arithmetic."""
    state_bytes: int
    activation_bytes: int
    seconds_per_step: float

    @property
    def hours(self) -> float:
        """Of the whole run, without validation and checkpoints."""
        return self.seconds_per_step * self.steps / 3600


def plan_pretraining(
    index: CaptionIndex,
    videos: np.ndarray,
    model: ModelConfig,
    clips: ClipConfig,
    masks: MaskConfig,
    train: TrainConfig,
    *,
    parameters: int,
    ranks: int,
    cores_each: int = 0,
) -> TrainPlan:
    """The plan of a run on `ranks` GPUs, or on as many CPU workers of `cores_each` cores.

    Args:
        index: the store's clips.
        videos: rows of the training videos.
        model: with vocab_size and feature_dim filled in.
        clips: how they are drawn.
        masks: what of them is masked.
        train: batch, precision, negatives.
        parameters: of the model.
        ranks: GPUs or workers in all.
        cores_each: 0 means GPUs.
    """
    keys = GlobalOrder(videos, train.seed, train.global_batch, clips.clips_per_video).keys(
        0, 0, min(_SAMPLED, train.global_batch)
    )
    spans = sample_spans(index, keys, clips, model.max_video_len)
    drawn = len(spans.row)
    seconds = spans.row_end - spans.row
    words = np.minimum(spans.token_end - spans.token, model.max_text_len)
    lengths = seconds + words + 3
    rank_clips = train.global_batch / ranks
    # A clip is whole in one modality, or masked here and there.
    whole = masks.mmm_probability
    text_rate = whole / 2 + (1 - whole) * masks.mlm_probability
    video_rate = whole / 2 + (1 - whole) * masks.mfm_probability
    visible = float(seconds.mean()) * (1 - video_rate)
    share = rank_clips / drawn
    work = Work(
        tokens=int(lengths.sum() * share),
        pairs=int((lengths**2).sum() * share),
        seconds=int(seconds.sum() * share),
        masked_text=int(words.sum() * text_rate * share),
        masked_video=int(seconds.sum() * video_rate * share),
        pool=_pool(train, visible, ranks),
    )
    precision = train.precision if train.precision != "auto" else ("fp32" if cores_each else "fp16")
    pieces = min(-(-math.ceil(rank_clips) // train.micro_batch), int(rank_clips))
    flops = step_flops(model, work)
    without = forward_flops(model, Work(work.tokens, work.pairs, work.seconds, work.masked_text, work.masked_video, 0))
    item = 4 if precision == "fp32" else 2
    return TrainPlan(
        ranks=ranks,
        on_gpu=not cores_each,
        precision=precision,
        steps=total_steps(train, len(videos), clips.clips_per_video),
        epochs=total_steps(train, len(videos), clips.clips_per_video)
        * train.global_batch
        / (len(videos) * clips.clips_per_video),
        global_batch=train.global_batch,
        micro_batches=pieces,
        micro_batch=math.ceil(rank_clips / pieces),
        parameters=parameters,
        tokens_per_clip=float(lengths.mean()),
        masked_per_clip=(work.masked_text + work.masked_video) / rank_clips,
        negatives=work.pool,
        received_bytes=_received(train, visible, ranks, model.feature_dim),
        gradient_bytes=0 if ranks == 1 else 2 * item * parameters,
        step_flops=flops,
        nce_share=1 - 3 * without / flops,
        # Weights and gradients in the step's precision; masters (of half precision) and two moments in float32, shared.
        state_bytes=2 * item * parameters + (12 if item == 2 else 8) * parameters // ranks,
        activation_bytes=int(work.tokens / pieces * model.num_layers * model.hidden_size * _ACTIVATIONS[precision]),
        seconds_per_step=flops / (CORE_FLOPS * cores_each if cores_each else GPU_FLOPS),
    )


def _pool(train: TrainConfig, visible: float, ranks: int) -> int:
    kind, size = pool_form(train.nce_pool)
    everything = train.global_batch * visible
    if kind == "local":
        return int(min(train.micro_batch, train.global_batch / ranks) * visible)
    if kind == "group":
        return int(everything * min(1.0, size / ranks))
    return int(min(size, everything) if kind == "sample" else everything)


def _received(train: TrainConfig, visible: float, ranks: int, width: int) -> int:
    kind, size = pool_form(train.nce_pool)
    taking_part = {"local": 1, "group": min(size, ranks)}.get(kind, ranks)
    own = train.global_batch / ranks * visible
    if kind == "sample":
        own *= min(1.0, size / max(1.0, train.global_batch * visible))
    return received_bytes([int(own)] * taking_part, width)
