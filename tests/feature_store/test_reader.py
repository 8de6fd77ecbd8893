"""feature_store.index and reader: every byte, every process, every kind of damage."""

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_store.index import StoreIndex, current_line
from feature_store.info import store_info
from feature_store.marks import delete_videos
from feature_store.reader import FeatureReader
from feature_store.shard_source import FileShard, MappedShard, open_shard
from feature_store.show import video_facts
from feature_store.snapshot import finalise
from tests.feature_store.store_tools import F, features, flip_bit, make_store, write_shards
from vlm_dist.errors import ConfigError, StoreError

Corpus = dict[str, np.ndarray | None]


def test_index_finds_every_video(store: Path, corpus: Corpus) -> None:
    index = StoreIndex(store)
    ids = [index.video_id(video) for video in range(index.num_videos)]
    assert ids == sorted(video_id for video_id, rows in corpus.items() if rows is not None)
    assert [index.find(video_id) for video_id in ids] == list(range(len(ids)))
    assert [index.find(video_id) for video_id in ("broken", "", "zzz", "video-0", "video-0000")] == [-1] * 5
    assert index.find_many(["video-003", "nobody"]).tolist() == [3, -1]
    assert index.find_many(ids[::-1]).tolist() == list(range(len(ids)))[::-1]
    assert index.n_rows.tolist() == [len(corpus[video_id]) for video_id in ids]
    assert (index.status == 0).all()
    assert (index.num_clips, index.num_tokens, index.tokenizer_dir) == (0, 0, None)
    assert index.clip_ptr.tolist() == [0] * (len(ids) + 1)


@pytest.mark.parametrize("mapped", [False, True])
def test_reads_everything_with_few_shards_open(store: Path, corpus: Corpus, mapped: bool) -> None:
    reader = pickle.loads(pickle.dumps(FeatureReader(store, "always", max_open=2, mapped=mapped)))
    assert type(open_shard(reader.meta, 0, None, reader._mapped)) is (MappedShard if mapped else FileShard)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for video in range(reader.index.num_videos):
            assert np.array_equal(reader.read(video), corpus[reader.index.video_id(video)])
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    order = np.random.default_rng(0).permutation(reader.index.num_videos)
    for video, rows in zip(order, reader.read_many(order), strict=True):
        assert np.array_equal(rows, corpus[reader.index.video_id(int(video))])
    reader.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def _sums(reader: FeatureReader, results: "multiprocessing.Queue[list[float]]") -> None:
    results.put([float(reader.read(video).astype(np.float64).sum()) for video in range(reader.index.num_videos)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(store: Path, method: str) -> None:
    reader = FeatureReader(store, "always")
    expected = [float(reader.read(video).astype(np.float64).sum()) for video in range(reader.index.num_videos)]
    context = multiprocessing.get_context(method)
    results = context.Queue()
    children = [context.Process(target=_sums, args=(reader, results)) for _ in range(2)]
    for child in children:
        child.start()
    assert [results.get(timeout=60) for _ in children] == [expected] * 2
    for child in children:
        child.join()


def test_a_pickled_reader_keeps_its_snapshot(store: Path) -> None:
    reader = FeatureReader(store, "always")
    write_shards(store, {"a-new-one": features("a-new-one", 50)})
    assert finalise(store) == "000002"
    assert StoreIndex(store).num_videos == 31
    again = pickle.loads(pickle.dumps(reader))
    assert (again.index.name, again.index.num_videos) == ("000001", 30)
    assert pickle.loads(pickle.dumps(reader.index)).fingerprint == reader.index.fingerprint
    assert np.array_equal(again.read(7), reader.read(7))


def test_fingerprint_is_of_the_content_alone(tmp_path: Path, store: Path, corpus: Corpus) -> None:
    prints = {StoreIndex(store).fingerprint}
    backwards = dict(reversed(corpus.items()))
    prints.add(StoreIndex(make_store(tmp_path / "b", backwards, 2048)).fingerprint)
    assert len(prints) == 1, "order, shard size, place and time must not count"
    other = {**corpus, "video-000": features("video-000", len(corpus["video-000"]), salt=1)}
    prints.add(StoreIndex(make_store(tmp_path / "c", other)).fingerprint)
    renamed = {("renamed" if video_id == "video-000" else video_id): rows for video_id, rows in corpus.items()}
    prints.add(StoreIndex(make_store(tmp_path / "d", renamed)).fingerprint)
    assert len(prints) == 3


def test_a_flipped_bit_is_named(store: Path) -> None:
    reader = FeatureReader(store, "always")
    video = 11
    shard, row = int(reader.index.shard[video]), int(reader.index.row[video])
    chunk, within = divmod(row, 256)
    flip_bit(store / f"features/c/{shard}/0", chunk * (256 * F * 2 + 4) + within * F * 2 + 7, 5)
    with pytest.raises(StoreError, match=rf"video video-011, shard {shard}: .*chunk {chunk} is damaged"):
        reader.read(video)
    assert len(FeatureReader(store, "off").read(video)) == reader.index.n_rows[video]
    sampled = FeatureReader(store, "sampled")
    with pytest.raises(StoreError, match="video-011"):
        sampled.read_many([video] * 16)


def test_a_wrong_offset_is_noticed(store: Path) -> None:
    """Whole chunks with right checksums in the wrong place: only the video's own checksum can tell."""
    reader = FeatureReader(store, "always")
    first, second = sorted({int(shard) for shard in reader.index.shard})[:2]
    paths = [store / f"features/c/{shard}/0" for shard in (first, second)]
    one, two = (path.read_bytes() for path in paths)
    paths[0].write_bytes(two)
    paths[1].write_bytes(one)
    for video in np.flatnonzero(np.isin(reader.index.shard, (first, second))):
        with pytest.raises(StoreError, match=reader.index.video_id(int(video))):
            reader.read(int(video))


@pytest.mark.parametrize("column", ["video_id", "video_id_ptr"])
def test_no_wrong_id_is_told(store: Path, column: str) -> None:
    """Opening reads no column; the first id that is asked for is what compares them."""
    whole = shutil.copytree(store, store.with_name("whole"))
    flip_bit(store / "index" / StoreIndex(store).name / column / "c" / "0", 25 if column == "video_id" else 8, 1)
    asked: list[Callable[[StoreIndex], object]] = [
        lambda index: index.video_id(0),
        lambda index: index.find("video-000"),
        lambda index: index.find_many(["video-000"]),
        lambda index: index.id_list(),
    ]
    for check in ("always", "sampled"):
        for ask in asked:
            index = pickle.loads(pickle.dumps(FeatureReader(store, check).index))
            for _ in range(2):
                with pytest.raises(StoreError, match=f"index array {column} in .* is damaged"):
                    ask(index)
    assert FeatureReader(store, "off").index.id_list() != StoreIndex(whole).id_list()
    for ask in (store_info, lambda root: video_facts(root, "video-000")):
        with pytest.raises(StoreError, match=f"index array {column} in .* is damaged"):
            ask(store)


def test_missing_short_and_empty_shards(store: Path) -> None:
    index = StoreIndex(store)
    path = store / f"features/c/{int(index.shard[0])}/0"
    data = path.read_bytes()
    for damage, message in (
        (data[:-1], "the chunk index at the end of shard"),
        (data[:10], "is cut short"),
        (b"", "is cut short"),
        (data[:-30] + bytes([data[-30] ^ 1]) + data[-29:], "the chunk index at the end of shard"),
    ):
        path.write_bytes(damage)
        with pytest.raises(StoreError, match=message):
            FeatureReader(store).read(0)
    path.unlink()
    with pytest.raises(StoreError, match="is missing"):
        FeatureReader(store).read(0)


def test_too_many_open_files_are_told_of(store: Path) -> None:
    """In a process of its own, with a limit of its own."""
    told = """if True:
        import os, resource, sys
        from feature_store.reader import FeatureReader
        from feature_store.index import StoreIndex
        from vlm_dist.errors import StoreUnreachableError
        reader = FeatureReader(sys.argv[1], "off")
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        held = []
        while True:
            try:
                held.append(os.open("/", os.O_RDONLY))
            except OSError:
                break
        os.close(held.pop())  # for the store's zarr.json
        for act in (lambda: StoreIndex(sys.argv[1]), lambda: reader.read_many(range(reader.index.num_videos))):
            try:
                held.append(act())
            except StoreUnreachableError as error:
                print(error)
    """
    run = subprocess.run([sys.executable, "-c", told, str(store)], capture_output=True, text=True, check=True)
    index, shard = run.stdout.splitlines()
    for line, what in ((shard, "features/c/"), (index, "index/000001")):
        assert what in line
        assert "too many files are open; this process may have 100: raise it with `ulimit -n`" in line


def test_an_absent_chunk_is_an_error_not_zeros(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", {"a": features("a", 300)}, 1024)
    shorter = make_store(tmp_path / "shorter", {"a": features("a", 200)}, 1024)
    os.replace(shorter / "features/c/0/0", store / "features/c/0/0")
    with pytest.raises(StoreError, match=r"video a, shard 0, chunk 1: .* does not hold this chunk"):
        FeatureReader(store, "off").read(0)


def test_stores_without_a_snapshot(tmp_path: Path, store: Path) -> None:
    (store / "CURRENT").rename(tmp_path / "CURRENT")
    with pytest.raises(StoreError, match="has no index yet"):
        StoreIndex(store)
    line = bytearray((tmp_path / "CURRENT").read_bytes())
    line[5] ^= 3
    (store / "CURRENT").write_bytes(line)
    with pytest.raises(StoreError, match="CURRENT is damaged"):
        StoreIndex(store)
    with pytest.raises(StoreError, match=r"no index snapshot 000009 \(the newest are: 000001\): it was pruned, or"):
        StoreIndex(store, "000009")
    (store / "CURRENT").write_bytes(current_line("000009"))
    with pytest.raises(StoreError, match=r"no index snapshot 000009; run `vlm-dist store verify --repair`"):
        StoreIndex(store)


def test_damaged_snapshots_do_not_open(store: Path) -> None:
    folder = store / "index" / "000001"
    (folder / "n_rows/c/0").write_bytes((folder / "n_rows/c/0").read_bytes()[:-4])
    with pytest.raises(StoreError, match=r"n_rows/c/0 has 116 bytes, 120 belong there"):
        StoreIndex(store)
    flip_bit(folder / "snapshot.json", 100)
    with pytest.raises(StoreError, match=r"snapshot\.json is damaged"):
        StoreIndex(store)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    corpus=st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda text: text.encode("utf-8", "replace") == text.encode()),
        st.one_of(st.none(), st.integers(1, 1030)),
        max_size=8,
    ),
    rows_per_shard=st.sampled_from([256, 512, 1024]),
)
def test_any_corpus_comes_back(
    tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, int | None], rows_per_shard: int
) -> None:
    """Any ids and lengths: what fits in a shard is read back, the rest is refused, nothing else is there."""
    filled = {
        video_id: None if rows is None else np.full((rows, F), (number + 1) / 8, np.float16)
        for number, (video_id, rows) in enumerate(corpus.items())
    }
    root = make_store(tmp_path_factory.mktemp("any") / "store", filled, rows_per_shard)
    reader = FeatureReader(root, "always")
    expected = {i: rows for i, rows in filled.items() if rows is not None and len(rows) <= rows_per_shard}
    assert reader.index.num_videos == len(expected)
    for video_id, rows in expected.items():
        assert np.array_equal(reader.read(reader.index.find(video_id)), rows)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"check": "foo"}, r"check is 'foo'; it must be one of 'off', 'sampled', 'always'"),
        ({"max_open": 0}, "max_open is 0; it must be 1 or more"),
        ({"cache_bytes": -1}, "cache_bytes is -1; it must be 0 or more"),
    ],
)
def test_arguments_that_mean_nothing(store: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FeatureReader(store, **wrong)


def test_a_number_that_is_no_video(store: Path) -> None:
    reader = FeatureReader(store, "always")
    for number in (reader.index.find("nobody"), reader.index.num_videos):
        with pytest.raises(IndexError, match="there is no video"):
            reader.read(number)


def test_a_store_whose_empty_folders_were_lost(store: Path, corpus: Corpus) -> None:
    """Copies by object stores and version control keep no empty folder."""
    for folder in ("_staging", "_voided"):
        shutil.rmtree(store / folder)
    assert delete_videos(store, ["video-003"]).changed == 1
    assert FeatureReader(store, "always").index.num_videos == 29
