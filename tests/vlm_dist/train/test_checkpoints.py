"""A run's folders on disk: what is damaged, left over, no longer needed, or does not fit."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vlm_dist.tasks.world import make_tokenizer, make_vlm
from tests.vlm_dist.train.ranks import run_ranks
from tests.vlm_dist.train.toy import ToyJob, ToyObjective
from vlm_dist.errors import CheckpointError, ConfigError
from vlm_dist.model.checkpoint import save_vlm
from vlm_dist.train.checkpoints import STRAY_SECONDS, CheckpointFolder, put_whole
from vlm_dist.train.config import TrainConfig
from vlm_dist.train.engine import EngineState
from vlm_dist.train.run_folder import RECORD, RunFolder

STATE = EngineState({"w": torch.zeros(2)}, {"exp_avg": {"w": torch.zeros(2)}}, {})
TRAIN = TrainConfig(checkpoint_every=4, log_every=2, threads=1)


def _train(job: ToyJob) -> list[tuple[str, Any]]:
    from vlm_dist.train.worker import run_rank

    events: list[tuple[str, Any]] = []
    try:
        run_rank(job, torch.device("cpu"), lambda kind, payload: events.append((kind, payload)))
    except CheckpointError as error:
        events.append(("error", str(error)))
    return events


def test_a_run_whose_checkpoints_are_all_damaged_stays_an_error(tmp_path: Path) -> None:
    job = ToyJob(str(tmp_path), TRAIN, steps=4)
    assert run_ranks(1, _train, job)[0][-1][0] == "checkpoint"
    (tmp_path / "checkpoints" / "step_00000004" / "weights.safetensors").write_bytes(b"x")
    for attempt in ("checkpoint step_00000004 is damaged", "moved to damaged-"):
        kind, said = run_ranks(1, _train, job)[0][-1]
        assert kind == "error", "the second attempt must not begin at step 0 either"
        assert attempt in said
        assert "--resume never" in said


def test_folders_of_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(5, STATE, {})
    for name in ("step_00000005.bak", "step_", "step_x"):
        (tmp_path / name).mkdir()
    assert [checkpoint.step for checkpoint in folder.committed()] == [5]
    assert folder.newest()[0] is not None


class _Improving(ToyObjective):
    """Every second validation is the best so far."""

    def validate(self, engine: Any, step: int) -> dict[str, float]:
        return {"validation/loss": 100.0 - step if step % 4 == 0 else 200.0}

    def better(self, metrics: dict[str, float], best: dict[str, float] | None) -> bool:
        return best is None or metrics["validation/loss"] < best["validation/loss"]


class _ImprovingJob(ToyJob):
    def build(self, device: torch.device) -> ToyObjective:
        objective = _Improving(self)
        objective.validate_every = 2
        return objective


def test_only_best_models_that_a_checkpoint_refers_to_are_kept(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    old, young = [root / name for name in (".best-00000001-aa", ".staging-00000001-aa")], root / ".best-00000002-bb"
    for path in (*old, young, tmp_path / ".model-cc"):
        path.mkdir(parents=True)
        if path != young:
            os.utime(path, (1, time.time() - 2 * STRAY_SECONDS))
    run_ranks(1, _train, _ImprovingJob(str(tmp_path), TrainConfig(checkpoint_every=6, threads=1), steps=20))
    # Checkpoints 18 and 20 are kept; the best of them are those of steps 16 and 20.
    assert sorted(path.name for path in root.iterdir()) == [
        ".best-00000002-bb", "best-00000016", "best-00000020", "step_00000018", "step_00000020",
    ]  # fmt: skip
    assert not (tmp_path / ".model-cc").exists()
    for step, best in ((18, 16), (20, 20)):
        assert json.loads((root / f"step_{step:08d}" / "state.json").read_text())["best"]["step"] == best


def test_what_is_put_whole_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), fsync(descriptor)))

    def write(folder: Path) -> None:
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "weights").write_bytes(b"x")

    put_whole(tmp_path / "model", write)
    model = tmp_path / "model"
    inodes = [path.stat().st_ino for path in (model / "deep" / "weights", model / "deep", model, tmp_path)]
    assert set(inodes) <= set(synced)
    assert synced[-1] == inodes[-1], "the name itself comes last"
    with pytest.raises(RuntimeError):
        put_whole(tmp_path / "model", lambda folder: (_ for _ in ()).throw(RuntimeError("interrupted")))
    assert (model / "deep" / "weights").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_a_checkpoint_error(small_disk: Path) -> None:
    tokenizer = make_tokenizer()
    vlm = make_vlm(tokenizer)
    (small_disk / "others").write_bytes(b"0" * 250_000)
    with pytest.raises(CheckpointError, match="the model could not be written"):
        save_vlm(vlm, tokenizer, small_disk / "init")
    with pytest.raises(CheckpointError, match="could not be written"):
        put_whole(small_disk / "model", lambda folder: (folder.mkdir(), (folder / "x").write_bytes(b"0" * 400_000)))
    run = RunFolder(small_disk)
    with pytest.raises(CheckpointError, match=r"run\.json could not be written"):
        run.write(metrics="x" * 400_000)
    assert not list(small_disk.glob(f".{RECORD}*"))


@pytest.mark.parametrize("content", ["", '{"status": "unfin', "[1]"])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged.*remove it"):
        RunFolder(tmp_path)


class _SlowToValidate(ToyObjective):
    def validate(self, engine: Any, step: int) -> dict[str, float]:
        time.sleep(1.5)
        return super().validate(engine, step)


class _SlowJob(ToyJob):
    def build(self, device: torch.device) -> ToyObjective:
        return _SlowToValidate(self)


def test_rates_leave_validation_and_saving_out(tmp_path: Path) -> None:
    events = run_ranks(1, _train, _SlowJob(str(tmp_path), TRAIN, steps=14))[0]
    rates = {p.step: p.values["train/clips_per_s"] for kind, p in events if kind == "step"}
    # Validated after step 10: two steps of 8 clips are reported at 12, and take far less than the validation.
    assert rates[12] > 16 / 0.75


def _steps(folder: CheckpointFolder) -> list[int]:
    return [checkpoint.step for checkpoint in folder.committed()]


def test_pruning_keeps_what_verifies(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=9)
    for step in (2, 4, 6, 8):
        folder.save(step, STATE, {}, {"world": 3})
    assert CheckpointFolder.manifest(folder.committed()[0])["world"] == 3
    (tmp_path / "step_00000008" / "optimizer.safetensors").write_bytes(b"x")
    (tmp_path / "damaged-step_00000001-ab").mkdir()
    assert folder.prune_to(2) > 0
    assert _steps(folder) == [4, 6]
    assert not list(tmp_path.glob("damaged-*"))
    for step in (4, 6):
        (tmp_path / f"step_{step:08d}" / "MANIFEST.json").write_text("{}")
    with pytest.raises(CheckpointError, match="nothing was removed"):
        folder.prune_to(1)
    assert _steps(folder) == [4, 6]


def test_digests_are_compared_only_when_asked(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    saved = folder.save(1, STATE, {})
    file = saved.path / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert CheckpointFolder.check(saved, deep=False) == ""
    assert "digest" in CheckpointFolder.check(saved)
    file.unlink()
    assert "missing" in CheckpointFolder.check(saved, deep=False)


def test_only_what_there_is_can_be_gone_on_with(tmp_path: Path) -> None:
    identity = {"store": "a", "videos": "b", "train": {"lr": 1}}
    with pytest.raises(ConfigError, match=r"no checkpoint in .*runs with checkpoints: none"):
        RunFolder.for_identity(tmp_path, "pretrain", identity, "must")
    run = RunFolder.for_identity(tmp_path, "pretrain", identity)
    with run.locked():
        run.write(identity=identity, status="unfinished")
    CheckpointFolder(run.path / "checkpoints").save(1, STATE, {})
    assert RunFolder.for_identity(tmp_path, "pretrain", identity, "must").path == run.path
    assert RunFolder.for_identity(tmp_path, "pretrain", identity, "never").path.name == f"{run.path.name}-2"


def test_a_run_on_another_state_of_the_store_is_found(tmp_path: Path) -> None:
    identity = {"store": "a", "videos": "b", "train": {"lr": 1, "betas": (0.9, 0.98)}}
    run = RunFolder.for_identity(tmp_path, "pretrain", identity)
    with run.locked():
        run.write(identity=identity, status="unfinished", store="/lab/store")
    grown = {**identity, "store": "a2", "videos": "b2"}

    def found(wanted: dict[str, Any], store: str = "/lab/store") -> Path | None:
        other = RunFolder.of_changed_store(tmp_path, "pretrain", wanted, store)
        return other and other.path

    assert found(grown) is None, "it has no checkpoint"
    CheckpointFolder(run.path / "checkpoints").save(1, STATE, {})
    assert found(grown) == run.path
    assert found(identity) is None, "it is found by its name"
    assert found(grown, "/lab/other") is None, "another store is no change of this one"
    assert found({**grown, "train": {"lr": 2}}) is None
    (tmp_path / "pretrain-00000000").mkdir()
    (tmp_path / "pretrain-00000000" / RECORD).write_text("{")
    assert found(grown) == run.path, "whatever another run's record is"
    run.write(identity=grown)  # it went on: the same command finds it, whatever its name
    assert found(grown) == run.path
    run.write(status="finished")
    run.model.mkdir()
    assert found(grown) == run.path, "it is this very run, and done"
    assert found({**grown, "store": "a3"}) is None
