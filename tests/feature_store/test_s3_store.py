"""A store in a bucket: the same store, read by ranges or from what the node keeps, by us and by other readers."""

import json
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from obstore.store import S3Store

from feature_store.captions import write_captions
from feature_store.commit import commit_key, committed_shards, staged_key, void
from feature_store.config import CaptionConfig
from feature_store.files import SCRATCH
from feature_store.index import StoreIndex
from feature_store.info import failures, store_info
from feature_store.layout import CURRENT, create_store, open_store, shard_key
from feature_store.plan import PlannedVideo, plan_videos
from feature_store.reader import FeatureReader
from feature_store.s3_storage import S3Storage
from feature_store.snapshot import finalise
from feature_store.storage import open_storage
from feature_store.verify import verify_store
from feature_store.writer import ShardAttempt
from tests.feature_store.store_tools import add_video, features, make_store, provenance, write_shards
from vlm_dist.errors import StoreError, StoreUnreachableError

Corpus = dict[str, np.ndarray | None]


@pytest.fixture
def remote(bucket: str, corpus: Corpus) -> str:
    """A finished store in a bucket."""
    return make_store(f"{bucket}/lab/store", corpus)


def everything(reader: FeatureReader) -> dict[str, np.ndarray]:
    """All features, read in batches of seven."""
    numbers = np.random.default_rng(0).permutation(reader.index.num_videos)
    read = [rows for batch in np.array_split(numbers, 5) for rows in reader.read_many(batch)]
    return {reader.index.video_id(int(n)): rows for n, rows in zip(numbers, read, strict=True)}


def same(found: dict[str, np.ndarray], corpus: Corpus) -> bool:
    wanted = {video_id: rows for video_id, rows in corpus.items() if rows is not None}
    return found.keys() == wanted.keys() and all(np.array_equal(found[i], wanted[i]) for i in wanted)


@pytest.mark.parametrize("cache_bytes", [0, 100_000, 1 << 30])
def test_reads(remote: str, corpus: Corpus, tmp_path: Path, cache_bytes: int) -> None:
    reader = FeatureReader(remote, "always", cache_bytes=cache_bytes)
    assert same(everything(reader), corpus)
    assert same(everything(pickle.loads(pickle.dumps(reader))), corpus)
    kept = sorted((tmp_path / "node-cache" / "shards").glob("*"))
    assert bool(kept) == bool(cache_bytes)
    largest = max(open_storage(remote).sizes("features/c").values())
    assert sum(path.stat().st_size for path in kept) <= max(cache_bytes, largest)


def test_it_is_the_same_store(remote: str, corpus: Corpus, tmp_path: Path) -> None:
    local = make_store(tmp_path / "local", corpus)
    assert StoreIndex(remote).fingerprint == StoreIndex(local).fingerprint
    sizes = [open_storage(root).sizes("features") for root in (remote, local)]
    assert sizes[0] == sizes[1]
    assert {**store_info(remote), "path": ""} == {**store_info(local), "path": ""}
    assert failures(remote) == failures(local)
    assert not verify_store(remote, deep=True).problems
    assert not open_storage(remote).names(SCRATCH)


def test_a_video_is_one_ranged_get(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = FeatureReader(remote, "off")
    reader.read(0)
    asked: list[tuple[str, int, int]] = []
    range_of = S3Storage._range

    def counted(self: S3Storage, key: str, start: int, length: int) -> bytes:
        asked.append((key, start, length))
        return range_of(self, key, start, length)

    monkeypatch.setattr(S3Storage, "_range", counted)
    monkeypatch.setattr(S3Storage, "read", lambda *_: pytest.fail("a whole object was read"))
    number = int(np.flatnonzero(reader.index.shard == reader.index.shard[0])[-1])
    rows = reader.read(number)
    ((_, _, length),) = asked
    assert rows.nbytes <= length <= rows.nbytes + 4 * (len(rows) // 256 + 1)


def test_other_readers_see_the_same(remote: str, corpus: Corpus) -> None:
    name, prefix = remote.removeprefix("s3://").split("/", 1)
    group = zarr.open_group(zarr.storage.ObjectStore(S3Store(name, prefix=prefix), read_only=True), mode="r")
    array = group["features"]
    spec = {"driver": "s3", "bucket": name, "path": f"{prefix}/features/", "endpoint": os.environ["AWS_ENDPOINT_URL"],
            "aws_region": "us-east-1"}  # fmt: skip
    tensor = tensorstore.open({"driver": "zarr3", "kvstore": spec}, read=True).result()
    index = StoreIndex(remote)
    for video in range(0, index.num_videos, 5):
        start = int(index.shard[video]) * 1024 + int(index.row[video])
        rows = corpus[index.video_id(video)]
        assert np.array_equal(array[start : start + int(index.n_rows[video])], rows)
        assert np.array_equal(tensor[start : start + int(index.n_rows[video])].read().result(), rows)


def test_captions_and_appending(remote: str, corpus: Corpus, tmp_path: Path) -> None:
    captions = tmp_path / "captions.json"
    told = {i: {"start": [0.0], "end": [1.0], "text": [f"this is {i}"]} for i in [*corpus, "later"]}
    captions.write_text(json.dumps(told))
    report = write_captions(remote, captions, CaptionConfig(tokenizer="wordpiece:100"))
    assert (report.videos_with_captions, report.captions_without_video) == (30, 2)
    before = open_storage(remote).sizes("features/c")
    corpus["later"] = features("later", 50)
    write_shards(remote, corpus)
    finalise(remote)
    reader = FeatureReader(remote, "always")
    assert same(everything(reader), corpus)
    assert reader.index.clip_text(int(reader.index.clip_ptr[reader.index.find("later")])) == "this is later"
    assert before.items() < open_storage(remote).sizes("features/c").items()
    assert not verify_store(remote, deep=True).problems


@pytest.mark.slow
def test_damage_is_found_and_mended(remote: str, corpus: Corpus) -> None:
    storage = open_storage(remote)
    FeatureReader(remote, "always", cache_bytes=1 << 30).read(0)
    kinds = ("features/c", "index", "_commits", "_plan")
    ends = ("/0", "LOCATION", "snapshot.json", "00.json", "01.json")
    keys = [CURRENT, *(key for kind in kinds for key in storage.sizes(kind) if key.endswith(ends))]
    for number, key in enumerate(sorted(keys)):
        data = bytearray(storage.read(key))
        at = (number * 7919) % len(data)
        data[at] ^= 1 << number % 8
        before = storage.read(key)
        storage.replace(key, bytes(data))
        assert verify_store(remote, deep=True).problems, key
        try:
            found = everything(FeatureReader(remote, "always"))
        except StoreError:
            found = {}
        assert all(np.array_equal(rows, corpus[i]) for i, rows in found.items())
        storage.replace(key, before)
    assert not verify_store(remote, deep=True).problems
    old = FeatureReader(remote, "off")
    shard = int(old.index.shard[3])
    held = int((old.index.shard == shard).sum())
    storage.replace(shard_key(shard), storage.read(shard_key(shard))[:-7])
    report = verify_store(remote, deep=True, repair=True)
    assert not report.problems
    assert report.repaired[0].startswith(f"kept {held} of {held} videos")
    assert report.repaired[1] == f"voided shard {shard}: nothing is lost"
    assert (report.to_extract, report.videos) == ([], 30)
    assert same(everything(FeatureReader(remote, "always")), corpus)
    write_shards(remote, corpus)
    finalise(remote)
    assert same(everything(FeatureReader(remote, "always")), corpus)
    with pytest.raises(StoreError, match=f"shard {shard}: .* is missing"):
        old.read(3)  # never the rows of whatever came later


def test_the_second_attempt_loses_whole(place: str) -> None:
    create_store(place, provenance(), 512)
    (task,) = plan_videos(place, [PlannedVideo("v", "v.mp4")], 1)
    attempts = [ShardAttempt(place, task.shard) for _ in range(6)]
    for salt, attempt in enumerate(attempts):
        add_video(attempt, task.videos[0], features("v", 100, salt=salt))
    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(ShardAttempt.commit, attempts))
    assert won.count(True) == 1
    finalise(place)
    assert np.array_equal(FeatureReader(place).read(0), features("v", 100, salt=won.index(True)))
    assert not open_storage(place).names(SCRATCH)


def test_anyone_rolls_a_commit_forward(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create_store(place, provenance(), 512)
    (task,) = plan_videos(place, [PlannedVideo("v", "v.mp4")], 1)
    attempt = ShardAttempt(place, task.shard)
    add_video(attempt, task.videos[0], features("v", 300))
    with monkeypatch.context() as patch:  # a kill right after the commit point
        patch.setattr("feature_store.writer.roll_forward", lambda *_: pytest.exit("killed"))
        with pytest.raises(pytest.exit.Exception):
            attempt.commit()
    storage = open_storage(place)
    assert storage.size(commit_key(0))
    assert storage.size(shard_key(0)) is None
    assert storage.size(staged_key(0, attempt._attempt))
    assert not verify_store(place, deep=True).problems  # a state that a kill may leave
    assert plan_videos(place, [], 1) == []
    finalise(place)
    assert np.array_equal(FeatureReader(place, "always").read(0), features("v", 300))
    assert not storage.names(SCRATCH)


def test_failed_videos_only(place: str) -> None:
    make_store(place, {"a": None, "b": None})
    assert open_storage(place).sizes("features/c") == {}
    assert committed_shards(open_store(place))
    assert FeatureReader(place).index.num_videos == 0
    assert not verify_store(place, deep=True).problems


def test_a_prefix_with_other_objects_is_refused(bucket: str) -> None:
    open_storage(f"{bucket}/photos").replace("cat.jpg", b"cat")
    with pytest.raises(StoreError, match=r"not a feature store and not empty \(cat.jpg"):
        create_store(f"{bucket}/photos", provenance())
    with pytest.raises(StoreError, match="this is not a feature store"):
        open_store(f"{bucket}/photos")
    with pytest.raises(StoreError, match="there is nothing"):
        open_store(f"{bucket}/nowhere")


def _read_all(root: str, cache_bytes: int, queue: "multiprocessing.Queue[int]") -> None:
    reader = FeatureReader(root, "always", cache_bytes=cache_bytes)
    queue.put(sum(len(rows) for rows in everything(reader).values()))


def test_processes_of_a_node_share_what_it_keeps(remote: str, corpus: Corpus, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[int] = context.Queue()
    processes = [context.Process(target=_read_all, args=(remote, 1 << 30, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    rows = sum(len(rows) for rows in corpus.values() if rows is not None)
    assert [queue.get(timeout=120) for _ in processes] == [rows, rows]
    for process in processes:
        process.join()
    kept = list((tmp_path / "node-cache" / "shards").iterdir())
    assert len(kept) == len(open_storage(remote).sizes("features/c"))


def test_what_is_wrong_with_a_node_is_no_damage_of_the_store(
    remote: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repair judges the bucket: neither a damaged copy on this node nor a cache that cannot be written voids it."""
    name = StoreIndex(remote).name
    (copy,) = (tmp_path / "node-cache").glob("trees/*/*/row/c/0")
    whole = copy.read_bytes()
    copy.write_bytes(whole[:-3])
    assert StoreIndex(remote).name == name
    assert copy.read_bytes() == whole, "it was fetched again"
    copy.write_bytes(whole[:-3])
    report = verify_store(remote, repair=True)
    assert (report.problems, report.repaired) == ([], [])
    assert same(everything(FeatureReader(remote, "always")), corpus)
    monkeypatch.setenv("FEATURE_STORE_CACHE", "/proc/nothing")
    for act in (StoreIndex, verify_store, lambda root: verify_store(root, repair=True)):
        with pytest.raises(StoreUnreachableError, match=r"this node's copy .*FEATURE_STORE_CACHE"):
            act(remote)
    monkeypatch.setenv("FEATURE_STORE_CACHE", str(tmp_path / "node-cache"))
    assert StoreIndex(remote).name == name


def test_a_shard_that_was_taken_out_while_it_was_open_is_named(remote: str) -> None:
    reader = FeatureReader(remote, "off")
    video = int(np.flatnonzero(reader.index.shard == 0)[0])
    reader.read(video)
    void(open_store(remote), 0)
    with pytest.raises(StoreError, match=r"features/c/0/0 is missing\. Run `vlm-dist store verify --deep --repair`"):
        reader.read(video)
