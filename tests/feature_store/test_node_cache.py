"""feature_store.node_cache: what a node keeps of a bucket may rot, vanish or be left half; the store is not blamed."""

import gc
import itertools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from feature_store.captions import write_captions
from feature_store.config import CaptionConfig
from feature_store.index import StoreIndex
from feature_store.marks import delete_videos, name_split
from feature_store.node_cache import ShardCache, keep_tree
from feature_store.node_files import digest
from feature_store.reader import FeatureReader
from feature_store.storage import open_storage
from feature_store.tokenizer import load_tokenizer
from feature_store.verify import verify_store
from tests.feature_store.store_tools import features, flip_bit, make_store
from vlm_dist.errors import StoreError

Corpus = dict[str, np.ndarray | None]
BUDGET = 1 << 30
SLOW = pytest.mark.slow


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This node's cache."""
    monkeypatch.setenv("FEATURE_STORE_CACHE", str(tmp_path / "node-cache"))
    return tmp_path / "node-cache"


@pytest.fixture
def small() -> Corpus:
    """Six videos, two shards."""
    return {f"v{number}": features(f"v{number}", 300) for number in range(6)}


@pytest.fixture
def remote(bucket: str, small: Corpus, tmp_path: Path) -> str:
    """A store in a bucket with captions, of which one waits, a split and a deleted video."""
    root = make_store(f"{bucket}/lab/store", small)
    told = ", ".join(f'"{i}": {{"start": [0.0], "end": [1.0], "text": ["this is {i}"]}}' for i in [*small, "waits"])
    (tmp_path / "captions.json").write_text(f"{{{told}}}")
    write_captions(root, tmp_path / "captions.json", CaptionConfig(tokenizer="wordpiece:100"))
    name_split(root, "train", ["v1", "v2"])
    delete_videos(root, ["v5"])
    return root


def tree_of(cache: Path, index: StoreIndex) -> Path:
    """The node's copy of a snapshot."""
    (tree,) = (tree for tree in cache.glob("trees/*/*") if tree == index.folder)
    return tree


def snapshots(root: str, number: int) -> None:
    """Makes so many snapshots, and opens each."""
    for _ in range(number):
        name_split(root, f"s{uuid.uuid4().hex[:6]}", ["v1"])
        StoreIndex(root)


def whole(reader: FeatureReader, corpus: Corpus) -> bool:
    index = reader.index
    return all(np.array_equal(reader.read(v), corpus[index.video_id(v)]) for v in range(index.num_videos))


@pytest.mark.parametrize(
    "damage", ["rows", "cut", *(pytest.param(d, marks=SLOW) for d in ("chunk index", "cut in the middle", "empty"))]
)
@pytest.mark.parametrize("opened", [False, pytest.param(True, marks=SLOW)])
def test_a_damaged_copy_of_a_shard_is_fetched_again(
    remote: str, small: Corpus, cache: Path, damage: str, opened: bool
) -> None:
    reader = FeatureReader(remote, "always", cache_bytes=BUDGET)
    assert whole(reader, small)
    if not opened:
        reader.close()
    before = {path: path.read_bytes() for path in (cache / "shards").iterdir()}
    for path, data in before.items():
        flips = {"rows": 1000, "chunk index": len(data) - 30}
        ends = {"cut": len(data) - 7, "cut in the middle": 9000, "empty": 0}
        flip_bit(path, flips[damage]) if damage in flips else os.truncate(path, ends[damage])
    assert whole(reader, small)
    if damage not in ("chunk index", "cut") or not opened:
        assert {path: path.read_bytes() for path in (cache / "shards").iterdir()} == before
    assert not verify_store(remote, deep=True).problems


def test_damage_of_the_store_itself_is_still_its_own(remote: str, small: Corpus, cache: Path) -> None:
    reader = FeatureReader(remote, "always", cache_bytes=BUDGET)
    assert whole(reader, small)
    storage = open_storage(remote)
    for path in (cache / "shards").iterdir():
        flip_bit(path, 1000)
    for key in storage.sizes("features/c"):
        data = bytearray(storage.read(key))
        data[1000] ^= 1
        storage.replace(key, bytes(data))
    with pytest.raises(StoreError, match=r"features/c/0/0 is damaged \(chunk 0: crc32c differs\)"):
        reader.read(0)
    with pytest.raises(StoreError, match=r"video v0, shard 0: the bytes differ .*\(chunk 0 is damaged\)"):
        FeatureReader(remote, "always").read(0)


def _damages(tree: Path) -> Iterator[Path]:
    """The tree with one file after another damaged, cut or lost."""
    files = [*sorted(tree.rglob("c/0"))[::2], *[tree / "snapshot.json"] * 3]
    for path, damage in zip(files, itertools.cycle(["bit", "cut", "lost"]), strict=False):
        data = path.read_bytes()
        if damage == "lost":
            path.unlink()
        else:
            path.write_bytes(data[:-1] if damage == "cut" else bytes([data[0] ^ 8]) + data[1:])
        yield path
        assert path.read_bytes() == data, f"{path} was not fetched again"


@pytest.mark.slow
def test_a_damaged_copy_of_a_snapshot_is_fetched_again(remote: str, small: Corpus, cache: Path) -> None:
    """Whatever its file and whatever the damage: it opens, is checked and read, and nobody blames the store."""
    index = StoreIndex(remote)
    count = 0
    for _ in _damages(tree_of(cache, index)):
        for opened in (index, StoreIndex(remote)):
            opened.check_all()
            captions = [opened.check_captions(v).texts() for v in range(opened.num_videos)]
            assert captions == [[f"this is v{v}"] for v in range(5)]
            assert (opened.deleted(), opened.split_ids("train")) == ([b"v5"], [b"v1", b"v2"])
            pending = opened.pending()
            assert pending is not None
            assert pending[0] == [b"v5", b"waits"]
        count += 1
    assert count > 15
    assert whole(FeatureReader(remote, "always"), small)
    assert not verify_store(remote, deep=True).problems


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("n_rows", StoreIndex.check_columns),
        ("tokens", lambda index: index.check_captions(0)),
        ("splits/train/video_id", lambda index: index.split_ids("train")),
        ("text", StoreIndex.check_all),
    ],
)
def test_every_check_asks_the_store_again(
    remote: str, cache: Path, name: str, check: Callable[[StoreIndex], object]
) -> None:
    index = StoreIndex(remote)
    path = tree_of(cache, index) / name / "c/0"
    before = path.read_bytes()
    flip_bit(path, 0, 3)
    check(index)
    assert path.read_bytes() == before
    (key,) = (key for key in open_storage(remote).sizes("index") if key.endswith(f"{index.folder.name[6:]}/{name}/c/0"))
    flip_bit(path, 0, 3)
    open_storage(remote).replace(key, path.read_bytes())
    with pytest.raises(StoreError, match="c/0 is damaged"):
        check(index)


def test_rows_are_not_blamed_for_a_snapshot_that_rots_later(remote: str, small: Corpus, cache: Path) -> None:
    reader = FeatureReader(remote, "always")
    assert whole(reader, small)
    flip_bit(tree_of(cache, reader.index) / "crc32c/c/0", 0)
    assert whole(reader, small)


def test_damage_of_a_copy_is_never_sealed_into_a_new_snapshot(remote: str, cache: Path) -> None:
    before = StoreIndex(remote)
    fingerprint = before.fingerprint
    flip_bit(tree_of(cache, before) / "text/c/0", 0, 3)
    name_split(remote, "late", ["v1"])
    index = StoreIndex(remote)
    assert (index.fingerprint, index.clip_text(0)) == (fingerprint, "this is v0")
    assert not verify_store(remote, deep=True).problems


def test_what_is_kept_is_durable_before_it_appears(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def seen(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)

    def fill(folder: Path) -> None:
        (folder / "a/b").mkdir(parents=True)
        (folder / "a/b/one").write_bytes(b"1")
        (folder / "two").write_bytes(b"2")

    tree = keep_tree("s3://x", "index/000001", fill)
    staged = next(name for name in synced if name.endswith("/two")).removesuffix("/two")
    assert Path(staged).name.startswith(".index-000001.")
    assert {f"{staged}{name}" for name in ("", "/a", "/a/b", "/a/b/one", "/two")} < set(synced)
    assert synced[-1] == str(tree.folder.parent)
    synced.clear()
    os.close(ShardCache(BUDGET).open("tag", lambda path: path.write_bytes(b"1") and None))
    hidden, folder = synced
    assert Path(hidden).name.startswith(f".{digest('tag')}.")
    assert folder == str(cache / "shards")


KILLED = """
import os, signal, sys
from feature_store.node_cache import ShardCache, keep_tree
from feature_store.node_scratch import temporary_folder
def fill(path):
    if sys.argv[1] != "shard":
        path.mkdir()
        path = path / "column"
    path.write_bytes(bytes(5000))
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    print("at work", flush=True)
    sys.stdin.read()
if sys.argv[1] == "shard":
    ShardCache(6000).open("tag", fill)
elif sys.argv[1] == "tree":
    keep_tree("s3://x", "index/000001", fill)
else:
    with temporary_folder() as folder:
        fill(folder / "copy")
"""


def filler(kind: str, end: str) -> "subprocess.Popen[str]":
    """A process that fills the cache: `kill`ed half way, or at `work`."""
    command = [sys.executable, "-c", KILLED, kind, end]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name[0] == "."]


def test_what_killed_fills_of_shards_left_goes_and_no_live_file_before_it(cache: Path) -> None:
    shards = ShardCache(6000)

    def get(tag: str, size: int = 2000) -> None:
        os.close(shards.open(tag, lambda path: path.write_bytes(bytes(size)) and None))

    get("a")
    get("b")
    assert filler("shard", "kill").wait() == -signal.SIGKILL
    assert len(hidden(shards.folder)) == 1
    get("c")
    assert hidden(shards.folder) == []
    assert len(list(shards.folder.iterdir())) == 3, "the budget is that of live files"
    with filler("shard", "work") as working:
        assert working.stdout is not None
        working.stdout.readline()
        get("d", 1000)
        assert len(hidden(shards.folder)) == 1, "somebody has the turn for it"
        working.kill()
    get("e", 1000)
    assert hidden(shards.folder) == []


def test_what_killed_fills_of_trees_left_goes(cache: Path) -> None:
    assert filler("tree", "kill").wait() == -signal.SIGKILL
    folder = cache / "trees" / digest("s3://x")
    assert len(hidden(folder)) == 1
    with filler("tree", "work") as working:
        assert working.stdout is not None
        working.stdout.readline()
        assert len(hidden(folder)) == 1, "the next fill of the name took it away"
        keep_tree("s3://x", "index/000002", Path.mkdir)
        assert len(hidden(folder)) == 1, "somebody has the turn for it"
        working.kill()
    keep_tree("s3://x", "index/000003", Path.mkdir)
    assert sorted(path.name for path in folder.iterdir()) == ["index-000002", "index-000003"]


def test_what_a_killed_verify_left_goes(remote: str, cache: Path) -> None:
    def copies() -> int:
        return len(list((cache / "scratch").glob("*/*/copy")))

    assert filler("copy", "kill").wait() == -signal.SIGKILL
    assert copies() == 1
    with filler("copy", "work") as working:
        assert working.stdout is not None
        working.stdout.readline()
        assert copies() == 1, "it took away what the killed one had left"
        assert not verify_store(remote, deep=True).problems
        assert copies() == 1, "somebody is in it"
        working.kill()
    assert filler("copy", "kill").wait() == -signal.SIGKILL
    assert copies() == 1


@pytest.mark.slow
def test_a_tree_in_use_is_spared(remote: str, small: Corpus, cache: Path) -> None:
    reader = pickle.loads(pickle.dumps(FeatureReader(remote, "always")))
    tree, name = tree_of(cache, reader.index), reader.index.name
    snapshots(remote, 7)
    assert tree.is_dir()
    assert whole(reader, small)
    pending = reader.index.pending()
    assert pending is not None
    assert pending[0] == [b"v5", b"waits"]
    assert (
        load_tokenizer(str(reader.index.tokenizer_dir)).sha256 == reader.index.details["captions"]["tokenizer_sha256"]
    )
    other = subprocess.Popen(
        [sys.executable, "-c", "import sys; from feature_store.index import StoreIndex; "
         f"i = StoreIndex({remote!r}, {name!r}); print('open', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with other:
        assert other.stdout is not None
        other.stdout.readline()
        del reader
        gc.collect()
        os.utime(tree, (0, 0))
        snapshots(remote, 1)
        assert tree.is_dir(), "another process has it"
        other.kill()
    os.utime(tree, (0, 0))
    snapshots(remote, 1)
    assert not tree.exists()
    assert len(list(tree.parent.iterdir())) == 4


def test_use_counts_as_use(remote: str, cache: Path) -> None:
    index = StoreIndex(remote)
    tree, name = tree_of(cache, index), index.name
    del index
    snapshots(remote, 3)
    os.utime(tree, (0, 0))
    StoreIndex(remote, name)
    snapshots(remote, 1)
    assert tree.is_dir()
    os.utime(tree, (0, 0))
    snapshots(remote, 1)
    assert not tree.exists()


def test_a_tree_that_is_gone_nevertheless_is_fetched_again(remote: str, small: Corpus, cache: Path) -> None:
    for use in (
        lambda index: index.pending()[0] == [b"v5", b"waits"],
        lambda index: index.deleted() == [b"v5"],
        lambda index: index.tokenizer_dir.is_dir(),
        lambda index: index.check_all() is False,
        lambda index: pickle.loads(pickle.dumps(index)).num_videos == 5,
    ):
        index = StoreIndex(remote)
        shutil.rmtree(cache / "trees")
        assert use(index)


@pytest.mark.slow
def test_a_cache_that_is_emptied_under_a_process_is_made_again(remote: str, small: Corpus, cache: Path) -> None:
    reader = FeatureReader(remote, "always", cache_bytes=BUDGET)
    del small["v5"]
    for emptied in ("", "scratch", "trees", "shards", "locks"):
        shutil.rmtree(cache / emptied, ignore_errors=True)
        assert not verify_store(remote, deep=True).problems
        shutil.rmtree(cache / emptied, ignore_errors=True)
        assert whole(reader, small)
        name_split(remote, f"after-{emptied}x", ["v1"])


@pytest.mark.slow
def test_no_descriptor_leaks(remote: str, cache: Path) -> None:
    StoreIndex(remote)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        index = StoreIndex(remote)
        flip_bit(tree_of(cache, index) / "text/c/0", 0)
        index.check_all()
        shard = FeatureReader(remote, "always", cache_bytes=BUDGET)
        shard.read(0)
        flip_bit(next((cache / "shards").iterdir()), 1000)
        shard.read(0)
        verify_store(remote, deep=True)
        del index, shard
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
