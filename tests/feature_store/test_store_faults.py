"""Faults of the store, counted: killed writers, damaged and half-copied stores; each test prints its figures (-s)."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from feature_store.commit import staged_attempts
from feature_store.layout import create_store, open_store
from feature_store.plan import PlannedVideo, plan_videos
from feature_store.reader import FeatureReader
from feature_store.snapshot import finalise
from feature_store.storage import open_storage
from feature_store.verify import verify_store
from tests.feature_store.store_tools import features, flip_bit, make_store, provenance, write_shards
from vlm_dist.errors import StoreError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
Corpus = dict[str, np.ndarray | None]

WRITER = """
import sys
import time
from tests.feature_store.store_tools import add_video, features
from feature_store.plan import PlannedVideo, plan_videos
from feature_store.snapshot import finalise
from feature_store.writer import ShardAttempt, shard_done
root, salt, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
videos = [PlannedVideo(f"video-{k}", "") for k in range(count)]
while tasks := plan_videos(root, videos, 2):
    for task in tasks[salt % 2 :] + tasks[: salt % 2]:
        if not shard_done(root, task.shard):
            with ShardAttempt(root, task.shard) as attempt:
                for video in task.videos:
                    time.sleep(0.02)
                    rows = 1 + sum(video.video_id.encode()) * 37 % 1500
                    add_video(attempt, video, features(video.video_id, rows, salt=salt))
                attempt.commit()
    finalise(root)
finalise(root)
"""


@pytest.mark.parametrize(("where", "kills"), [("folder", 50), ("s3", 20)])
def test_killed_writers_leave_a_whole_store(
    where: str, kills: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Three writers on the same growing corpus, whose attempts differ in their bits; SIGKILLs; then all end."""
    root = str(tmp_path / "store") if where == "folder" else f"{request.getfixturevalue('bucket')}/store"
    rng = random.Random(0)
    create_store(root, provenance(), 2048)
    storage = open_storage(root)

    def start(salt: int) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", WRITER, root, str(salt), str(videos_of(salt))]
        return subprocess.Popen(command, env=environment)

    def videos_of(salt: int) -> int:
        return 60 + 5 * salt

    running, killed, salt = [start(salt) for salt in range(3)], 0, 3
    seen: dict[str, bytes] = {}
    began = time.monotonic()
    while killed < kills:
        time.sleep(rng.uniform(0.3, 1.2))
        victim = rng.randrange(3)
        running[victim].send_signal(signal.SIGKILL)
        killed += running[victim].wait() == -signal.SIGKILL
        now = {key: storage.read(key) for key in storage.sizes("_commits")}
        assert all(now.get(name) == data for name, data in seen.items()), "a committed record changed"
        seen = now
        running[victim] = start(salt)
        salt += 1
    for process in running:
        assert process.wait() == 0
    finalise(root)
    report = verify_store(root, deep=True)
    assert (report.problems, report.videos) == ([], videos_of(salt - 1))
    reader = FeatureReader(root, "always")
    for video in range(report.videos):
        video_id = reader.index.video_id(video)
        rows = 1 + sum(video_id.encode()) * 37 % 1500
        assert any(np.array_equal(reader.read(video), features(video_id, rows, salt=s)) for s in range(salt))
    assert not [name for *_, name in staged_attempts(open_store(root))]
    print(
        f"\n{where}: {killed} kills of {salt} writers in {time.monotonic() - began:.0f} s; {report.shards} shards, "
        f"{report.videos} videos, every byte of them one writer's; {len(seen)} records, none changed"
    )


def damaged(root: Path, corpus: Corpus) -> str:
    """What a damaged store does: the problem that verify names, the error that a reader gives; never a wrong byte."""
    problems = verify_store(root, deep=True).problems
    try:
        reader = FeatureReader(root, "always")
        found = {reader.index.video_id(video): reader.read(video) for video in range(reader.index.num_videos)}
        read = "read whole"
    except StoreError:
        found, read = {}, "refused"
    assert all(np.array_equal(rows, corpus.get(video_id)) for video_id, rows in found.items())
    return f"{problems[0].kind} named, {read}" if problems else f"nothing named, {read}"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_flipped_bits(store: Path, corpus: Corpus, seed: int) -> None:
    """200 single bits in shards, index columns, commit records, plan and CURRENT."""
    rng, counts = random.Random(seed), Counter[str]()
    kinds = ["features/c/*/0", "index/*/*/c/0", "_commits/*.json", "_plan/*.json", "index/*/snapshot.json", "CURRENT"]
    files = {kind: sorted(store.glob(kind)) for kind in kinds}
    for _ in range(200):
        kind = rng.choice(kinds)
        path = rng.choice(files[kind])
        data = path.read_bytes()
        flip_bit(path, rng.randrange(len(data)), rng.randrange(8))
        outcome = damaged(store, corpus)
        assert "nothing named" not in outcome, path
        counts[f"{kind.split('/')[0]}: {outcome}"] += 1
        path.write_bytes(data)
    assert not verify_store(store, deep=True).problems
    print("\n" + "\n".join(f"{count:4} {what}" for what, count in sorted(counts.items())))


# Nothing is lost with them: the newest snapshot is found without the first, and the second is a copy of what is there.
NOT_MISSED = ("CURRENT", "store.json")


def test_lost_and_truncated_files_are_named_and_mended(tmp_path: Path, corpus: Corpus) -> None:
    """Every file of a store lost and cut in half in turn; repaired, extracted again, the store is what it was."""
    counts = Counter[str]()
    original = make_store(tmp_path / "original", corpus)
    names = [path.relative_to(original) for path in sorted(original.rglob("*")) if path.is_file()]
    others = ("zarr.json",)  # for other readers; the store's own is refused when it is opened
    for name in names:
        for what in ("lost", "cut"):
            root = tmp_path / "store"
            shutil.copytree(original, root)
            path = root / name
            path.unlink() if what == "lost" else path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            if name == Path("zarr.json"):
                with pytest.raises(StoreError, match=r"zarr\.json"):
                    verify_store(root)
            elif name.name not in others or name.parts[0] == "features":
                outcome = damaged(root, corpus)
                assert "nothing named" not in outcome or name.name in NOT_MISSED, name
                counts[f"{name.parts[0]} {what}: {outcome}"] += 1
                verify_store(root, deep=True, repair=True)
                write_shards(root, corpus)
                finalise(root)
                report = verify_store(root, deep=True)
                assert not report.problems, (name, report.problems)
                reader = FeatureReader(root, "always")
                found = {reader.index.video_id(v): reader.read(v) for v in range(reader.index.num_videos)}
                assert found.keys() == {video_id for video_id, rows in corpus.items() if rows is not None}, (name, what)
                assert all(np.array_equal(rows, corpus[video_id]) for video_id, rows in found.items())
            shutil.rmtree(root)
    print("\n" + "\n".join(f"{count:4} {what}" for what, count in sorted(counts.items())))


@pytest.mark.parametrize("seed", range(5))
def test_a_half_copied_store(store: Path, corpus: Corpus, tmp_path: Path, seed: int) -> None:
    """A copy that broke off, with files of any kind absent: what is read is right, what is missing is named."""
    rng = random.Random(seed)
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    files = [path for path in sorted(copy.rglob("*")) if path.is_file() and path != copy / "zarr.json"]
    for path in rng.sample(files, len(files) // 2):
        path.unlink()
    outcome = damaged(copy, corpus)
    assert "nothing named" not in outcome
    verify_store(copy, deep=True, repair=True)
    given = [PlannedVideo(video_id, f"videos/{video_id}.mp4") for video_id in corpus]
    plan_videos(copy, given, 1)
    write_shards(copy, corpus)
    finalise(copy)
    reader = FeatureReader(copy, "always")
    found = {reader.index.video_id(video): reader.read(video) for video in range(reader.index.num_videos)}
    assert found.keys() == {video_id for video_id, rows in corpus.items() if rows is not None}
    assert all(np.array_equal(rows, corpus[video_id]) for video_id, rows in found.items())
    print(f"\nseed {seed}: {len(files) // 2} of {len(files)} files absent: {outcome}; whole again after a repair")
