"""How a model is trained: optimiser, precision, batch, checkpoints, workers (paper 5.2; defaults of the code)."""

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OptimConfig(_Frozen):
    """Adam with linear warm-up and linear decay (reference facts 3.4)."""

    lr: float = Field(default=5e-5, gt=0, description="Peak learning rate.")
    betas: tuple[float, float] = Field(default=(0.9, 0.98), description="Adam's betas.")
    eps: float = Field(default=1e-8, gt=0, description="Adam's epsilon.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    warmup_steps: int = Field(default=1000, ge=0, description="Steps of linear warm-up.")
    decay_steps: int = Field(default=1_000_000, ge=1, description="Step at which the linear decay reaches zero.")
    clip_norm: float = Field(default=2.0, gt=0, description="Global gradient norm limit.")


_STAGES_REFUSED = {
    0: "makes wrong updates in fp16 and bf16 (DeepSpeed 0.19 unscales gradients that it did not scale, and makes one "
    "step of Adam too many), and saves nothing in fp32",
    3: "cuts up weights that every GPU has room for (BERT-base: 0.2 GB), and gathers them anew in every layer",
}


class TrainConfig(_Frozen):
    """One training run."""

    optim: OptimConfig = OptimConfig()
    seed: int = Field(default=0, ge=0, description="Seed of order, clips, masks, dropout and fresh weights.")
    global_batch: int = Field(
        default=2048, ge=1, description="Clips of one update, over all ranks and accumulation steps."
    )
    micro_batch: int = Field(default=256, ge=1, description="Clips of one forward pass on one rank.")
    epochs: float = Field(default=15.0, gt=0, description="Passes over the training videos; max_steps goes before it.")
    max_steps: int = Field(default=0, ge=0, description="Updates in all; 0 follows from epochs.")
    precision: Literal["auto", "fp16", "bf16", "fp32"] = Field(
        default="auto", description="auto is fp16 on GPUs (as the paper) and fp32 on CPUs."
    )
    zero_stage: int = Field(
        default=1,
        description="DeepSpeed ZeRO stage, 1 or 2 (0 is wrong in half precision, 3 is pointless at this size).",
    )
    loss: Literal["joint", "mfm-mlm"] = Field(
        default="joint", description="Joint loss (Eq. 8) or the baseline L_MFM-MLM (Eq. 7)."
    )
    constant_column: bool = Field(default=False, description="The reference's constant zero logit in every text row.")
    nce_pool: str = Field(
        default="global",
        description="Negatives: global (of all ranks), local (of one micro-batch, as the reference), group:G (of G "
        "neighbouring ranks), sample:K (about K of all).",
    )
    nce_other_videos: bool = Field(
        default=False, description="Leave a masked token's own video out of its negatives (false negatives)."
    )
    nce_chunk: int = Field(
        default=0, ge=0, description="Keys scored at once in the loss; 0 is 8,192 on GPUs and 2,048 on CPUs."
    )
    recompute: Literal["none", "cheap", "layers"] = Field(
        default="none",
        description="Activations made again in the backward pass: none, cheap (all but the products), whole layers.",
    )
    compile: bool = Field(
        default=True,
        description="Let torch.compile fuse layers and loss of pre-training on GPUs (layers only with recompute none); "
        "the first steps then take a minute.",
    )
    max_hours: float = Field(
        default=0.0, ge=0, description="`pretrain` stops with a checkpoint after so many hours; 0 never."
    )
    checkpoint_every: int = Field(default=500, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(default=2, ge=1, description="Newest checkpoints that are kept.")
    validate_every: int = Field(default=1024, ge=0, description="Steps between validation losses; 0 only at the end.")
    log_every: int = Field(default=10, ge=1, description="Steps between reports.")
    timeout_s: int = Field(default=600, ge=10, description="A collective that takes longer counts as a hang.")
    hang_s: int = Field(
        default=120,
        ge=0,
        description="A rank without progress for so long saves its stacks and is started again; 0: never.",
    )
    max_failures: int = Field(
        default=3, ge=0, description="Worker failures that are survived by a restart from a checkpoint."
    )
    select: Literal["best", "last"] = Field(
        default="best", description="Exported weights: of the lowest validation loss (if there is one), or the last."
    )
    allow_other_features: bool = Field(
        default=False, description="Go on from a model whose features had another extractor than the store's."
    )
    threads: int = Field(default=0, ge=0, description="CPU threads of one rank; 0 shares the cores out.")

    @field_validator("zero_stage")
    @classmethod
    def _stage(cls, value: int) -> int:
        if value in _STAGES_REFUSED:
            raise ValueError(f"stage {value} {_STAGES_REFUSED[value]}; take 1 or 2")
        if value not in (1, 2):
            raise ValueError(f"there is no stage {value}; take 1 or 2")
        return value

    @field_validator("nce_pool")
    @classmethod
    def _pool(cls, value: str) -> str:
        pool_form(value)
        return value


def pool_form(text: str) -> tuple[str, int]:
    """`train.nce_pool` as its kind and its G or K, 0 where it has none. Raises ValueError for anything else."""
    found = re.fullmatch(r"(global|local)|(group|sample):([1-9]\d{0,9})", text)
    if not found:
        raise ValueError(f"{text!r} is none of global, local, group:G, sample:K (G ranks, K negatives: whole numbers)")
    plain, kind, size = found.groups()
    return plain or kind, int(size or 0)


class FinetuneConfig(_Frozen):
    """Fine-tuning of one end task; None takes the task's own recipe (reference facts 4)."""

    batch: int | None = Field(default=None, ge=1, description="Items of one update.")
    epochs: float | None = Field(default=None, gt=0, description="Passes over the task's training items.")
    max_steps: int = Field(default=0, ge=0, description="Updates in all; 0 follows from epochs.")
    lr: float | None = Field(default=None, gt=0, description="Peak learning rate.")
    warmup_steps: int | None = Field(default=None, ge=0, description="Steps of linear warm-up.")
    held_out: float = Field(
        default=0.1, ge=0, le=0.5, description="Share of the training items kept for model selection."
    )
    select_on: Literal["held-out", "test", "last"] = Field(
        default="held-out", description="What chooses the checkpoint; test only for comparison with the reference."
    )
    max_missing: float = Field(
        default=0.1, ge=0, le=1, description="Largest share of items whose video may lack features, or end too early."
    )
