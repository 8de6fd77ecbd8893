"""feature_store.prune and leftovers: old snapshots go, what killed writers left goes, and what is at work stays."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from feature_store import leftovers
from feature_store.files import SCRATCH
from feature_store.index import StoreIndex
from feature_store.layout import open_store, scratch_name
from feature_store.leftovers import sweep
from feature_store.marks import name_split
from feature_store.plan import PlannedVideo, plan_videos
from feature_store.prune import prune_store
from feature_store.reader import FeatureReader
from feature_store.snapshot import finalise, snapshot_names, void_snapshot
from feature_store.storage import open_storage
from feature_store.verify import verify_store
from feature_store.writer import ShardAttempt
from tests.feature_store.store_tools import add_video, features, make_store
from vlm_dist.errors import StoreError

CORPUS: dict[str, np.ndarray | None] = {f"v{n}": features(f"v{n}", 20 + n) for n in range(4)}


@pytest.fixture
def place(long_place: str) -> str:
    """A folder, and (slow) a bucket."""
    return long_place


@pytest.fixture
def aged(place: str) -> str:
    """A store with four snapshots, in a folder and in a bucket."""
    make_store(place, CORPUS)
    for number in range(3):
        name_split(place, f"s{number}", ["v0"])
    return place


def keys(root: str) -> set[str]:
    return set(open_storage(root).sizes(""))


def test_all_but_the_newest_go(aged: str) -> None:
    before = open_storage(aged).sizes("")
    planned = prune_store(aged, keep=2, dry_run=True)
    assert open_storage(aged).sizes("") == before
    report = prune_store(aged, keep=2)
    assert report == planned
    assert (report.snapshots, report.kept, report.voided) == (["000001", "000002"], ["000003", "000004"], [])
    after = open_storage(aged).sizes("")
    gone = set(before) - set(after)
    assert not set(after) - set(before)
    assert all(key.startswith(("index/000001", "index/000002")) for key in gone)
    location = sum(size for key, size in before.items() if key in gone and key.endswith("LOCATION"))
    assert report.bytes == sum(before[key] for key in gone) - location > 0
    assert not verify_store(aged, deep=True).problems
    with pytest.raises(StoreError, match="no index snapshot 000001"):
        StoreIndex(aged, "000001")
    reader = FeatureReader(aged, "always")
    assert np.array_equal(reader.read(reader.index.find("v2")), CORPUS["v2"])
    assert prune_store(aged).snapshots == ["000003"]
    assert prune_store(aged).snapshots == []
    name_split(aged, "s9", ["v1"])
    assert snapshot_names(open_store(aged)) == ["000004", "000005"]


def test_a_removal_that_was_killed_is_finished(aged: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = keys(aged)
    with monkeypatch.context() as patch:
        patch.setattr(leftovers, "_finish_withdrawal", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune_store(aged)
    assert not verify_store(aged, deep=True).problems
    assert "000001" not in snapshot_names(open_store(aged))
    finalise(aged)
    left = keys(aged)
    assert left < whole
    assert not any(key.startswith((f"{SCRATCH}/", "index/000001")) for key in left)


def test_what_repairs_took_out_goes_when_asked_and_no_number_comes_again(aged: str) -> None:
    meta = open_store(aged)
    void_snapshot(meta, "000002")
    void_snapshot(meta, "000004")
    finalise(aged)
    assert prune_store(aged, voided=False).voided == []
    assert snapshot_names(meta) == ["000003"]
    assert prune_store(aged, voided=True).voided == ["snapshot-000002"]
    assert not [key for key in keys(aged) if "000002" in key and not key.startswith("_commits")]
    name_split(aged, "s9", ["v1"])
    assert snapshot_names(meta)[-1] == "000005"
    assert prune_store(aged, voided=True).voided == ["snapshot-000004"]
    assert not verify_store(aged, deep=True).problems


def age(root: str, name: str) -> None:
    """Make what is in `_staging` look two days old."""
    path = Path(root, SCRATCH, name)
    for part in (path, *path.rglob("*")):
        os.utime(part, (time.time() - 2 * 86400,) * 2)


def test_old_leftovers_go_and_work_stays(tmp_path: Path) -> None:
    root = make_store(str(tmp_path / "store"), CORPUS)
    meta = open_store(root)
    (task,) = plan_videos(root, [PlannedVideo("new", "new.mp4")], 1)
    attempt = ShardAttempt(root, task.shard)
    add_video(attempt, task.videos[0], features("new", 9))
    old, fresh = (meta.storage.scratch(scratch_name("captions")) for _ in range(2))
    for folder in (old, fresh):
        (folder / "text").mkdir()
        (folder / "text" / "c").write_bytes(b"half")
    meta.storage.replace(f"{SCRATCH}/CURRENT.0123", b"a file that was never renamed")
    for name in meta.storage.names(SCRATCH):
        if name != fresh.name:
            age(root, name)
    os.utime(fresh, (0, 0))  # what is in it is new
    sweep(meta)
    left = meta.storage.names(SCRATCH)
    assert fresh.name in left
    assert len(left) == 2, "and the attempt, however old: it may be committed yet"
    assert attempt.commit()
    finalise(root)
    assert StoreIndex(root).find("new") >= 0


def test_objects_of_snapshots_that_never_appeared_go(bucket: str) -> None:
    root = make_store(f"{bucket}/store", CORPUS)
    meta = open_store(root)
    whole = keys(root)
    lost, ahead = f"index/000001.{'0' * 32}", f"index/000002.{'1' * 32}"
    for folder in (lost, ahead):
        meta.storage.replace(f"{folder}/snapshot.json", b"a builder that was killed")
    finalise(root)
    assert keys(root) == whole | {f"{ahead}/snapshot.json"}, "the builder of the next number may be at work"
    name_split(root, "s", ["v1"])
    finalise(root)
    assert not any(key.startswith(ahead) for key in keys(root))
    void_snapshot(meta, "000001")
    finalise(root)
    assert meta.storage.tree("_voided/snapshot-000001").folder.is_dir(), "what a repair put aside is kept"


def test_when_something_changed(place: str) -> None:
    storage = open_storage(place)
    storage.prepare((SCRATCH,))
    storage.replace("a/b/c", b"x")
    assert abs(storage.changed("a/b/c") - time.time()) < 60
    assert abs(storage.changed("a") - time.time()) < 60
    assert abs(storage.changed("nowhere") - time.time()) < 60
    if (path := storage.local("a")) is not None:
        for part in (path, path / "b", path / "b" / "c"):
            os.utime(part, (1000, 1000))
        assert storage.changed("a") == storage.changed("a/b/c") == 1000


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is nothing"):
        prune_store(tmp_path / "none")


def test_a_removal_killed_between_the_two_halves_of_a_move(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket's move copies, then deletes: a snapshot is never named while its objects go."""
    root = make_store(f"{bucket}/store", CORPUS)
    name_split(root, "s", ["v0"])
    with monkeypatch.context() as patch:
        patch.setattr("feature_store.s3_storage.obstore.delete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune_store(root)
    assert not verify_store(root, deep=True).problems
    finalise(root)
    assert not verify_store(root, deep=True).problems
    assert snapshot_names(open_store(root)) == ["000002"]
    assert not [key for key in keys(root) if "000001." in key and key.startswith(("index", SCRATCH))]


def test_a_damaged_location_of_an_old_snapshot_stops_nobody(bucket: str) -> None:
    root = make_store(f"{bucket}/store", CORPUS)
    name_split(root, "s", ["v0"])
    storage = open_storage(root)
    data = bytearray(storage.read("index/000001/LOCATION"))
    data[40] ^= 1
    storage.replace("index/000001/LOCATION", bytes(data))
    name_split(root, "t", ["v1"])
    finalise(root)
    assert "LOCATION is damaged" in verify_store(root).problems[0].message
    assert prune_store(root).snapshots == ["000001", "000002"]
    finalise(root)
    assert not verify_store(root, deep=True).problems
    assert not [key for key in keys(root) if key.startswith("index/000001")]


def test_the_number_of_a_lost_snapshot_does_not_come_again(place: str) -> None:
    make_store(place, CORPUS)
    name_split(place, "s", ["v0"])
    storage = open_storage(place)
    for key in [key for key in storage.sizes("index") if key.startswith("index/000002")]:
        storage.remove(key)
    storage.remove("index/000002")
    assert finalise(place) == "000001"
    assert prune_store(place, voided=True).voided == []
    name_split(place, "s", ["v1"])
    assert snapshot_names(open_store(place))[-1] == "000003"
    assert not verify_store(place, deep=True).problems
