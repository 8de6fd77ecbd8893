"""Batches + engine -> trained weights: the one training loop, for pre-training and every end task.

An `Objective` says what is trained: which batches a step has, what its loss is, how it is validated and exported.
The loop says how: prefetch, accumulate, update, report, validate, save, go back where nothing is finite any more.
"""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_dist.errors import CheckpointError, TrainingError
from vlm_dist.train import distributed
from vlm_dist.train.checkpoints import Checkpoint, CheckpointFolder, put_whole
from vlm_dist.train.config import OptimConfig, TrainConfig
from vlm_dist.train.engine import Engine
from vlm_dist.train.feed import Feed
from vlm_dist.train.ledger import Ledger
from vlm_dist.train.saver import Saver
from vlm_dist.train.schedule import learning_rate
from vlm_dist.train.watch import Watch

NON_FINITE_LIMIT = 12  # DeepSpeed itself gives up at the smallest loss scale, after 15 and in words of its own
GOING_BACK_LIMIT = 3  # windows of the data that a run may leave out


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
        """This rank's batches of the update at a position, on the CPU (called ahead of time, in a thread)."""

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

    def origin_of(self, position: int) -> dict[str, Any]:
        """What the batches of a position were made of, as JSON, for people who look for what broke an update."""
        return {}

    @abstractmethod
    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write the trained model (called on rank 0)."""


@dataclass
class Progress:
    """Where a run stands; all of it is in a checkpoint."""

    step: int = 0
    """Updates that are done."""
    best: dict[str, float] | None = None
    left_out: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """First and last position of each window of the data that is not trained on, ascending."""

    def position(self, later: int = 0) -> int:
        """Where in the data the update stands that comes `later` updates after the next one."""
        position = self.step + later
        for first, last in self.left_out:
            if position >= first:
                position += last - first + 1
        return position


def _seed_dropout(seed: int, position: int, micro: int) -> None:
    """Dropout as a pure function of (seed, position, micro-batch, rank): a resumed run drops what it would have."""
    key = f"{seed}/{position}/{micro}/{distributed.rank()}".encode()
    torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little"))


def train(
    objective: Objective,
    engine: Engine,
    cfg: TrainConfig,
    folder: CheckpointFolder,
    progress: Progress,
    emit: Callable[[str, Any], None],
    *,
    about: dict[str, Any] | None = None,
    deadline: float | None = None,
) -> Progress:
    """Run steps `progress.step` … `objective.total_steps`, or until the deadline; every rank calls it.

    `emit(kind, payload)` is called on rank 0 with ("step", StepReport), ("validation", {...}), ("checkpoint", path) and
    ("warning", text); `about` is what checkpoints say of the run; `deadline` is a time of the clock (`time.time`).
    Errors: TrainingError when gradients stay non-finite, or the ranks' weights differ.
    """
    ledger, infinite, end = Ledger(), list[int](), objective.total_steps
    watch = Watch(
        folder.root.parent / "stacks", distributed.rank(), cfg.hang_s, lambda text: emit("warning", text)
    )  # fmt: skip
    saver = Saver(folder, about or {}, cfg.checkpoint_every, emit)
    with watch, saver, Feed(objective.micro_batches, end) as feed:
        while progress.step < end:
            position = progress.position()
            batches, waited = feed.take(position, progress.position)
            ledger.waited += waited
            micros, shared = objective.prepare(batches, engine)
            outcome = None
            for number, micro in enumerate(micros):
                _seed_dropout(cfg.seed, position, number)
                loss, sums = objective.loss(engine, micro, shared)
                engine.backward(loss)
                ledger.add(sums)
                outcome = engine.update(learning_rate(engine.applied, objective.optim))
                watch.beat()
            assert outcome is not None, "the number of micro-batches is not the engine's accumulation"
            progress.step += 1
            ledger.updates += 1
            infinite = [*infinite, position] if outcome.skipped else []
            if len(infinite) >= NON_FINITE_LIMIT:
                saver.wait()
                progress, infinite = _go_back(objective, engine, folder, infinite, emit), []
                continue
            over = progress.step == end
            if progress.step % cfg.log_every == 0 or over:
                extra = {"lr": learning_rate(engine.applied - 1, objective.optim), "grad_norm": outcome.grad_norm,
                         "loss_scale": outcome.loss_scale, "skipped_steps": float(engine.skipped)}  # fmt: skip
                emit("step", ledger.report(progress.step, objective.summarise, engine.device, extra))
                over = over or (deadline is not None and distributed.of_rank_zero(time.time() >= deadline))
            with ledger.paused(), watch.paused():
                if progress.step == end or (objective.validate_every and progress.step % objective.validate_every == 0):
                    saver.wait()  # it may be about to remove best models that no checkpoint refers to
                    _validate(objective, engine, progress, folder, emit)
                if over or (not infinite and saver.due(progress.step)):  # among bad updates there's nothing to keep
                    saver.save(engine, progress.step, {"best": progress.best, "left_out": progress.left_out})
            if over:
                break
    distributed.barrier()
    return progress


def _go_back(
    objective: Objective, engine: Engine, folder: CheckpointFolder, window: list[int], emit: Callable[[str, Any], None]
) -> Progress:
    """To the newest checkpoint, after which the window's data is left out; what it was made of is written down."""
    first, last = window[0], window[-1]
    what = f"{len(window)} updates in a row ({first} to {last}) had a non-finite gradient"
    progress = restore(engine, folder, emit)
    if not progress.step:
        raise TrainingError(f"{what}, and there is no checkpoint to go back to: lower train.optim.lr, or take bf16")
    if len(progress.left_out) >= GOING_BACK_LIMIT:
        raise TrainingError(f"{what}, after {len(progress.left_out)} windows of the data were left out for it already")
    progress.left_out = sorted([*progress.left_out, (first, last)])
    if distributed.rank() == 0:
        record = folder.root / "left-out.jsonl"
        with record.open("a", encoding="utf-8") as file:
            for position in window:
                file.write(json.dumps({"position": position, **objective.origin_of(position)}) + "\n")
        emit("warning", f"{what}: back to step {progress.step}, and that data is left out; it is listed in {record}")
    distributed.barrier()
    return progress


def restore(engine: Engine, folder: CheckpointFolder, emit: Callable[[str, Any], None]) -> Progress:
    """Load the newest checkpoint that verifies (a collective).

    Errors: CheckpointError when all are damaged, now or at an earlier attempt.
    """
    found: tuple[Checkpoint | None, list[str], bool] = (None, [], False)
    if distributed.rank() == 0:
        found = (*folder.newest(), folder.all_damaged)
    checkpoint, complaints, all_damaged = distributed.of_rank_zero(found)
    for complaint in complaints:
        emit("warning", complaint)
    if all_damaged:
        why = complaints[0] if complaints else "what there was has been moved to damaged-…"
        raise CheckpointError(
            f"no checkpoint in {folder.root} is whole: {why}. Type the command with --resume never to start again"
        )
    if checkpoint is None:
        return Progress()
    state, extra = folder.load(checkpoint)
    engine.load_state(state)
    emit("resumed", {"step": checkpoint.step, "path": str(checkpoint.path)})
    return Progress(checkpoint.step, extra.get("best"), [(first, last) for first, last in extra.get("left_out", [])])


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
        weights, refused = engine.export_weights(), ""
        if distributed.rank() == 0:
            try:
                put_whole(folder.best(progress.step), lambda path: objective.export(weights, path))
            except CheckpointError as error:
                refused = str(error)
        if refused := distributed.of_rank_zero(refused):
            emit("warning", f"{refused}. Training goes on with the best model before this one; make room")
        else:
            progress.best = {"step": progress.step, **metrics}
