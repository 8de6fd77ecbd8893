"""Batches + engine -> trained weights: the one training loop, for pre-training and every end task.

An `Objective` says what is trained: which batches a step has, what its loss is, how it is validated and exported.
The loop says how: prefetch, accumulate, update, report, validate, save, resume.
"""

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_dist.errors import TrainingError
from vlm_dist.train import distributed
from vlm_dist.train.checkpoints import CheckpointFolder, put_whole
from vlm_dist.train.config import OptimConfig, TrainConfig
from vlm_dist.train.engine import Engine
from vlm_dist.train.schedule import learning_rate

NON_FINITE_LIMIT = 12  # DeepSpeed itself gives up at the smallest loss scale, after 15 and in words of its own


@dataclass(frozen=True)
class StepReport:
    """What a run says of itself every `log_every` steps: means over the steps since the last report."""

    step: int
    values: dict[str, float]


class Objective(ABC):
    """What is trained. `module` is wrapped by the engine; everything else is a pure function of the step."""

    module: nn.Module
    optim: OptimConfig
    total_steps: int
    accumulation: int = 1
    validate_every: int = 0
    notes: Sequence[str] = ()
    """What the user should know about the data before the first step."""

    @abstractmethod
    def micro_batches(self, step: int) -> list[Any]:
        """This rank's batches of an update, on the CPU (called ahead of time, in a thread)."""

    @abstractmethod
    def prepare(self, micros: list[Any], engine: Engine) -> tuple[list[Any], Any]:
        """Batches on the device, and what all of them share: the pool of negatives, global counts (a collective)."""

    @abstractmethod
    def loss(self, engine: Engine, micro: Any, shared: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss to back-propagate, and this rank's sums to report (equal keys on every rank and step)."""

    @abstractmethod
    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        """Sums over ranks and steps -> the values that people read (losses, accuracies)."""

    @abstractmethod
    def validate(self, engine: Engine, step: int) -> dict[str, float]:
        """Metrics on held-out data; empty when there is none (a collective)."""

    def better(self, metrics: dict[str, float], best: dict[str, float] | None) -> bool:
        """Whether these validation metrics choose a new best model; never by default (the last one is exported)."""
        return False

    @abstractmethod
    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write the trained model (called on rank 0)."""


@dataclass
class Progress:
    """Where a run stands; all of it is in a checkpoint."""

    step: int = 0
    best: dict[str, float] | None = None


class Ledger:
    """Sums since the last report, and where the time went."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.started = time.perf_counter()
        self.waited = 0.0

    @contextmanager
    def paused(self) -> Generator[None]:
        """Leave the block's time out of the rates: validating and saving are not training."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    def add(self, sums: dict[str, Tensor]) -> None:
        for key, value in sums.items():
            self.sums[key] = self.sums.get(key, 0.0) + value.detach().double()

    def report(self, step: int, objective: Objective, engine: Engine, extra: dict[str, float]) -> StepReport:
        """Means over ranks since the last report (a collective), then start afresh."""
        keys = sorted(self.sums)
        joined = distributed.all_sum(torch.stack([self.sums[k].reshape(()) for k in keys]).to(engine.device))
        seconds = max(1e-9, time.perf_counter() - self.started)
        sums = dict(zip(keys, joined.tolist(), strict=True))
        values = {f"train/{k}": v for k, v in objective.summarise(sums).items()}
        for key in ("clips", "tokens"):
            if key in sums:
                values[f"train/{key}_per_s"] = sums[key] / seconds
        values["train/data_wait_frac"] = self.waited / seconds
        values |= {f"train/{k}": v for k, v in extra.items()}
        self._clear()
        return StepReport(step, values)


def _prefetched(objective: Objective, start: int, waited: Callable[[float], None]) -> Iterator[tuple[int, list[Any]]]:
    """(step, batches) with the next two steps' batches loading in a thread meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        queue: list[Future[list[Any]]] = []
        for step in range(start, objective.total_steps):
            while len(queue) < 3 and step + len(queue) < objective.total_steps:
                queue.append(pool.submit(objective.micro_batches, step + len(queue)))
            before = time.perf_counter()
            batches = queue.pop(0).result()
            waited(time.perf_counter() - before)
            yield step, batches


def _seed_dropout(seed: int, step: int, micro: int) -> None:
    """Dropout as a pure function of (seed, step, micro-batch, rank): a resumed run drops what it would have dropped."""
    key = f"{seed}/{step}/{micro}/{distributed.rank()}".encode()
    torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little"))


def train(
    objective: Objective,
    engine: Engine,
    cfg: TrainConfig,
    folder: CheckpointFolder,
    progress: Progress,
    emit: Callable[[str, Any], None],
) -> Progress:
    """Run steps `progress.step` … `objective.total_steps`; every rank calls it.

    `emit(kind, payload)` is called on rank 0 with ("step", StepReport), ("validation", {...}), ("checkpoint", path) and
    ("warning", text). Errors: TrainingError when the loss stays non-finite.
    """
    ledger = Ledger()
    non_finite = 0

    def waited(seconds: float) -> None:
        ledger.waited += seconds

    for step, batches in _prefetched(objective, progress.step, waited):
        micros, shared = objective.prepare(batches, engine)
        outcome = None
        for number, micro in enumerate(micros):
            _seed_dropout(cfg.seed, step, number)
            loss, sums = objective.loss(engine, micro, shared)
            engine.backward(loss)
            ledger.add(sums)
            outcome = engine.update(learning_rate(engine.applied, objective.optim))
        assert outcome is not None, "the number of micro-batches is not the engine's accumulation"
        progress.step = step + 1
        non_finite = non_finite + 1 if outcome.skipped else 0
        if non_finite >= NON_FINITE_LIMIT:
            raise TrainingError(
                f"{NON_FINITE_LIMIT} updates in a row had a non-finite gradient, the last at step {step}"
            )
        last = progress.step == objective.total_steps
        if progress.step % cfg.log_every == 0 or last:
            extra = {"lr": learning_rate(engine.applied - 1, objective.optim), "grad_norm": outcome.grad_norm,
                     "loss_scale": outcome.loss_scale, "skipped_steps": float(engine.skipped)}  # fmt: skip
            emit("step", ledger.report(progress.step, objective, engine, extra))
        with ledger.paused():
            if last or (objective.validate_every and progress.step % objective.validate_every == 0):
                _validate(objective, engine, progress, folder, emit)
            if last or progress.step % cfg.checkpoint_every == 0:
                save(engine, folder, progress, emit)
    return progress


def _validate(
    objective: Objective, engine: Engine, progress: Progress, folder: CheckpointFolder, emit: Callable[[str, Any], None]
) -> None:
    engine.module.eval()
    metrics = distributed.of_rank_zero(objective.validate(engine, progress.step))
    engine.module.train()
    if not metrics:
        return
    emit("validation", {"step": progress.step, **metrics})
    if objective.better(metrics, progress.best):
        progress.best = {"step": progress.step, **metrics}
        weights = engine.export_weights()
        if distributed.rank() == 0:
            put_whole(folder.best(progress.step), lambda path: objective.export(weights, path))


def save(engine: Engine, folder: CheckpointFolder, progress: Progress, emit: Callable[[str, Any], None]) -> None:
    """Commit a checkpoint of this very moment (a collective; rank 0 writes)."""
    state = engine.export_state()
    if distributed.rank() == 0:
        saved = folder.save(progress.step, state, {"best": progress.best})
        emit("checkpoint", str(saved.path))
    distributed.barrier()
