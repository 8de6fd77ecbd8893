"""feature_store.storage: what the store asks of its place, of a folder and of a bucket alike."""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from feature_store.files import SCRATCH, seal
from feature_store.layout import create_store, open_store
from feature_store.marks import delete_videos
from feature_store.node_cache import ShardCache
from feature_store.plan import PlannedVideo, plan_videos
from feature_store.reader import FeatureReader
from feature_store.storage import Storage, open_storage
from tests.feature_store.store_tools import F, make_store, provenance
from vlm_dist.errors import ConfigError, StoreError

ROUNDS, CALLERS = 25, 16


@pytest.fixture
def storage(place: str) -> Storage:
    """A prepared place of each kind."""
    storage = open_storage(place)
    storage.prepare(("a", "a/b", SCRATCH))
    return storage


def test_addresses(tmp_path: Path, bucket: str) -> None:
    assert open_storage(f"{bucket}/x/").address == f"{bucket}/x"
    assert open_storage(Path(f"{bucket}/x")).address == f"{bucket}/x"  # a Path leaves one slash
    assert open_storage(open_storage(tmp_path).address) == open_storage(tmp_path)
    with pytest.raises(ConfigError, match="s3://bucket/prefix"):
        open_storage("s3://")
    with pytest.raises(ConfigError, match="folder or at s3://"):
        open_storage("gs://bucket/x")
    with pytest.raises(ConfigError, match="folder or at s3://"):
        open_storage(Path("gs://bucket/x"))


def test_objects(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("a/x")
    assert storage.size("a/x") is None
    storage.replace("a/x", b"first")
    storage.replace("a/x", b"second")
    assert storage.read("a/x") == b"second"
    assert storage.size("a/x") == 6
    storage.replace("a/b/y", b"deep")
    assert storage.names("a") == ["b", "x"]
    assert storage.names("nowhere") == []
    assert storage.sizes("a") == {"a/x": 6, "a/b/y": 4}
    keys = [f"many/{number}" for number in range(40)]
    for number, key in enumerate(keys):
        storage.replace(key, str(number).encode())
    assert list(storage.read_many(keys)) == [str(number).encode() for number in range(40)]
    ranges = [("a/x", 1, 3), ("a/b/y", 0, 4), ("a/x", 4, 10)]
    assert list(storage.read_ranges(ranges)) == [b"eco", b"deep", b"nd"]
    assert list(storage.read_ranges(ranges[:1])) == [b"eco"]
    end, size, tag = storage.read_end("a/x", 2)
    assert (end, size) == (b"nd", 6)
    storage.replace("a/x", b"others")
    assert storage.read_end("a/x", 2)[2] != tag
    storage.remove("a")
    storage.remove("a")
    assert storage.sizes("a") == {}


def test_creation_is_exclusive(storage: Storage) -> None:
    """Whatever the race, one caller of each round is told that it was the one, and its bytes are what is there."""
    with ThreadPoolExecutor(CALLERS) as pool:
        for number in range(ROUNDS):
            data = [f"{number} {caller} ".encode() * 500 for caller in range(CALLERS)]
            won = list(pool.map(lambda part, number=number: storage.create(f"a/{number}", part), data))
            assert won.count(True) == 1
            assert storage.read(f"a/{number}") == data[won.index(True)]


def test_a_creation_that_is_asked_for_twice_is_still_its_own(storage: Storage) -> None:
    """The answer may be lost and the request repeated: on a bucket the second answer must not make a loser of it."""
    assert storage.create("a/x", b"mine")
    assert storage.create("a/x", b"mine") == (storage.local("") is None)
    assert not storage.create("a/x", b"other")


def test_a_creation_with_a_guard(storage: Storage) -> None:
    storage.replace("a/b/guard", b"")
    assert storage.create("a/x", b"x", guard="a/b/guard")
    storage.remove("a/b")
    with pytest.raises(FileNotFoundError):
        storage.create("a/y", b"y", guard="a/b/guard")
    assert storage.size("a/y") is None


def test_swap(storage: Storage) -> None:
    assert not storage.swap("CURRENT", b"1", b"2")
    assert storage.swap("CURRENT", None, b"1")
    assert not storage.swap("CURRENT", None, b"2")
    assert not storage.swap("CURRENT", b"0", b"2")
    assert storage.swap("CURRENT", b"1", b"2")
    assert storage.read("CURRENT") == b"2"


def test_swaps_on_a_bucket_are_never_lost(bucket: str) -> None:
    storage = open_storage(f"{bucket}/counter")
    storage.replace("n", b"0")

    def count(_: int) -> None:
        while True:
            now = storage.read("n")
            if storage.swap("n", now, str(int(now) + 1).encode()):
                return

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(40)))
    assert storage.read("n") == b"40"


def test_moves(storage: Storage) -> None:
    storage.replace("a/x", b"x")
    assert storage.move("a/x", "c/d/y")
    assert not storage.move("a/x", "c/d/y")
    assert storage.read("c/d/y") == b"x"
    assert storage.size("a/x") is None


def test_files_and_folders_are_published_whole(storage: Storage) -> None:
    staged = storage.scratch("attempt")
    (staged / "shard").write_bytes(b"rows" * 1000)
    storage.upload(staged / "shard", f"{SCRATCH}/attempt/shard")
    assert storage.move(f"{SCRATCH}/attempt/shard", "c/0/0")
    assert storage.read("c/0/0") == b"rows" * 1000
    empty = storage.scratch("empty")
    (empty / "shard").touch()
    storage.upload(empty / "shard", f"{SCRATCH}/empty/shard")
    assert storage.size(f"{SCRATCH}/empty/shard") == 0

    def publish(caller: int) -> bool:
        folder = storage.scratch(f"tree-{caller}")
        (folder / "inner").mkdir()
        for name in ("one", "inner/two"):
            (folder / name).write_bytes(f"{name} of {caller}".encode())
        return storage.publish(folder, "index/000001")

    with pytest.raises(FileNotFoundError):
        storage.tree("index/000001")
    storage.prepare(("index",))
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(publish, range(8)))
    assert won.count(True) == 1
    assert [name for name in storage.names("index") if name.isdigit()] == ["000001"]
    tree = storage.tree("index/000001")
    assert (tree.folder / "inner/two").read_text() == f"inner/two of {won.index(True)}"
    assert (tree.folder / "one").read_text() == f"one of {won.index(True)}"
    assert storage.move("index/000001", "voided/snapshot-000001")
    with pytest.raises(FileNotFoundError):
        storage.tree("index/000001")
    assert (storage.tree("voided/snapshot-000001").folder / "one").read_text() == f"one of {won.index(True)}"


def test_a_damaged_object_of_a_published_folder_is_named(bucket: str) -> None:
    storage = open_storage(f"{bucket}/store")
    folder = storage.scratch("tree")
    (folder / "column").write_bytes(bytes(100))
    assert storage.publish(folder, "index/000001")
    (key,) = (key for key in storage.sizes("index") if key.endswith("/column"))
    storage.tree("index/000001")
    storage.replace(key, bytes(99) + b"\1")
    storage.tree("index/000001")  # what this node keeps is whole
    with pytest.raises(StoreError, match="column is damaged"), storage.copied("index/000001"):
        pass
    storage.replace("index/000001/LOCATION", seal({"folder": "x", "files": {}})[:-5])
    with pytest.raises(StoreError, match="LOCATION is damaged"):
        storage.tree("index/000001")
    storage.replace("index/000001/LOCATION", seal({"of": "another kind"}))
    with pytest.raises(StoreError, match="LOCATION is damaged: it is not a snapshot's location"):
        storage.tree("index/000001")


def test_a_bucket_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    with pytest.raises((StoreError, FileNotFoundError)):
        open_storage("s3://no-such-bucket/x").replace("a", b"")


def test_a_bucket_that_is_not_there(bucket: str) -> None:
    for write in (lambda: create_store("s3://nobody-made-it/x", provenance()), lambda: open_store("s3://nobody/x")):
        with pytest.raises(StoreError, match=r"NoSuchBucket.*\. Make the bucket first"):
            write()


def test_a_store_that_may_only_be_read() -> None:
    """The store is named, and not the scratch file that was to be written first."""
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder, "store"), {"a": np.ones((3, F), np.float16)})
        Path(folder).chmod(0o755)
        for path in (store, *store.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        me = os.geteuid()
        os.seteuid(me or 65534)  # root may write anywhere
        try:
            assert FeatureReader(store, "always").read(0).all()
            for write in (lambda: delete_videos(store, ["a"]), lambda: plan_videos(store, [PlannedVideo("b", "")], 1)):
                with pytest.raises(
                    StoreError, match=r"the store .*/store cannot be written to \(Permission denied\): let"
                ):
                    write()
        finally:
            os.seteuid(me)
            for path in (store, *store.rglob("*")):
                path.chmod(0o755)


def test_a_store_whose_index_may_only_be_read() -> None:
    """A snapshot is built beside it and cannot be moved there: the store is named and what to do, not the scratch."""
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder, "store"), {"a": np.ones((3, F), np.float16)})
        for path in (Path(folder), store, *store.rglob("*")):
            path.chmod(0o777)
        (store / "index").chmod(0o555)
        me = os.geteuid()
        os.seteuid(me or 65534)  # root may write anywhere
        try:
            with pytest.raises(StoreError, match=r"the store .*/store cannot be written to \(Permission denied\): let"):
                delete_videos(store, ["a"])
        finally:
            os.seteuid(me)
            (store / "index").chmod(0o755)
        assert FeatureReader(store).index.num_videos == 1


def test_a_forked_process_is_told_instead_of_hanging(bucket: str) -> None:
    storage = open_storage(f"{bucket}/store")
    storage.replace("a", b"a")
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            storage.read("a")
        except StoreError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert "spawn or forkserver" in pipe.read()
    os.wait()
    assert storage.read("a") == b"a"


def test_the_node_keeps_shards_within_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATURE_STORE_CACHE", str(tmp_path))
    cache = ShardCache(2500)
    filled: list[str] = []

    def get(tag: str) -> bytes:
        def fill(path: Path) -> None:
            filled.append(tag)
            path.write_bytes(tag.encode() * 1000)

        descriptor = cache.open(tag, fill)
        try:
            return os.pread(descriptor, 2000, 0)
        finally:
            os.close(descriptor)

    for number, tag in enumerate("abab"):
        assert get(tag) == tag.encode() * 1000
        for path in cache.folder.iterdir():  # clocks of file systems are coarse
            os.utime(path, (number, os.stat(path).st_mtime - 100))
    assert filled == ["a", "b"]
    get("a")
    get("c")
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) == 2000
    get("a")
    assert filled == ["a", "b", "c"]
    get("b")
    assert filled == ["a", "b", "c", "b"]


def test_a_fill_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATURE_STORE_CACHE", str(tmp_path))
    cache = ShardCache(2500)

    def fill(path: Path) -> None:
        path.write_bytes(b"half")
        raise StoreError("damaged")

    with pytest.raises(StoreError, match="damaged"):
        cache.open("a", fill)
    assert list(cache.folder.iterdir()) == []
