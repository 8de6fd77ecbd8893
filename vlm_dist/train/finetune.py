"""Task + pre-trained model -> a fine-tuned model: what one end task trains (paper section 4, reference facts 4)."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from feature_store.config import StoreConfig
from feature_store.reader import FeatureReader
from vlm_dist.errors import ConfigError
from vlm_dist.model.checkpoint import load, save_vlm
from vlm_dist.model.origin import TrainedOn, read_trained_on
from vlm_dist.tasks.base import Task
from vlm_dist.tasks.checkpoint import save_head
from vlm_dist.tasks.config import TaskDataConfig
from vlm_dist.tasks.registry import make_task
from vlm_dist.train import distributed
from vlm_dist.train.config import FinetuneConfig, OptimConfig, TrainConfig
from vlm_dist.train.engine import Engine
from vlm_dist.train.loop import Objective


@dataclass(frozen=True)
class FinetuneJob:
    """Everything that a rank needs to fine-tune one task; sent to each of them."""

    task: str
    options: TaskDataConfig
    data: str
    store: str
    snapshot: str
    reading: StoreConfig
    model: str
    out: str
    train: TrainConfig
    finetune: FinetuneConfig
    about: dict[str, str] = field(default_factory=dict[str, str])
    deadline: float | None = None

    def build(self, device: torch.device) -> "FinetuneObjective":
        """The objective of this rank."""
        return FinetuneObjective(self, device)


def recipe_optim(task: Task, finetune: FinetuneConfig, optim: OptimConfig) -> OptimConfig:
    """The task's rate and warm-up, unless the user gave others; the rest as in pre-training (paper 5.2)."""
    return optim.model_copy(
        update={
            "lr": finetune.lr if finetune.lr is not None else task.recipe.lr,
            "warmup_steps": finetune.warmup_steps if finetune.warmup_steps is not None else task.recipe.warmup_steps,
        }
    )


class ItemOrder:
    """Which training items an update has: a permutation of all items for every epoch, a pure function of the seed."""

    def __init__(self, items: int, batch: int, seed: int) -> None:
        self.items = items
        self.batch = min(batch, items)
        self.seed = seed

    @property
    def steps_per_epoch(self) -> int:
        """Updates of one epoch; what does not fill a batch waits for another epoch."""
        return self.items // self.batch

    def step(self, step: int) -> tuple[int, np.ndarray]:
        """Epoch of an update and the numbers of its items, (batch,)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.items)
        return epoch, order[place * self.batch : (place + 1) * self.batch]


class FinetuneObjective(Objective):
    """One end task under the training loop; the loss is the task's, the batch is the task's recipe."""

    def __init__(self, job: FinetuneJob, device: torch.device) -> None:
        self.device = device
        self.loaded = load(Path(job.model))
        self.task = make_task(job.task, job.options)
        self.reader = FeatureReader.of(job.store, job.reading, job.snapshot)
        vlm = self.loaded.model
        self.task.load(Path(job.data), self.reader, self.loaded.tokenizer, vlm.config, job.finetune)
        self.notes = self.task.misfits.lines
        self.job = job
        self.seed = job.train.seed
        torch.manual_seed(self.seed)
        self.task_model = self.task.build(vlm)
        self.module = self.task_model
        self.optim = recipe_optim(self.task, job.finetune, job.train.optim)
        batch = job.finetune.batch or self.task.recipe.batch
        if batch < distributed.world_size():
            raise ConfigError(f"finetune.batch {batch} cannot be shared by {distributed.world_size()} workers")
        self.order = ItemOrder(self.task.num_train_items, batch, self.seed)
        if self.order.batch < distributed.world_size():
            raise ConfigError(
                f"{self.task.num_train_items} training items cannot be shared by {distributed.world_size()} workers: "
                f"take at most {self.order.batch} (--workers, --gpus), or annotate more"
            )
        epochs = job.finetune.epochs or self.task.recipe.epochs
        self.total_steps = job.finetune.max_steps or max(1, math.ceil(epochs * self.order.steps_per_epoch))
        self.select_on: Literal["held-out", "test", "last"] = job.finetune.select_on
        self.validate_every = 0 if self.select_on == "last" else self.order.steps_per_epoch

    def micro_batches(self, step: int) -> list[Any]:
        """This rank's share of the update's items, as one batch."""
        epoch, items = self.order.step(step)
        share = np.array_split(items, distributed.world_size())[distributed.rank()]
        return [self.task.train_batch(share, (self.seed, epoch))]

    def prepare(self, micros: list[Any], engine: Engine) -> tuple[list[Any], Any]:
        """Move the batch to the device; items share nothing across micro-batches."""
        return [micro.to(engine.device) for micro in micros], None

    def loss(self, engine: Engine, micro: Any, shared: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the terms of all ranks, as its gradient's average needs it."""
        total, count = engine(micro)
        count_all = distributed.all_sum(count.detach()).clamp(min=1)
        sums = {"loss_sum": total, "loss_count": count, "clips": count.new_tensor(len(micro))}
        return total * (engine.scale / count_all), sums

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        """Mean loss per term."""
        return {"loss": sums["loss_sum"] / max(1.0, sums["loss_count"])}

    def validate(self, engine: Engine, step: int) -> dict[str, float]:
        """The task's metrics on the split that selects the model (every rank computes them, so that none waits)."""
        if self.select_on == "last":
            return {}
        predictions = self.task.predict(self.task_model, self.select_on, engine.device)
        return {f"{self.select_on}/{key}": value for key, value in self.task.metrics(predictions).items()}

    def better(self, metrics: dict[str, float], best: dict[str, float] | None) -> bool:
        """By the task's selection metric; the first validation is always the best so far."""
        key = f"{self.select_on}/{self.task.selection.metric}"
        if best is None:
            return True
        sign = 1 if self.task.selection.mode == "max" else -1
        return sign * metrics[key] > sign * best[key]

    @cached_property
    def trained_on(self) -> TrainedOn:
        """Videos of the model that this began with, and of the task."""
        return read_trained_on(Path(self.job.model)).and_on(self.task.train_videos)

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Encoder as `vlm_dist.load` reads it, the task's head beside it."""
        prefix = "vlm."
        encoder = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        head = {k: v for k, v in weights.items() if not k.startswith(prefix)}
        vlm = type(self.loaded.model)(self.loaded.model.config)
        vlm.load_state_dict(encoder)
        save_vlm(vlm, self.loaded.tokenizer, folder, features=self.reader.meta.provenance, trained_on=self.trained_on)
        save_head(folder, self.job.task, head)
