"""Clips + masks + VLM + loss -> a pre-trained model: what pre-training trains (paper section 3, Eq. 1-9)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from feature_store.config import StoreConfig
from feature_store.reader import FeatureReader
from feature_store.tokenizer import load_tokenizer
from vlm_dist.data.batch import SpecialIds
from vlm_dist.data.clips import load_clips
from vlm_dist.data.config import ClipConfig, MaskConfig
from vlm_dist.data.masks import mask_batch
from vlm_dist.data.rng import ClipKeys
from vlm_dist.data.sampler import GlobalOrder
from vlm_dist.errors import ConfigError, StoreError
from vlm_dist.losses.nce import CHUNK, LossSums, masked_token_loss
from vlm_dist.model.checkpoint import build_vlm, save_vlm
from vlm_dist.model.config import ModelConfig
from vlm_dist.model.origin import TrainedOn, read_trained_on
from vlm_dist.model.recompute import set_recompute
from vlm_dist.model.vlm import VLM
from vlm_dist.train import distributed
from vlm_dist.train.config import TrainConfig
from vlm_dist.train.engine import Engine
from vlm_dist.train.loop import Objective
from vlm_dist.train.negatives import MicroBatch, Negatives, Pool
from vlm_dist.train.schedule import total_steps

VALIDATION_SEED_SHIFT = 1 << 32  # validation draws its clips and masks from seeds that no training run uses


@dataclass(frozen=True)
class PretrainJob:
    """Everything that a rank needs to pre-train; `split` holds rows of `snapshot`."""

    store: str
    snapshot: str
    reading: StoreConfig
    split: str
    init: str
    out: str
    model: ModelConfig
    clips: ClipConfig
    masks: MaskConfig
    train: TrainConfig
    about: dict[str, str] = field(default_factory=dict[str, str])
    deadline: float | None = None

    def build(self, device: torch.device) -> "PretrainObjective":
        """The objective of this rank."""
        return PretrainObjective(self, device)


class PretrainModule(nn.Module):
    """Encoder and loss in one forward pass, so that DeepSpeed sees one module; made for one device."""

    def __init__(self, vlm: VLM, train: TrainConfig, device: torch.device) -> None:
        super().__init__()
        self.vlm = vlm
        self.train_cfg = train
        self.chunk = train.nce_chunk or CHUNK[device.type]
        self.compiled = train.compile and device.type == "cuda"
        set_recompute(vlm.bert, train.recompute)
        if self.compiled and train.recompute == "none":  # what is made again must be seen operation by operation
            for layer in vlm.bert.encoder.layer:
                layer.compile(dynamic=True)

    def forward(self, micro: MicroBatch, pool: Pool) -> LossSums:
        """Masked-token losses of one micro-batch, with these negatives."""
        batch = micro.clips
        hidden = self.vlm.encode(
            batch.video, batch.video_mask, batch.text, batch.text_mask,
            video_labels=batch.video_labels, places=batch.places.real,
        )  # fmt: skip
        cfg = self.train_cfg
        return masked_token_loss(
            self.vlm, hidden, batch, pool.features, cfg.loss, constant_column=cfg.constant_column,
            chunk=self.chunk, shift=pool.shift,
            videos=(micro.videos, pool.videos) if cfg.nce_other_videos else None, compiled=self.compiled,
        )  # fmt: skip


def rank_clips(global_batch: int, world: int, rank: int, micro: int) -> list[tuple[int, int]]:
    """The clips first..last of each micro-batch of a rank: contiguous shares whose sizes differ by one at most.

    Every rank gets the same number of micro-batches, none of them empty. Errors: ConfigError when there are more ranks
    than clips.
    """
    if global_batch < world:
        raise ConfigError(f"train.global_batch {global_batch} is smaller than the number of workers, {world}")
    largest = -(-global_batch // world)
    pieces = min(-(-largest // micro), global_batch // world)
    first, last = rank * global_batch // world, (rank + 1) * global_batch // world
    size = last - first
    return [(first + size * i // pieces, first + size * (i + 1) // pieces) for i in range(pieces)]


class PretrainObjective(Objective):
    """Masked-token pre-training under the loop; clips and masks are pure functions of (seed, update)."""

    def __init__(self, job: PretrainJob, device: torch.device) -> None:
        self.job = job
        self.reader = FeatureReader.of(job.store, job.reading, job.snapshot)
        folder = self.reader.index.tokenizer_dir
        if folder is None:
            raise StoreError(f"{job.store} has no captions: pre-training reads both; add them with --captions FILE")
        self.tokenizer = load_tokenizer(str(folder))
        self.ids = SpecialIds.of(self.tokenizer)
        self.vlm = build_vlm(
            job.init, job.model, self.tokenizer.vocab_size, self.reader.meta.feature_dim, seed=job.train.seed
        )
        self.module = PretrainModule(self.vlm, job.train, device)
        self.negatives = Negatives(job.train.nce_pool, job.train.nce_other_videos)
        self.optim = job.train.optim
        with np.load(job.split) as split:
            training, validation = split["train"], split["validation"]
        clips = job.clips.clips_per_video
        self.order = GlobalOrder(training, job.train.seed, job.train.global_batch, clips)
        self.shares = rank_clips(
            job.train.global_batch, distributed.world_size(), distributed.rank(), job.train.micro_batch
        )
        self.accumulation = len(self.shares)
        self.total_steps = total_steps(job.train, len(training), clips)
        self.validate_every = job.train.validate_every
        self.validation = (
            GlobalOrder(validation, job.train.seed + VALIDATION_SEED_SHIFT, len(validation) * clips, clips)
            if len(validation)
            else None
        )

    def _load(self, keys: ClipKeys) -> MicroBatch:
        batch = load_clips(self.reader, keys, self.job.clips, self.vlm.config, self.ids)
        return MicroBatch.of(mask_batch(batch, keys, self.job.masks, self.ids).trim(), keys)

    def micro_batches(self, step: int) -> list[Any]:
        """This rank's clips of the update, masked, in `accumulation` pieces."""
        return [self._load(self.order.keys(step, first, last)) for first, last in self.shares]

    def prepare(self, micros: list[Any], engine: Engine) -> tuple[list[Any], Any]:
        """Gather the raw visible features of all ranks and micro-batches, and count the masked tokens."""
        return [micro.to(engine.device) for micro in micros], self.negatives.share(micros, engine.device)

    def loss(self, engine: Engine, micro: Any, shared: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the global mean, and its sums."""
        pool = shared.pool or Pool.of([micro])
        sums: LossSums = engine(micro, pool)
        loss = sums.loss(self.job.train.loss, shared.num_text, shared.num_video) * engine.scale
        report = {name: getattr(sums, name) for name in LossSums.__dataclass_fields__}
        report["clips"] = report["num_text"].new_full((), len(micro.clips))
        report["tokens"] = report["num_text"].new_full((), len(micro.clips.places.real))
        return loss, report

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        """Mean loss per masked token (joint and by kind) and how often the right one scored highest."""
        text, video = max(1.0, sums["num_text"]), max(1.0, sums["num_video"])
        joint = (sums["text_sum"] + sums["video_sum"]) / (text + video)
        baseline = sums["text_sum"] / text + sums["video_sum"] / video
        return {
            "loss": joint if self.job.train.loss == "joint" else baseline,
            "text_loss": sums["text_sum"] / text,
            "video_loss": sums["video_sum"] / video,
            "text_accuracy": sums["correct_text"] / text,
            "video_accuracy": sums["correct_video"] / video,
        }

    def _validation_pieces(self) -> Iterator[list[tuple[int, int]]]:
        """Whole batches of the training run's size, so that both losses count as many negatives; a rest is left out."""
        assert self.validation is not None
        world, rank = distributed.world_size(), distributed.rank()
        clips = self.validation.global_batch
        batch = min(self.job.train.global_batch, clips)
        for start in range(0, clips - batch + 1, batch):
            pieces = rank_clips(batch, world, rank, self.job.train.micro_batch)
            yield [(start + first, start + last) for first, last in pieces]

    @torch.no_grad()
    def validate(self, engine: Engine, step: int) -> dict[str, float]:
        """Loss on the held-out videos; clips and masks are the same every time."""
        if self.validation is None or self.validation.global_batch < distributed.world_size():
            return {}
        total: dict[str, Tensor] = {}
        for pieces in self._validation_pieces():
            loaded = [self._load(self.validation.keys(0, *piece)) for piece in pieces]
            shared = self.negatives.share(loaded, engine.device)
            for micro in (part.to(engine.device) for part in loaded):
                sums = engine.module(micro, shared.pool or Pool.of([micro]))
                for name in LossSums.__dataclass_fields__:
                    total[name] = total.get(name, 0) + getattr(sums, name).double()
        joined = distributed.all_sum(torch.stack([total[name] for name in sorted(total)]))
        values = self.summarise(dict(zip(sorted(total), joined.tolist(), strict=True)))
        return {f"validation/{name}": value for name, value in values.items()}

    def better(self, metrics: dict[str, float], best: dict[str, float] | None) -> bool:
        """By the lowest validation loss, as the reference chooses its models; never with `train.select` last."""
        loss = "validation/loss"
        return self.job.train.select == "best" and (best is None or metrics[loss] < best[loss])

    def origin_of(self, position: int) -> dict[str, Any]:
        """The videos of the update's clips."""
        names = self.reader.index.id_list()
        return {"videos": [names[row].decode() for row in np.unique(self.order.keys(position).video)]}

    @cached_property
    def trained_on(self) -> TrainedOn:
        """Videos of the model that this began with, and of this run."""
        before = TrainedOn.of() if self.job.init == "scratch" else read_trained_on(Path(self.job.init))
        names = self.reader.index.id_list()
        return before.and_on(names[row].decode() for row in self.order.videos)

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Model, configuration and tokenizer, as `vlm_dist.load` reads them."""
        vlm = VLM(self.vlm.config)
        vlm.load_state_dict({name.removeprefix("vlm."): tensor for name, tensor in weights.items()})
        save_vlm(vlm, self.tokenizer, folder, features=self.reader.meta.provenance, trained_on=self.trained_on)
