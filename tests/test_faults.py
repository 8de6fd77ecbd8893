"""Fault injection on the real commands: interrupted, killed, out of disk; then the same command again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from feature_store.reader import FeatureReader
from feature_store.verify import verify_store
from tests.test_whole_way import SMALL
from vlm_dist.demo.world import render_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
EXTRACT = ("extract", "world/videos", "--random-weights", "0")
PRETRAIN = ("pretrain", "--gpus", "0", "--workers", "2", "--max-steps", "300", "--set", "train.checkpoint_every=20")


class Command:
    """One command in a process of its own, as a shell would start it."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vlm_dist", *words],
            cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def end(self, timeout: float = 400) -> tuple[int, str]:
        """Exit code and all that was printed."""
        text, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, text

    def hit(self, number: signal.Signals, when: Callable[[], bool], patience: float = 240) -> None:
        """Send a signal as soon as `when` says so."""
        deadline = time.monotonic() + patience
        while not when():
            assert self.process.poll() is None, f"ended before it was hit:\n{self.end()[1]}"
            assert time.monotonic() < deadline, "never came to the point where it was to be hit"
            time.sleep(0.1)
        self.process.send_signal(number)


def run(folder: Path, *words: str, code: int = 0) -> str:
    """Run a command to its end."""
    found, text = Command(folder, *words).end()
    assert found == code, f"{words} ended with {found}:\n{text}"
    return text


def run_json(folder: Path, *words: str) -> Any:
    """The JSON of a command."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "vlm_dist", *words, "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def committed(folder: Path) -> int:
    """Shards of the workspace's store that are committed."""
    return len(list((folder / "store" / "_commits").glob("*.json")))


def newest_step(folder: Path, kind: str) -> int:
    """Step of the newest committed checkpoint of the workspace's runs of one kind; 0 without any."""
    return max((int(p.name[5:]) for p in (folder / "runs").glob(f"{kind}-*/checkpoints/step_*")), default=0)


def left_behind(folder: Path) -> list[str]:
    """Living processes that have to do with this folder or that are a Ray or MLflow of this test."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "cwd", "status"]):
        line = " ".join(process.info["cmdline"] or ())
        here = str(folder) in line or (process.info["cwd"] or "").startswith(str(folder))
        if here and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found


def wait_for_the_end() -> None:
    """Workers of a killed driver live on for some seconds."""
    deadline = time.monotonic() + 60
    while ray_workers():
        assert time.monotonic() < deadline, ray_workers()
        time.sleep(0.5)


def ray_workers() -> list[str]:
    """Ray's training workers on this machine."""
    lines = (" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))
    return [line for line in lines if line.startswith("ray::") and "Train" in line]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered corpus, copied into every workspace."""
    root = tmp_path_factory.mktemp("world")
    render_world(root / "world", videos=12, seed=3)
    return root / "world"


@pytest.fixture
def folder(tmp_path: Path, world: Path) -> Path:
    """A fresh workspace."""
    shutil.copytree(world, tmp_path / "world")
    (tmp_path / "vlm-dist.toml").write_text(SMALL)
    return tmp_path


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Path:
    """The same commands without any fault."""
    root = tmp_path_factory.mktemp("calm")
    shutil.copytree(world, root / "world")
    (root / "vlm-dist.toml").write_text(SMALL)
    run(root, *EXTRACT)
    run(root, *PRETRAIN)
    return root


def features_of(folder: Path) -> dict[str, np.ndarray]:
    """All features of a workspace's store, by video."""
    reader = FeatureReader(folder / "store", check="always")
    return {reader.index.video_id(v): reader.read(v) for v in range(reader.index.num_videos)}


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    """The pre-trained weights of a workspace."""
    (model,) = (folder / "runs").glob("pretrain-*/model/model.safetensors")
    return load_file(model)


def assert_equal(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert np.array_equal(one[name], two[name]), name


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_hit_extraction_is_finished_by_the_same_command(folder: Path, calm: Path, number: signal.Signals) -> None:
    command = Command(folder, *EXTRACT)
    command.hit(number, lambda: committed(folder) >= 2)
    code, text = command.end()
    before = {path.name: path.read_bytes() for path in (folder / "store" / "_commits").glob("*.json")}
    assert before
    if number != signal.SIGKILL:
        assert code == 130, text
        assert "the same command goes on" in text
        assert "Traceback" not in text
    run(folder, *EXTRACT)
    for name, data in before.items():
        assert (folder / "store" / "_commits" / name).read_bytes() == data, "a committed shard was redone"
    report = verify_store(folder / "store", deep=True, repair=False)
    assert not report.problems
    assert_equal(features_of(folder), features_of(calm))
    assert "Nothing to do" in run(folder, *EXTRACT)
    assert not [row for row in run_json(folder, "jobs", "list") if row["status"] == "RUNNING"]
    assert not left_behind(folder)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_hit_pretraining_ends_in_the_very_same_weights(folder: Path, calm: Path, number: signal.Signals) -> None:
    run(folder, *EXTRACT)
    for _ in range(2):  # the second time while it goes on from what the first left
        before = newest_step(folder, "pretrain")
        command = Command(folder, *PRETRAIN)
        command.hit(number, lambda before=before: newest_step(folder, "pretrain") > before)
        code, text = command.end()
        assert "Traceback" not in text
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130), text
        wait_for_the_end()
    assert "going on from step" in run(folder, *PRETRAIN)
    assert_equal(weights_of(folder), weights_of(calm))
    rows = run_json(folder, "jobs", "list")
    pretraining = [row for row in rows if row["kind"] == "pretrain"]
    assert [row["status"] for row in pretraining] == ["FINISHED"], "a resumed run is one run"
    assert not left_behind(folder)


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(folder: Path, calm: Path) -> None:
    run(folder, *EXTRACT)
    command = Command(folder, *PRETRAIN)
    command.hit(signal.SIGKILL, lambda: newest_step(folder, "pretrain") >= 40)
    command.end()
    wait_for_the_end()
    newest = max((folder / "runs").glob("pretrain-*/checkpoints/step_*"))
    data = bytearray((newest / "weights.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "weights.safetensors").write_bytes(data)
    text = run(folder, *PRETRAIN)
    assert f"checkpoint {newest.name} is damaged: weights.safetensors" in text
    assert "going on from step" in text
    assert_equal(weights_of(folder), weights_of(calm))


def test_interrupted_end_tasks_go_on(folder: Path) -> None:
    run(folder, *EXTRACT)
    run(folder, *PRETRAIN, "--max-steps", "10")
    tune = (
        "finetune",
        "retrieval",
        "--gpus",
        "0",
        "--set",
        "finetune.max_steps=400",
        "--set",
        "train.checkpoint_every=5",
    )
    command = Command(folder, *tune)
    command.hit(signal.SIGINT, lambda: newest_step(folder, "finetune-retrieval") >= 1)
    code, text = command.end()
    assert code == 130, text
    assert "going on from step" in run(folder, *tune)
    command = Command(folder, "evaluate", "retrieval")
    time.sleep(3)
    command.process.send_signal(signal.SIGINT)
    code, text = command.end()
    assert code in (0, 130), text
    assert run_json(folder, "evaluate", "retrieval")["form"] == "fine-tuned"
    assert not [row for row in run_json(folder, "jobs", "list") if row["status"] == "RUNNING"]
    assert not left_behind(folder)


def test_a_full_disk_stops_extraction_with_a_valid_store(folder: Path, small_disk: Path, calm: Path) -> None:
    weights = folder / "s3d.pth"
    kept = next((calm / "store" / "_extractor").glob("*.safetensors"))
    import torch
    from safetensors.torch import load_file as load_torch

    torch.save(load_torch(kept), weights)
    words = ("extract", "world/videos", "--weights", "s3d.pth", "--store", str(small_disk / "store"))
    text = run(folder, *words, code=1)
    assert "No space left" in text or "full" in text
    assert "Traceback" not in text
    problems = verify_store(small_disk / "store", deep=True, repair=False).problems
    assert {problem.kind for problem in problems} <= {"unfinished", "open", "not-extracted"}, problems
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run(folder, *words)
    reader = FeatureReader(small_disk / "store", check="always")
    assert reader.index.num_videos == len(features_of(calm))


def test_the_demo_learns_and_cleans_up(tmp_path: Path) -> None:
    before = {process.pid for process in psutil.process_iter()}
    result = run_json(tmp_path, "demo", str(tmp_path / "demo"))
    assert result["captions"] >= 100
    assert result["recall_at_5"] >= 5 * result["chance_recall_at_5"]
    assert result["frame_accuracy"] >= result["constant_frame_accuracy"] + 0.10
    assert sorted(result["failures"].values()) == [
        "duplicate", "empty_file", "no_video_stream", "not_a_video", "truncated",
    ]  # fmt: skip
    time.sleep(2)
    mine = [p for p in psutil.process_iter(["cmdline", "username"]) if p.pid not in before]
    lines = [" ".join(p.info["cmdline"] or ()) for p in mine if p.pid != os.getpid()]
    assert not [line for line in lines if "ray" in line or "mlflow" in line or "vlm_dist" in line], lines
