"""The loop on toy ranks: where in the data it stands, what it survives, when it stops, and what it leaves out."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.vlm_dist.train.ranks import run_ranks
from tests.vlm_dist.train.toy import ToyJob, ToyObjective
from vlm_dist.errors import CheckpointError, TrainingError
from vlm_dist.train import checkpoints, loop
from vlm_dist.train.checkpoints import CheckpointFolder
from vlm_dist.train.config import TrainConfig
from vlm_dist.train.engine import Engine
from vlm_dist.train.feed import Feed
from vlm_dist.train.loop import Progress
from vlm_dist.train.worker import run_rank

TRAIN = TrainConfig(checkpoint_every=4, log_every=2, threads=1)
Events = list[tuple[str, Any]]


def _train(job: ToyJob) -> Events:
    events: Events = []
    try:
        outcome = run_rank(job, torch.device("cpu"), lambda kind, payload: events.append((kind, payload)))
        events.append(("end", outcome))
    except (CheckpointError, TrainingError) as error:
        events.append(("error", str(error)))
    return events


def _said(events: Events, kind: str) -> list[Any]:
    return [payload for one, payload in events if one == kind]


@given(
    windows=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), max_size=3),
    start=st.integers(0, 40),
)
def test_windows_are_left_out_and_nothing_else(windows: list[tuple[int, int]], start: int) -> None:
    left_out: list[tuple[int, int]] = []
    first = 0
    for gap, length in windows:
        first += gap
        left_out.append((first, first + length - 1))
        first += length + 1
    outside = [p for p in range(200) if not any(a <= p <= b for a, b in left_out)]
    progress = Progress(step=start, left_out=left_out)
    assert [progress.position(k) for k in range(20)] == outside[start : start + 20]


def test_the_feed_loads_ahead_and_forgets_what_is_left_out() -> None:
    loaded: list[int] = []

    def load(position: int) -> list[Any]:
        loaded.append(position)
        return [position]

    with Feed(load, 100) as feed:
        assert feed.take(0, lambda k: k)[0] == [0]
        assert feed.take(1, lambda k: 1 + k)[0] == [1]
        assert feed.take(50, lambda k: 50 + k)[0] == [50]
        assert feed.take(99, lambda k: 99 + k)[0] == [99]
        assert feed.take(100, lambda k: 100 + k)[0] == [100], "a window that was left out leads beyond the end"
    assert max(loaded) == 100
    assert loaded.count(1) == 1


class _Poisoned(ToyObjective):
    """Data that no update survives, at positions 9 to 20."""

    def micro_batches(self, step: int) -> list[Any]:
        batches = super().micro_batches(step)
        return [batch * float("nan") for batch in batches] if 9 <= step < 21 else batches

    def origin_of(self, position: int) -> dict[str, Any]:
        return {"videos": [f"v{position}"]}


class _PoisonedJob(ToyJob):
    def build(self, device: torch.device) -> ToyObjective:
        return _Poisoned(self)


def _poisoned(job: ToyJob) -> Events:
    return _train(job)


@pytest.mark.parametrize("world", [1, 2])
def test_a_window_of_bad_data_is_left_out(tmp_path: Path, world: int) -> None:
    job = _PoisonedJob(str(tmp_path), TRAIN, steps=24)
    events = run_ranks(world, _poisoned, job)[0]
    (warning,) = _said(events, "warning")
    assert "12 updates in a row (9 to 20) had a non-finite gradient: back to step 8" in warning
    assert _said(events, "end")[0].step == 24
    record = [json.loads(line) for line in (tmp_path / "checkpoints" / "left-out.jsonl").read_text().splitlines()]
    assert record == [{"position": p, "videos": [f"v{p}"]} for p in range(9, 21)]
    newest, _ = CheckpointFolder(tmp_path / "checkpoints").newest()
    assert newest is not None
    _, extra = CheckpointFolder.load(newest)
    assert extra["left_out"] == [[9, 20]]
    assert all(torch.isfinite(w).all() for w in CheckpointFolder.load(newest)[0].weights.values())


def test_bad_data_before_the_first_checkpoint_is_an_error(tmp_path: Path) -> None:
    job = _PoisonedJob(str(tmp_path), TRAIN.model_copy(update={"checkpoint_every": 100}), steps=24)
    assert "no checkpoint to go back to" in _said(run_ranks(1, _poisoned, job)[0], "error")[0]


def test_a_deadline_ends_in_a_checkpoint_and_the_rest_follows(tmp_path: Path) -> None:
    whole = run_ranks(2, _train, ToyJob(str(tmp_path / "whole"), TRAIN, steps=12))[0]
    job = ToyJob(str(tmp_path / "cut"), TRAIN, steps=12, deadline=time.time() - 1)
    cut = run_ranks(2, _train, job)[0]
    (stopped,) = _said(cut, "end")
    assert (stopped.model, stopped.step) == ("", 2), "at the first report"
    assert not (tmp_path / "cut" / "model").exists()
    rest = run_ranks(1, _train, ToyJob(str(tmp_path / "cut"), TRAIN, steps=12))[0]
    assert _said(rest, "resumed")[0]["step"] == 2
    ended = [_said(events, "end")[0] for events in (whole, rest)]
    assert ended[0].step == ended[1].step == 12


def _train_on_full_disk(job: ToyJob) -> Events:
    """The disk refuses the checkpoints of steps 10 to 13, and the best model of step 10."""
    save = checkpoints.save_file
    refusing = False

    class Watched(CheckpointFolder):
        def save(self, step: int, *args: Any) -> Any:
            nonlocal refusing
            refusing = 10 <= step < 14
            return super().save(step, *args)

    def save_file(*args: Any, **named: Any) -> None:
        if refusing:
            raise OSError(28, "No space left on device")
        save(*args, **named)

    def put_whole(*args: Any) -> None:
        raise CheckpointError("best-00000010 could not be written: no room")

    checkpoints.save_file, loop.put_whole = save_file, put_whole
    import vlm_dist.train.worker as worker

    worker.CheckpointFolder = Watched
    return _train(job)


def test_training_outlives_a_full_disk(tmp_path: Path) -> None:
    train = TRAIN.model_copy(update={"checkpoint_every": 10})
    events = run_ranks(1, _train_on_full_disk, _BestJob(str(tmp_path), train, steps=19))[0]
    warnings = _said(events, "warning")
    assert "best-00000010 could not be written" in warnings[0]
    refused = [line for line in warnings if "No space left" in line]
    assert len(refused) == 4, "steps 10 to 13, tried again at every tenth of the interval"
    assert "Training goes on" in refused[0]
    assert [Path(path).name for path in _said(events, "checkpoint")] == ["step_00000014", "step_00000019"]
    assert _said(events, "end")[0].step == 19


class _Best(ToyObjective):
    def better(self, metrics: dict[str, float], best: dict[str, float] | None) -> bool:
        return True


class _BestJob(ToyJob):
    def build(self, device: torch.device) -> ToyObjective:
        return _Best(self)


def _diverging(job: ToyJob) -> Events:
    flips = Engine.weights_hash

    def hashed(self: Engine) -> int:
        from vlm_dist.train import distributed

        if distributed.rank() == 1 and self.applied == 8:
            with torch.no_grad():
                next(self.module.parameters()).view(-1)[0] += 1e-6
        return flips(self)

    Engine.weights_hash = hashed
    return _train(job)


def test_ranks_that_drift_apart_are_named_and_not_saved(tmp_path: Path) -> None:
    events = run_ranks(2, _diverging, ToyJob(str(tmp_path), TRAIN, steps=20))
    for told in events:
        (said,) = _said(told, "error")
        assert "after step 8 the weights of rank" in said
    assert [c.step for c in CheckpointFolder(tmp_path / "checkpoints").committed()] == [4]
