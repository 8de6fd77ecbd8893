"""Ray Train + DeepSpeed on two real workers: live reports, a killed worker, errors in their own words."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.vlm_dist.train.toy import ToyJob
from vlm_dist.errors import TaskDataError
from vlm_dist.train.config import TrainConfig
from vlm_dist.train.ray_trainer import Workers, run_training

TRAIN = TrainConfig(checkpoint_every=4, log_every=2, max_failures=2, threads=1, timeout_s=30)


def _run(job: ToyJob, workers: int = 2) -> tuple[Any, list[tuple[str, Any]]]:
    events: list[tuple[str, Any]] = []
    outcome = run_training(
        job, Workers(workers, use_gpu=False, cpus_each=0.5), lambda kind, payload: events.append((kind, payload))
    )
    return outcome, events


@pytest.mark.slow
def test_killed_worker_leaves_the_weights_bit_identical(tmp_path: Path, ray_session: None) -> None:
    calm, events = _run(ToyJob(str(tmp_path / "calm"), TRAIN))
    assert calm.step == 20
    steps = [payload.step for kind, payload in events if kind == "step"]
    assert steps == list(range(2, 21, 2))
    losses = [payload.values["train/loss"] for kind, payload in events if kind == "step"]
    assert losses[-1] < losses[0]
    assert [kind for kind, _ in events].count("checkpoint") == 5
    assert calm.metrics["validation/loss"] > 0

    (tmp_path / "shot").mkdir()
    shot, events = _run(ToyJob(str(tmp_path / "shot"), TRAIN, kill_at=14))
    assert (tmp_path / "shot" / "killed").exists()
    assert shot.resumed_from == 12
    one, two = (load_file(Path(o.model) / "model.safetensors") for o in (calm, shot))
    for name in one:
        assert (one[name] == two[name]).all(), name


@pytest.mark.slow
def test_a_hanging_worker_is_found_and_training_goes_on(tmp_path: Path, ray_session: None) -> None:
    calm, _ = _run(ToyJob(str(tmp_path / "calm"), TRAIN))
    (tmp_path / "hung").mkdir()
    train = TRAIN.model_copy(update={"hang_s": 3})
    hung, events = _run(ToyJob(str(tmp_path / "hung"), train, hang_at=14))
    assert (tmp_path / "hung" / "killed").exists()
    assert hung.resumed_from == 12
    stacks = [file.read_text() for file in (tmp_path / "hung" / "stacks").iterdir()]
    assert any("micro_batches" in text for text in stacks), "of the rank that hung"
    assert any("made no progress" in payload for kind, payload in events if kind == "warning")
    one, two = (load_file(Path(o.model) / "model.safetensors") for o in (calm, hung))
    assert all((one[name] == two[name]).all() for name in one)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_users_error_is_told_in_its_own_words_and_not_retried(
    tmp_path: Path, ray_session: None, workers: int
) -> None:
    with pytest.raises(TaskDataError, match="row 7 of step 3 is not a number"):
        _run(ToyJob(str(tmp_path), TRAIN, fail_at=3), workers)
