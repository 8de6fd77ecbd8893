"""feature_store.writer and commit: one winner whatever happens in between, refusals, a full disk, SIGKILL."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from feature_store.commit import commit_key, committed_shards, read_commit
from feature_store.files import SCRATCH
from feature_store.index import StoreIndex
from feature_store.layout import StoreMeta, create_store, open_store, shard_key
from feature_store.leftovers import sweep
from feature_store.local_storage import LocalStorage
from feature_store.plan import PlannedVideo, Segment, plan_videos, read_plan
from feature_store.reader import FeatureReader
from feature_store.records import VideoRecord
from feature_store.snapshot import finalise, snapshot_names
from feature_store.verify import verify_store
from feature_store.writer import ShardAttempt, shard_done
from tests.feature_store.store_tools import F, add_video, features, make_store, provenance, random_corpus, write_shards
from vlm_dist.errors import StoreError


def test_bytes_are_those_of_zarr_python(tmp_path: Path) -> None:
    """A shard file equals the one that zarr-python writes with the same codecs, byte for byte."""
    rows = features("v", 700)
    root = make_store(tmp_path / "ours", {"v": rows}, 1024)
    theirs = zarr.create_array(
        tmp_path / "theirs",
        shape=(1024, F),
        shards=(1024, F),
        chunks=(256, F),
        dtype="float16",
        compressors=[zarr.codecs.Crc32cCodec()],
        fill_value=0,
    )
    theirs[:700] = rows
    assert (root / "features/c/0/0").read_bytes() == (tmp_path / "theirs/c/0/0").read_bytes()
    mine, other = (
        json.loads(path.read_text()) for path in (root / "features/zarr.json", tmp_path / "theirs/zarr.json")
    )
    assert all(mine[key] == other[key] for key in ("shape", "data_type", "chunk_grid", "fill_value", "codecs"))


def test_other_readers_see_the_same(tmp_path: Path) -> None:
    corpus = random_corpus(12)
    root = make_store(tmp_path / "store", corpus)
    reader = FeatureReader(root, "always")
    array = zarr.open_group(root, mode="r")["features"]
    driver = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(root / "features")}}
    tensor = tensorstore.open(driver, read=True).result()
    for video in range(reader.index.num_videos):
        rows = corpus[reader.index.video_id(video)]
        start = int(reader.index.shard[video]) * 1024 + int(reader.index.row[video])
        assert np.array_equal(reader.read(video), rows)
        assert np.array_equal(array[start : start + len(rows)], rows)
        assert np.array_equal(tensor[start : start + len(rows)].read().result(), rows)


def test_a_snapshot_names_no_shard_whose_move_may_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the rename and before its fsync: the next one makes it durable, once."""
    create_store(tmp_path, provenance(), 512)
    (task,) = plan_videos(tmp_path, [PlannedVideo("v", "v.mp4")], 1)
    attempt = ShardAttempt(tmp_path, task.shard)
    add_video(attempt, task.videos[0], features("v", 100))
    with monkeypatch.context() as patch:
        patch.setattr("feature_store.writer.roll_forward", lambda *_: None)
        patch.setattr(attempt, "_remove", lambda: None)
        assert attempt.commit()
    staged = tmp_path / "_staging" / f"{task.shard:06d}.{read_commit(open_store(tmp_path), task.shard).attempt}"
    published = tmp_path / shard_key(task.shard)
    published.parent.mkdir(parents=True)
    (staged / "shard").rename(published)
    synced: list[Path] = []
    monkeypatch.setattr("feature_store.local_storage.fsync_dir", synced.append)
    finalise(tmp_path)
    before_the_snapshot = synced[: synced.index(tmp_path / "index")]
    assert {published.parent, published.parents[1], tmp_path / "features"} <= set(before_the_snapshot)
    assert not list((tmp_path / "_staging").iterdir())
    synced.clear()
    finalise(tmp_path)
    assert published.parent not in synced


def test_a_shard_of_another_extractor_is_refused(tmp_path: Path) -> None:
    """Copied by hand from a store of the same shape: the record names what made its features."""
    corpus = {"v": features("v", 100)}
    root, other = make_store(tmp_path / "store", corpus), tmp_path / "other"
    create_store(other, provenance(weights_sha256="1" * 64), 1024)
    write_shards(other, corpus)
    shutil.copytree(other / "_commits", root / "_commits", dirs_exist_ok=True)
    with pytest.raises(StoreError, match=r"000000\.json is of another extractor's features"):
        finalise(root)
    (problem,) = verify_store(root).problems[:1]
    assert "another extractor" in problem.message


def test_the_second_attempt_loses_whole(tmp_path: Path) -> None:
    create_store(tmp_path, provenance(), 512)
    (task,) = plan_videos(tmp_path, [PlannedVideo("v", "v.mp4")], 1)
    attempts = [ShardAttempt(tmp_path, task.shard) for _ in range(3)]
    for salt, attempt in enumerate(attempts):
        add_video(attempt, task.videos[0], features("v", 100, salt=salt))
    assert not shard_done(tmp_path, task.shard)
    assert [attempts[1].commit(), attempts[0].commit(), attempts[2].commit()] == [True, False, False]
    assert shard_done(tmp_path, task.shard)
    finalise(tmp_path)
    assert np.array_equal(FeatureReader(tmp_path).read(0), features("v", 100, salt=1))
    assert not list((tmp_path / "_staging").iterdir())


def test_a_loser_whose_staging_was_swept(tmp_path: Path) -> None:
    create_store(tmp_path, provenance(), 512)
    (task,) = plan_videos(tmp_path, [PlannedVideo("v", "v.mp4")], 1)
    late = ShardAttempt(tmp_path, task.shard)
    add_video(late, task.videos[0], features("v", 300, salt=1))
    write_shards(tmp_path, {"v": features("v", 300)})
    finalise(tmp_path)
    assert not late.commit()
    assert not verify_store(tmp_path, deep=True).problems
    assert np.array_equal(FeatureReader(tmp_path).read(0), features("v", 300))


def test_a_winner_whose_staging_was_swept_as_it_moved_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finalises between the rename of the shard and the fsync of the folder that it left."""
    meta = create_store(tmp_path, provenance(), 512)
    (task,) = plan_videos(tmp_path, [PlannedVideo("v", "v.mp4")], 1)
    rename = Path.replace

    def then_sweep(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if path.name == "shard":
            sweep(meta)
        return moved

    with ShardAttempt(tmp_path, 0) as attempt:
        add_video(attempt, task.videos[0], features("v", 300))
        monkeypatch.setattr(Path, "replace", then_sweep)
        assert attempt.commit()
    assert not staged(tmp_path)
    assert not verify_store(tmp_path, deep=True).problems


def test_an_attempt_that_is_swept_before_its_file_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another attempt commits the shard, and somebody sweeps, while this one makes its folder."""
    meta = create_store(tmp_path, provenance(), 512)
    scratch = LocalStorage.scratch

    def then_sweep(storage: LocalStorage, name: str) -> Path:
        monkeypatch.undo()
        folder = scratch(storage, name)
        write_shards(tmp_path, {"v": features("v", 300)})
        sweep(meta)
        assert not folder.exists()
        return folder

    monkeypatch.setattr(LocalStorage, "scratch", then_sweep)
    with ShardAttempt(tmp_path, 0) as late:
        late.add(VideoRecord(video_id="v"), features("v", 300, salt=1))
        assert not late.commit()
    assert not staged(tmp_path)
    assert not verify_store(tmp_path, deep=True).problems


def staged(root: Path) -> list[str]:
    return os.listdir(root / SCRATCH)


def test_a_published_shard_whose_record_is_lost_is_not_overwritten(tmp_path: Path) -> None:
    """Older snapshots read its rows: neither the plan nor an attempt at work takes it for one that is not done."""
    root = make_store(tmp_path / "store", {f"v{number}": features(f"v{number}", 300) for number in range(3)})
    late = ShardAttempt(root, 1)  # of a worker that was given the shard before
    add_video(late, PlannedVideo("v1", ""), features("v1", 300, salt=1))
    (root / commit_key(1)).unlink()
    before = (root / shard_key(1)).read_bytes()
    advice = r"features/c/1/0 is there, and its commit record is lost.*vlm-dist store verify --deep --repair"
    with pytest.raises(StoreError, match=advice), late:
        late.commit()
    with pytest.raises(StoreError, match=advice):
        plan_videos(root, [PlannedVideo("new", "")], 1)
    assert len(read_plan(open_store(root))) == 1, "nothing is planned either"
    assert (root / shard_key(1)).read_bytes() == before
    assert committed_shards(open_store(root)) == [0, 2]
    assert not list((root / "_staging").iterdir())
    assert verify_store(root, repair=True).problems == []
    assert np.array_equal(FeatureReader(root, "always").read(1), features("v1", 300))
    assert [task.shard for task in plan_videos(root, [PlannedVideo("new", "")], 1)] == [3]


def test_a_shard_that_another_published_while_the_plan_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_store(tmp_path, provenance(), 512)
    (task,) = plan_videos(tmp_path, [PlannedVideo("v", "v.mp4")], 1)

    def meanwhile(meta: StoreMeta) -> list[Segment]:
        monkeypatch.undo()
        with ShardAttempt(tmp_path, task.shard) as attempt:
            add_video(attempt, task.videos[0], features("v", 100))
            assert attempt.commit()
        return read_plan(meta)

    monkeypatch.setattr("feature_store.plan.read_plan", meanwhile)
    assert plan_videos(tmp_path, [], 1) == []


def test_anyone_rolls_a_commit_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_store(tmp_path, provenance(), 512)
    (task,) = plan_videos(tmp_path, [PlannedVideo("v", "v.mp4")], 1)
    attempt = ShardAttempt(tmp_path, task.shard)
    add_video(attempt, task.videos[0], features("v", 300))
    with monkeypatch.context() as patch:  # a kill right after the commit point
        patch.setattr("feature_store.writer.roll_forward", lambda *_: exit_here())
        with pytest.raises(SystemExit):
            attempt.commit()
    meta = open_store(tmp_path)
    assert meta.storage.size(commit_key(0))
    assert meta.storage.size(shard_key(0)) is None
    assert not verify_store(tmp_path, deep=True).problems  # a state that a kill may leave
    assert plan_videos(tmp_path, [], 1) == []
    finalise(tmp_path)
    assert np.array_equal(FeatureReader(tmp_path, "always").read(0), features("v", 300))
    assert not meta.storage.names(SCRATCH)


def exit_here() -> None:
    raise SystemExit


def test_failed_videos_only(tmp_path: Path) -> None:
    root = make_store(tmp_path, {"a": None, "b": None})
    assert not (root / "features" / "c").exists()
    assert read_commit(open_store(root), 0).size == 0
    assert FeatureReader(root).index.num_videos == 0
    assert not verify_store(root, deep=True).problems
    assert not list((root / "_staging").iterdir())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((5, F), np.float16), "all zero"),
        (np.full((5, F), np.nan, np.float16), "not finite"),
        (np.full((5, F), np.inf, np.float16), "not finite"),
        (np.empty((0, F), np.float16), "empty"),
        (np.ones((5, F), np.float32), "float32"),
        (np.ones((5, F + 1), np.float16), rf"float16 \(5, {F + 1}\); this store takes float16 \(seconds, {F}\)"),
        (np.ones(F, np.float16), "takes float16"),
    ],
)
def test_features_that_no_encoder_gives(tmp_path: Path, rows: np.ndarray, message: str) -> None:
    create_store(tmp_path, provenance(), 512)
    with ShardAttempt(tmp_path, 0) as attempt:
        with pytest.raises(StoreError, match=message):
            attempt.add(VideoRecord(video_id="odd"), rows)
        attempt.add(VideoRecord(video_id="good"), features("good", 10))  # the attempt goes on
        assert attempt.commit()
    assert [record.video_id for record in read_commit(open_store(tmp_path), 0).videos] == ["good"]


def test_abandoned_attempts_leave_nothing(tmp_path: Path) -> None:
    create_store(tmp_path, provenance(), 512)
    with ShardAttempt(tmp_path, 0) as attempt:
        attempt.add(VideoRecord(video_id="v"), features("v", 400))
        assert list((tmp_path / "_staging").iterdir())
    assert not list((tmp_path / "_staging").iterdir())
    assert not shard_done(tmp_path, 0)


def test_writers_and_snapshots_at_once(tmp_path: Path) -> None:
    """A snapshot never holds less than the one before it, whoever writes it."""
    create_store(tmp_path, provenance(), 512)

    def extract(worker: int) -> None:
        for step in range(4):
            video_id = f"{worker}-{step}"
            plan_videos(tmp_path, [PlannedVideo(video_id, "")], 1)
            for task in plan_videos(tmp_path, [], 1):
                if task.videos[0].video_id == video_id:
                    with ShardAttempt(tmp_path, task.shard) as attempt:
                        add_video(attempt, task.videos[0], features(video_id, 30))
                        assert attempt.commit()
            finalise(tmp_path)
            assert StoreIndex(tmp_path).find(video_id) >= 0

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(extract, range(4)))
    names = snapshot_names(open_store(tmp_path))
    held = [set(StoreIndex(tmp_path, name).id_list()) for name in names]
    assert all(before < after for before, after in pairwise(held))
    assert len(held[-1]) == 16
    assert names == [f"{number:06d}" for number in range(1, len(names) + 1)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk(small_disk: Path) -> None:
    root = small_disk / "store"
    create_store(root, provenance(), 65536)
    corpus = {f"v{number}": features(f"v{number}", 3000) for number in range(16)}
    with pytest.raises(StoreError, match=r"the disk of .*_staging.* is full: [\d,]+ bytes are needed .* free") as error:
        write_shards(root, corpus, 2)
    assert "run the same command again" in str(error.value)
    written = len(committed_shards(open_store(root)))
    assert written >= 2
    assert not list((root / "_staging").iterdir())
    (small_disk / "more").write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - 65536)))
    with pytest.raises(StoreError, match=r"the disk of .*_staging/snapshot.* is full"):
        finalise(root)
    report = verify_store(root, deep=True)
    assert (report.problems, report.shards) == ([], written)
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    write_shards(root, corpus, 2)
    finalise(root)
    report = verify_store(root, deep=True)
    assert (report.problems, report.videos) == ([], 16)


def test_a_failed_write_is_never_followed_by_another(small_disk: Path) -> None:
    create_store(small_disk, provenance(feature_dim=256), 65536)
    attempt = ShardAttempt(small_disk, 0)
    with pytest.raises(StoreError, match="is full"):
        attempt.add(VideoRecord(video_id="large"), features("large", 20000, 256))
    with pytest.raises(StoreError, match="abandon this attempt"):
        attempt.add(VideoRecord(video_id="small"), features("small", 10, 256))
    with pytest.raises(StoreError, match="abandon this attempt"):
        attempt.commit()
    attempt.abandon()
    assert not shard_done(small_disk, 0)
    assert not list((small_disk / "_staging").iterdir())
