"""feature_store.published: a store that is copied between a folder and a bucket is the same store at its new place."""

import json
import uuid
from pathlib import Path

import numpy as np
import pytest

from feature_store import s3_storage
from feature_store.captions import write_captions
from feature_store.config import CaptionConfig
from feature_store.index import StoreIndex
from feature_store.layout import open_store
from feature_store.marks import delete_videos, name_split
from feature_store.reader import FeatureReader
from feature_store.s3_storage import S3Storage
from feature_store.snapshot import snapshot_names, void_snapshot
from feature_store.storage import Storage, open_storage
from feature_store.verify import verify_store
from tests.feature_store.store_tools import features, make_store
from vlm_dist.errors import StoreError

Corpus = dict[str, np.ndarray | None]
SMALL: Corpus = {f"v{number}": features(f"v{number}", 300) for number in range(6)}


def filled(root: str, tmp_path: Path) -> str:
    """A store with captions, a split and a deleted video, in four snapshots."""
    make_store(root, SMALL)
    told = {i: {"start": [0.0], "end": [1.0], "text": [f"this is {i}"]} for i in [*SMALL, "waits"]}
    (tmp_path / "captions.json").write_text(json.dumps(told))
    write_captions(root, tmp_path / "captions.json", CaptionConfig(tokenizer="wordpiece:100"))
    name_split(root, "train", ["v1", "v2"])
    delete_videos(root, ["v5"])
    return root


def copy(source: str, target: str, without: str = "") -> str:
    """Object by object, as `aws s3 sync` and `rclone` do: no empty folder comes over."""
    one, other = open_storage(source), open_storage(target)
    for key in one.sizes(""):
        if not without or without not in key:
            put(other, key, one.read(key))
    return target


def put(storage: Storage, key: str, data: bytes) -> None:
    path = storage.local(key)
    if path is None:
        storage.replace(key, data)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def videos(root: str) -> list[str]:
    """Ids of a store, of which all rows are read and compared."""
    reader = FeatureReader(root, "always")
    ids = [reader.index.video_id(video) for video in range(reader.index.num_videos)]
    for number, video_id in enumerate(ids):
        assert np.array_equal(reader.read(number), SMALL[video_id])
        assert reader.index.check_captions(number).texts() == [f"this is {video_id}"]
    return ids


SLOW = pytest.mark.slow


@pytest.fixture(
    params=[
        "to a folder",
        *(pytest.param(way, marks=SLOW) for way in ("to a bucket", "there and back", "from bucket to bucket")),
    ]
)
def moved(request: pytest.FixtureRequest, bucket: str, tmp_path: Path) -> tuple[str, str]:
    """A store, and where it was copied."""
    folder, there, back = str(tmp_path / "folder"), f"{bucket}/a/store", str(tmp_path / "back")
    if request.param == "to a bucket":
        return filled(folder, tmp_path), copy(folder, there)
    if request.param == "there and back":
        return filled(folder, tmp_path), copy(copy(folder, there), back)
    return filled(there, tmp_path), copy(there, folder if request.param == "to a folder" else f"{bucket}/b/other")


def test_a_copied_store_is_the_same_store(moved: tuple[str, str]) -> None:
    source, target = moved
    assert StoreIndex(target).fingerprint == StoreIndex(source).fingerprint
    assert videos(target) == ["v0", "v1", "v2", "v3", "v4"]
    for deep in (False, True):
        assert not verify_store(target, deep=deep).problems
    assert delete_videos(target, ["v2"]).changed == 1
    assert videos(target) == ["v0", "v1", "v3", "v4"]
    for deep in (False, True):
        assert not verify_store(target, deep=deep).problems
    assert verify_store(target, deep=True, repair=True).repaired == []
    assert videos(source) == ["v0", "v1", "v2", "v3", "v4"]


def test_a_snapshot_of_a_copied_store_is_taken_out_by_a_repair(moved: tuple[str, str]) -> None:
    _, target = moved
    storage = open_storage(target)
    delete_videos(target, ["v2"])
    names = snapshot_names(open_store(target))
    for name, file in ((names[1], "text/c/0"), (names[-2], "n_rows/c/0")):
        keys = (key for key in storage.sizes("index") if f"index/{name}" in key and "/pending/" not in key)
        (key,) = (key for key in keys if key.endswith(f"/{file}"))
        put(storage, key, storage.read(key)[:-1])
    for deep in (False, True):
        assert len({p.where.split(",")[0] for p in verify_store(target, deep=deep).problems}) == 2
    report = verify_store(target, repair=True)
    assert report.problems == []
    assert [f"took out damaged snapshot {name}" in report.repaired for name in (names[1], names[-2])] == [True, True]
    assert videos(target) == ["v0", "v1", "v3", "v4"]
    assert not verify_store(target, deep=True).problems
    assert storage.names("_voided") == [f"snapshot-{name}" for name in (names[1], names[-2])]


def test_a_copy_that_is_completed_later_is_read(bucket: str, tmp_path: Path) -> None:
    source = filled(str(tmp_path / "folder"), tmp_path)
    name = StoreIndex(source).name
    target = copy(source, f"{bucket}/a/store", without=f"index/{name}/n_rows/c/")
    with pytest.raises(StoreError, match="n_rows/c/0 has 0 bytes"):
        StoreIndex(target)
    assert {problem.where for problem in verify_store(target).problems} == {f"snapshot {name}"}
    assert videos(copy(source, target)) == ["v0", "v1", "v2", "v3", "v4"]


@pytest.mark.slow
def test_a_copy_without_the_objects_of_a_snapshot(bucket: str, tmp_path: Path) -> None:
    source = filled(f"{bucket}/a/store", tmp_path)
    name = StoreIndex(source).name
    for target in (str(tmp_path / "folder"), f"{bucket}/b/store"):
        copy(source, target, without=f"index/{name}.")
        with pytest.raises(StoreError, match="verify --repair"):
            StoreIndex(target)
        for deep in (False, True):
            assert {problem.where for problem in verify_store(target, deep=deep).problems} == {f"snapshot {name}"}
        assert videos(copy(source, target)) == ["v0", "v1", "v2", "v3", "v4"]


@pytest.mark.parametrize("step", ["copy", "delete"])
@pytest.mark.parametrize("after", [20, *(pytest.param(after, marks=SLOW) for after in (0, 1))])
def test_a_move_that_is_killed_is_done_again(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: int
) -> None:
    """Wherever it was killed: the snapshot is still seen, as one to be moved, and then it is whole at its new place."""
    source = filled(str(tmp_path / "folder"), tmp_path)
    meta = open_store(copy(source, f"{bucket}/a/store"))
    storage, (name, *others) = meta.storage, snapshot_names(meta)
    wanted = {key.removeprefix(f"index/{name}/"): size for key, size in storage.sizes(f"index/{name}").items()}
    assert len(wanted) > 21
    act, left = getattr(s3_storage.obstore, step), iter(range(after))

    def killed(*args: object, **more: object) -> None:
        # The first copy asks for an object of the folder's own name, which is not there.
        if args[1] != f"index/{name}" and next(left, None) is None:
            pytest.exit("killed")
        act(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(s3_storage.obstore, step, killed)
        with pytest.raises(pytest.exit.Exception):
            void_snapshot(meta, name)
    assert snapshot_names(meta) == [name, *others]
    assert f"index/{name}/snapshot.json" in storage.sizes("index")
    if step == "delete" and after:
        assert verify_store(meta.root).problems
        assert f"took out damaged snapshot {name}" in verify_store(meta.root, repair=True).repaired
    else:
        void_snapshot(meta, name)
    assert snapshot_names(meta) == others
    gone = f"_voided/snapshot-{name}/"
    assert {key.removeprefix(gone): size for key, size in storage.sizes(gone).items()} == wanted
    assert not verify_store(meta.root, deep=True).problems


@pytest.mark.slow
def test_verify_judges_the_bucket_and_leaves_the_node_alone(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = filled(f"{bucket}/a/store", tmp_path)
    trees = tmp_path / "node-cache/trees"
    StoreIndex(remote, "000001")
    for _ in range(3):
        name_split(remote, uuid.uuid4().hex, ["v1"])
    index = StoreIndex(remote)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in trees.rglob("*") if path.is_file()}
    read: list[str] = []
    of_client = S3Storage.read

    def seen(self: S3Storage, key: str) -> bytes:
        read.append(key)
        return of_client(self, key)

    monkeypatch.setattr(S3Storage, "read", seen)
    assert not verify_store(remote).problems
    places = {key for key in read if key.startswith("index/0") and not key.endswith("/LOCATION")}
    assert places == set(), "the newest is on this node, and of the others names and sizes are told"
    assert not verify_store(remote, deep=True).problems
    assert verify_store(remote, repair=True).repaired == []
    after = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in trees.rglob("*") if path.is_file()}
    assert after == before
    assert not list((tmp_path / "node-cache/scratch").glob("*/*"))
    path = index.folder / "tokens/c/0"
    path.write_bytes(bytes(len(path.read_bytes())))
    assert not verify_store(remote, deep=True).problems
    assert not any(path.read_bytes()), "it was not looked at"
    assert not verify_store(remote).problems
    assert any(path.read_bytes()), "quick looks at the node's copy, which is fetched again where it is bad"


def test_quick_looks_at_old_snapshots_by_names_and_sizes(long_place: str, tmp_path: Path) -> None:
    place = filled(long_place, tmp_path)
    storage, names = open_storage(place), snapshot_names(open_store(place))
    keys = [key for key in storage.sizes("index") if f"index/{names[1]}" in key and "/c/0" in key]
    assert any("/pending/" in key for key in keys)
    for key in keys[::7]:
        data = storage.read(key)
        put(storage, key, bytes([data[0] ^ 1]) + data[1:])
        assert not verify_store(place).problems, "quick reads no columns of old snapshots"
        put(storage, key, data[:-1])
        (problem,) = verify_store(place).problems
        assert (problem.where, key in problem.message) == (f"snapshot {names[1]}", True)
        storage.remove(key)
        (problem,) = verify_store(place).problems
        assert "is missing" in problem.message
        put(storage, key, data)
    assert not verify_store(place, deep=True).problems
