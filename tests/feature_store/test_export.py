"""Store → files → store: the same ids, bits and provenance; the index as Parquet; names; again, killed, damaged."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from feature_store.captions import write_captions
from feature_store.config import CaptionConfig, ImportConfig
from feature_store.export import export_npy
from feature_store.export_tables import export_parquet
from feature_store.file_names import id_of_path, path_of_id
from feature_store.import_arrays import import_arrays
from feature_store.import_sources import ArraySources
from feature_store.index import StoreIndex
from feature_store.layout import open_store, shard_key
from feature_store.marks import delete_videos, name_split
from feature_store.reader import FeatureReader
from feature_store.verify import verify_store
from tests.feature_store.store_tools import features, flip_bit, make_store
from vlm_dist.data.splits import read_id_list
from vlm_dist.errors import StoreError

IDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
ODD = {"", ".", "..", "../../etc/passwd", "/abs", "a/b", "%", "%41", "a%", ".hid", "ü☃", "a\0b", "x_0_data", "A", "a"}


def by_id(root: Path) -> dict[str, bytes]:
    reader = FeatureReader(root, check="always")
    return {reader.index.video_id(k): reader.read(k).tobytes() for k in range(reader.index.num_videos)}


@settings(max_examples=200, deadline=None)
@given(video_id=IDS)
@example("." * 500)
@example("%" * 199)
@example("a" * 199 + "%" + "." * 300)
def test_every_id_is_a_harmless_name_and_back(video_id: str) -> None:
    path = path_of_id(video_id, ".npy")
    assert id_of_path(path.parts, ".npy") == video_id
    assert not path.is_absolute()
    for part in path.parts:
        assert len(part) < 240
        assert not part.startswith(".")
        assert all(c.isascii() and (c.isalnum() or c in "_-~.%") for c in part)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.sets(IDS, min_size=1, max_size=8))
@example(ids=ODD)
@example(ids={"x_0_data", "x_0_starts", "y" * 800, "y" * 801, "y" * 1000})
def test_export_and_import_give_the_same_store(tmp_path_factory: pytest.TempPathFactory, ids: set[str]) -> None:
    folder = tmp_path_factory.mktemp("round")
    store = make_store(folder / "store", {i: features(i or "none", 1 + len(i)) for i in sorted(ids)})
    export_npy(store, folder / "out")
    assert sorted(folder.iterdir()) == [folder / "out", folder / "store"]  # nothing was written beside it
    import_arrays(folder / "again", ArraySources([folder / "out"]), ImportConfig(rows_per_shard=1024))
    assert by_id(folder / "again") == by_id(store)
    assert open_store(folder / "again").provenance == open_store(store).provenance
    assert StoreIndex(folder / "again").fingerprint == StoreIndex(store).fingerprint


def test_files_are_plain_npy(store: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    summary = export_npy(store, tmp_path / "out", seen.append)
    found = by_id(store)
    assert (summary.written, summary.kept, summary.bytes) == (30, 0, sum(map(len, found.values())))
    assert seen == list(range(1, 31))
    for video_id, raw in found.items():
        path = tmp_path / "out" / f"{video_id}.npy"
        rows = np.load(path)
        assert rows.dtype == np.float16
        assert rows.tobytes() == raw
        np.save(tmp_path / "numpy.npy", rows)
        assert path.read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_an_export_to_a_full_disk(captioned: Path, small_disk: Path) -> None:
    for export in (export_npy, export_parquet):
        with pytest.raises(StoreError, match=r"the disk of .* is full: [\d,]+ bytes are needed .* the same command"):
            export(captioned, small_disk / "out")


def test_again_writes_only_what_is_not_there_whole(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_npy(store, out)
    (out / ".video-003.npy.partial").write_bytes(b"half of a file that a killed export was at")
    (out / "video-003.npy").unlink()
    flip_bit(out / "video-004.npy", 200)
    cut = out / "video-005.npy"
    cut.write_bytes(cut.read_bytes()[:-1])
    kept = (out / "video-006.npy").stat().st_mtime_ns
    summary = export_npy(store, out)
    assert (summary.written, summary.kept) == (3, 27)
    assert (out / "video-006.npy").stat().st_mtime_ns == kept
    assert not list(out.glob(".*"))
    import_arrays(tmp_path / "again", ArraySources([out]), ImportConfig())
    assert by_id(tmp_path / "again") == by_id(store)


def test_other_folders_are_refused(store: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(StoreError, match="holds other files"):
        export_npy(store, tmp_path / "mine")
    export_parquet(store, tmp_path / "out")
    marker = tmp_path / "out" / "export.json"
    said = json.loads(marker.read_text())
    said["provenance"]["weights"] = "others"
    marker.write_text(json.dumps(said))
    with pytest.raises(StoreError, match="an export of other features"):
        export_npy(store, tmp_path / "out")
    marker.write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        ArraySources([tmp_path / "out"])


def test_damaged_features_are_not_exported(store: Path, tmp_path: Path) -> None:
    index = StoreIndex(store)
    video = int(np.flatnonzero((index.shard == 0) & (index.row == 0))[0])
    flip_bit(store / shard_key(0), 10)
    with pytest.raises(StoreError, match=f"video {index.video_id(video)}, shard 0.*chunk 0 is damaged"):
        export_npy(store, tmp_path / "out")


@pytest.fixture
def captioned(store: Path, tmp_path: Path) -> Path:
    """The store with captions for most videos, among them texts that need care."""
    lines = []
    for number in range(0, 30, 2):
        texts = ["cut the onion", 'say "hello", ü☃', "stir\nit"][: 1 + number % 3]
        starts = list(range(len(texts)))
        line = {"video_id": f"video-{number:03d}", "start": starts, "end": [s + 0.5 for s in starts], "text": texts}
        lines.append(json.dumps(line))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    write_captions(store, tmp_path / "captions.jsonl", CaptionConfig(tokenizer="wordpiece:80"))
    return store


def test_the_index_as_parquet(captioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_parquet(captioned, tmp_path / "whole")
    for group in (1, 4):
        monkeypatch.setattr("feature_store.export_tables.GROUP", group)
        export_parquet(captioned, tmp_path / str(group))
        for name in ("videos.parquet", "clips.parquet"):
            assert pq.read_table(tmp_path / str(group) / name) == pq.read_table(tmp_path / "whole" / name)
        assert pq.ParquetFile(tmp_path / str(group) / "clips.parquet").num_row_groups > 5
    seen: list[int] = []
    summary = export_parquet(captioned, tmp_path / "out", seen.append)
    assert (summary.written, summary.kept) == (2, 0)
    assert seen[-1] == 60
    index = StoreIndex(captioned)
    videos = pq.read_table(tmp_path / "out" / "videos.parquet").to_pylist()
    assert [row["id"] for row in videos] == [index.video_id(k) for k in range(index.num_videos)]
    for number, row in enumerate(videos):
        assert (row["shard"], row["row"]) == (index.shard[number], index.row[number])
        assert (row["n_rows"], row["crc32c"]) == (index.n_rows[number], index.crc32c[number])
        assert row["captions"] == index.clip_ptr[number + 1] - index.clip_ptr[number]
        assert row["tokens"] == index.tok_ptr[number + 1] - index.tok_ptr[number]
    clips = pq.read_table(tmp_path / "out" / "clips.parquet").to_pylist()
    expected = [
        (index.video_id(video), index.clip_text(clip), int(index.clip_start_ms[clip]), int(index.clip_end_ms[clip]))
        for video in range(index.num_videos)
        for clip in range(int(index.clip_ptr[video]), int(index.clip_ptr[video + 1]))
    ]
    assert [(row["id"], row["text"], row["start_ms"], row["end_ms"]) for row in clips] == expected
    assert [len(row["tokens"]) for row in clips] == index.clip_ntok.tolist()
    assert list(chain.from_iterable(row["tokens"] for row in clips)) == index.tokens.tolist()


def test_tables_are_kept_until_the_snapshot_changes(captioned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_parquet(captioned, out)
    assert export_parquet(captioned, out)[:2] == (0, 2)
    (out / "clips.parquet").write_bytes((out / "clips.parquet").read_bytes()[:-9])
    assert export_parquet(captioned, out)[:2] == (1, 1)
    (tmp_path / "c.json").write_text('{"video-001": {"start": [0], "end": [1], "text": ["new"]}}')
    write_captions(captioned, tmp_path / "c.json", CaptionConfig(tokenizer="wordpiece:80"))
    assert export_parquet(captioned, out)[:2] == (2, 0)
    assert "new" in pq.read_table(out / "clips.parquet")["text"].to_pylist()


def test_a_store_without_captions_has_an_empty_table_of_clips(store: Path, tmp_path: Path) -> None:
    export_parquet(store, tmp_path / "out")
    clips = pq.read_table(tmp_path / "out" / "clips.parquet")
    assert clips.num_rows == 0
    assert clips.column_names == ["id", "start_ms", "end_ms", "text", "tokens"]
    assert not verify_store(store, deep=True, repair=False).problems


def test_damaged_captions_are_not_exported(captioned: Path, tmp_path: Path) -> None:
    index = StoreIndex(captioned)
    flip_bit(index.folder / "text" / "c" / "0", 3)
    with pytest.raises(StoreError, match=r"captions of video .* are damaged"):
        export_parquet(captioned, tmp_path / "out")
    assert not (tmp_path / "out" / "clips.parquet").exists()


def test_captions_and_splits_come_back_as_they_went_out(captioned: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    name_split(captioned, "train.1", ["video-002", "video-004", "never-seen"])
    name_split(captioned, "gone", ["video-000"])
    export_npy(captioned, out)
    export_parquet(captioned, out)
    name_split(captioned, "gone", None)
    assert export_parquet(captioned, out)[:2] == (2, 1), "two tables of a new snapshot, and the split that is as it was"
    import_arrays(again, ArraySources([out]), ImportConfig(rows_per_shard=1024))
    index = StoreIndex(captioned)
    tokenizer = str(index.tokenizer_dir)
    write_captions(again, out / "clips.parquet", CaptionConfig(tokenizer=tokenizer, deduplicate="off"))
    name_split(again, "train.1", read_id_list(out / "splits" / "train.1.jsonl"))
    other = StoreIndex(again)
    assert other.fingerprint == index.fingerprint, "ids, features, captions, tokens, provenance"
    assert other.split_ids("train.1") == index.split_ids("train.1") == [b"never-seen", b"video-002", b"video-004"]


def test_an_export_holds_nothing_but_its_snapshot(store: Path, tmp_path: Path) -> None:
    """Importing the folder must not bring back a deleted video, or bring in another store's."""
    export_npy(store, tmp_path / "out")
    delete_videos(store, ["video-009"])
    with pytest.raises(StoreError, match=r"features of 1 videos that the store has not.*\(video-009\.npy\)"):
        export_npy(store, tmp_path / "out")
    (tmp_path / "out" / "video-009.npy").unlink()
    assert export_npy(store, tmp_path / "out")[:2] == (0, 29)
