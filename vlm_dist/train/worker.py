"""One rank: job -> objective + engine -> the loop, from the newest good checkpoint to the exported model."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from vlm_dist.train import distributed
from vlm_dist.train.checkpoints import CheckpointFolder, put_whole
from vlm_dist.train.config import TrainConfig
from vlm_dist.train.engine import Engine, resolve_precision
from vlm_dist.train.loop import Objective, restore, train

Emit = Callable[[str, Any], None]


class TrainJob(Protocol):
    """What is sent to every rank: small, picklable, equal on all of them."""

    @property
    def out(self) -> str:
        """Folder of the run."""
        ...

    @property
    def train(self) -> TrainConfig:
        """Settings of the loop and the engine."""
        ...

    @property
    def about(self) -> dict[str, str]:
        """What checkpoints say of the run: the store's fingerprint, a digest of what is trained, versions."""
        ...

    @property
    def deadline(self) -> float | None:
        """Time of the clock (`time.time`) at which the run stops with a checkpoint; None: it runs to its end."""
        ...

    def build(self, device: torch.device) -> Objective:
        """The objective of this rank (torch.distributed is initialised, or this process is alone)."""
        ...


@dataclass(frozen=True)
class TrainOutcome:
    """End of a run, as rank 0 tells it."""

    model: str
    """Folder of the exported model; empty where the deadline came first."""
    step: int
    metrics: dict[str, float]
    resumed_from: int
    train_seconds: float


def run_rank(job: TrainJob, device: torch.device, emit: Emit) -> TrainOutcome:
    """Train `job` on this rank and export the model to `<out>/model` (rank 0)."""
    out = Path(job.out)
    if device.type == "cpu":
        cores = os.cpu_count() or 1
        torch.set_num_threads(job.train.threads or max(1, cores // distributed.world_size()))
    torch.manual_seed(job.train.seed)
    objective = job.build(device)
    emit(
        "plan",
        {"steps": objective.total_steps, "ranks": distributed.world_size(), "accumulation": objective.accumulation},
    )
    for note in objective.notes:
        emit("warning", note)
    engine = Engine(
        objective.module,
        objective.optim,
        precision=resolve_precision(job.train.precision, device),
        zero_stage=job.train.zero_stage,
        accumulation=objective.accumulation,
        device=device,
    )
    folder = CheckpointFolder(out / "checkpoints", job.train.keep_checkpoints)
    progress = restore(engine, folder, emit)
    resumed_from = progress.step
    engine.module.train()
    started = time.perf_counter()
    metrics: dict[str, float] = {}

    def remember(kind: str, payload: Any) -> None:
        if kind == "validation":
            metrics.update(payload)
        elif kind == "step":
            metrics.update(payload.values)
        emit(kind, payload)

    about = {"world": distributed.world_size(), "global_batch": job.train.global_batch, **job.about}
    progress = train(
        objective, engine, job.train, folder, progress, remember, about=about, deadline=job.deadline
    )  # fmt: skip
    if progress.step < objective.total_steps:
        return TrainOutcome("", progress.step, metrics, resumed_from, time.perf_counter() - started)
    weights = engine.export_weights()
    if distributed.rank() == 0:
        chosen = folder.best(int(progress.best["step"])) if progress.best else None
        put_whole(
            out / "model", lambda path: shutil.copytree(chosen, path) if chosen else objective.export(weights, path)
        )
    distributed.barrier()
    if progress.best:
        metrics |= {f"best/{k}": v for k, v in progress.best.items()}
    return TrainOutcome(str(out / "model"), progress.step, metrics, resumed_from, time.perf_counter() - started)
