"""feature_store.marks and migrate: deleted videos, named splits, and stores of an older schema."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from feature_store.captions import write_captions
from feature_store.config import CaptionConfig
from feature_store.index import StoreIndex
from feature_store.info import failures, store_info
from feature_store.layout import group_json, keep_copy, open_store
from feature_store.marks import delete_videos, name_split
from feature_store.migrate import migrate_store
from feature_store.plan import PlannedVideo, anything_to_do, plan_videos
from feature_store.plots import plot_store
from feature_store.reader import FeatureReader
from feature_store.snapshot import finalise
from feature_store.storage import open_storage
from feature_store.verify import verify_store
from tests.feature_store.store_tools import features, flip_bit, make_store, write_shards
from vlm_dist.errors import ConfigError, StoreError

Corpus = dict[str, np.ndarray | None]


@pytest.fixture
def place(long_place: str) -> str:
    """A folder, and (slow) a bucket."""
    return long_place


@pytest.fixture
def corpus() -> Corpus:
    """Ten videos, and one that failed."""
    return {f"v{number}": features(f"v{number}", 20 + number) for number in range(10)} | {"broken": None}


@pytest.fixture
def marked(place: str, corpus: Corpus, tmp_path: Path) -> str:
    """A finished store with captions, in a folder and in a bucket."""
    make_store(place, corpus)
    told = {i: {"start": [1.0], "end": [4.0], "text": [f"the words of {i}"]} for i in corpus}
    (tmp_path / "captions.json").write_text(json.dumps(told))
    write_captions(place, tmp_path / "captions.json", CaptionConfig(tokenizer="wordpiece:100"))
    return place


def ids(root: str) -> list[str]:
    return [key.decode() for key in StoreIndex(root).id_list()]


def test_deleted_videos_are_gone_and_come_back(marked: str, corpus: Corpus) -> None:
    old = FeatureReader(marked, "always")
    before = StoreIndex(marked)
    report = delete_videos(marked, ["v3", "v7", "never-seen"])
    assert (report.changed, report.marked, report.unknown) == (2, 2, 1)
    assert ids(marked) == [f"v{n}" for n in range(10) if n not in (3, 7)]
    assert np.array_equal(old.read(old.index.find("v3")), corpus["v3"]), "a pinned snapshot keeps its videos"
    assert finalise(marked) == report.snapshot, "publishing again does not bring them back"
    assert not anything_to_do(marked, [PlannedVideo(i, f"videos/{i}.mp4") for i in corpus])
    assert store_info(marked)["videos"] == {"planned": 11, "ok": 8, "failed": 1, "open": 0, "deleted": 2}
    assert not verify_store(marked, deep=True).problems
    assert delete_videos(marked, ["v3"]).changed == 0
    corpus["later"] = features("later", 9)
    write_shards(marked, corpus)
    finalise(marked)
    assert "v3" not in ids(marked)
    assert "later" in ids(marked)
    assert delete_videos(marked, ["v3", "v7"], undo=True).changed == 2
    index = StoreIndex(marked)
    assert index.clip_text(int(index.clip_ptr[index.find("v3")])) == "the words of v3"
    delete_videos(marked, ["later"])
    assert StoreIndex(marked).fingerprint == before.fingerprint
    assert not verify_store(marked, deep=True).problems


def test_splits_stay_through_what_comes_later(marked: str, corpus: Corpus) -> None:
    report = name_split(marked, "train", ["v5", "v1", "v1", "not-yet"])
    assert (report.changed, report.marked, report.unknown) == (3, 3, 1)
    assert name_split(marked, "train", ["v1", "v5", "not-yet"]).changed == 0
    name_split(marked, "val.1", ["v2"])
    corpus["not-yet"] = features("not-yet", 9)
    write_shards(marked, corpus)
    finalise(marked)
    write_captions(marked, None, CaptionConfig(tokenizer="wordpiece:60"))
    delete_videos(marked, ["v9"])
    index = StoreIndex(marked)
    assert index.splits == ["train", "val.1"]
    assert index.split_ids("train") == [b"not-yet", b"v1", b"v5"]
    assert (index.find_many([key.decode() for key in index.split_ids("train")]) >= 0).all()
    assert store_info(marked)["splits"] == {"train": 3, "val.1": 1}
    assert not verify_store(marked, deep=True).problems
    name_split(marked, "train", None)
    with pytest.raises(StoreError, match=r"no split 'train' \(there is: val.1\)"):
        StoreIndex(marked).split_ids("train")
    for name in ("", "../x", "a/b", ".hidden", "x" * 65):
        with pytest.raises(ConfigError, match="split name"):
            name_split(marked, name, [])


def test_marks_at_once_are_all_kept(marked: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        deleted = pool.map(lambda n: delete_videos(marked, [f"v{n}"]), range(4))
        named = pool.map(lambda n: name_split(marked, f"s{n}", [f"v{n}"]), range(4))
        assert [report.changed for report in [*deleted, *named]] == [1] * 8
    assert ids(marked) == [f"v{n}" for n in range(4, 10)]
    assert StoreIndex(marked).splits == ["s0", "s1", "s2", "s3"]


def test_a_damaged_mark_is_found(tmp_path: Path, corpus: Corpus) -> None:
    store = make_store(tmp_path / "store", corpus)
    name_split(store, "train", ["v1"])
    flip_bit(store / "index" / StoreIndex(store).name / "splits/train/video_id/c/0", 1)
    (problem,) = verify_store(store, deep=True).problems
    assert "splits/train/video_id" in problem.where


def test_failures_are_tried_again_when_asked(place: str, corpus: Corpus) -> None:
    make_store(place, corpus)
    given = [PlannedVideo(video_id, f"videos/{video_id}.mp4") for video_id in corpus]
    assert not anything_to_do(place, given)
    assert anything_to_do(place, [], retry_failed=True)
    (task,) = plan_videos(place, [], 1, retry_failed=True)
    assert [(video.video_id, video.path) for video in task.videos] == [("broken", "videos/broken.mp4")]
    assert plan_videos(place, [], 1, retry_failed=True) == [task], "planned once, until it is done"
    write_shards(place, {**corpus, "broken": None})
    assert [record.video_id for record in failures(place)] == ["broken"]
    others = [video for video in given if video.video_id != "broken"]
    assert plan_videos(place, others, 1, retry_failed=True) == [], "of those that are given"
    moved = [PlannedVideo("broken", "new/broken.mp4")]
    (task,) = plan_videos(place, moved, 1, retry_failed=True)
    assert task.videos[0].path == "new/broken.mp4"
    write_shards(place, {**corpus, "broken": features("broken", 9)})
    finalise(place)
    assert failures(place) == []
    assert store_info(place)["videos"] == {"planned": 11, "ok": 11, "failed": 0, "open": 0, "deleted": 0}
    assert plan_videos(place, given, 1, retry_failed=True) == []
    assert not verify_store(place, deep=True).problems


def test_a_store_of_schema_1(place: str, corpus: Corpus) -> None:
    make_store(place, corpus)
    storage = open_storage(place)
    store = json.loads(storage.read("zarr.json"))["attributes"]["vlm_dist"]
    storage.replace("zarr.json", group_json({**store, "schema_version": 1}))
    with pytest.raises(StoreError, match="store migrate"):
        open_store(place)
    assert migrate_store(place) == [1]
    assert migrate_store(place) == []
    assert FeatureReader(place, "always").index.num_videos == 10
    assert not verify_store(place, deep=True).problems
    storage.replace(
        "zarr.json", storage.read("zarr.json").replace(b'"rows_per_shard": 1024', b'"rows_per_shard": 2048')
    )
    with pytest.raises(StoreError, match="is damaged"):
        migrate_store(place)
    storage.replace("zarr.json", group_json({**store, "schema_version": 3}))
    with pytest.raises(StoreError, match="the vlm-dist that made it"):
        migrate_store(place)


def test_a_migration_that_was_killed_before_its_last_step(place: str, corpus: Corpus) -> None:
    """zarr.json is of schema 2 already, its copy is not: typed again, the step is done again."""
    make_store(place, corpus)
    storage = open_storage(place)
    whole = storage.read("zarr.json")
    store = json.loads(whole)["attributes"]["vlm_dist"]
    storage.replace("zarr.json", group_json({**store, "schema_version": 1}))
    keep_copy(storage)
    storage.replace("zarr.json", whole)
    assert [problem.kind for problem in verify_store(place).problems] == ["metadata"]
    assert migrate_store(place) == [1]
    assert migrate_store(place) == []
    assert not verify_store(place, deep=True).problems
    assert storage.read("zarr.json") == whole


def test_a_picture_of_the_store(marked: str, tmp_path: Path) -> None:
    plot_store(marked, tmp_path / "store.png")
    assert (tmp_path / "store.png").read_bytes()[:4] == b"\x89PNG"
    plot_store(make_store(tmp_path / "empty", {}), tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 5000


def test_damage_is_never_sealed_into_a_new_snapshot(tmp_path: Path, corpus: Corpus) -> None:
    """What is copied from one snapshot into the next gets new checksums there: it must be sound."""
    store = make_store(tmp_path / "store", corpus)
    told = {i: {"start": [1.0], "end": [4.0], "text": [f"the words of {i}"]} for i in corpus}
    (tmp_path / "captions.json").write_text(json.dumps(told))
    write_captions(store, tmp_path / "captions.json", CaptionConfig(tokenizer="wordpiece:100"))
    delete_videos(store, ["v5"])
    folder = store / "index" / StoreIndex(store).name
    for column in ("text", "tokens", "clip_end_ms", "deleted/video_id"):
        flip_bit(folder / column / "c" / "0", 1)
        with pytest.raises(StoreError, match=rf"{column.rpartition('/')[2]} in .* is damaged"):
            name_split(store, "train", ["v1"])
        flip_bit(folder / column / "c" / "0", 1)
    name_split(store, "train", ["v1"])
    assert not verify_store(store, deep=True).problems


def test_a_deleted_video_is_not_asked_for_again(tmp_path: Path, corpus: Corpus) -> None:
    store = make_store(tmp_path / "store", corpus)
    delete_videos(store, ["v0"])
    shard = int(FeatureReader(store, snapshot="000001").index.shard[0])
    (store / f"features/c/{shard}/0").unlink()
    report = verify_store(store, repair=True)
    assert not report.problems
    assert "v0" not in report.to_extract
    videos = store_info(store)["videos"]
    assert videos["planned"] == videos["ok"] + videos["failed"] + videos["open"] + videos["deleted"]


def test_a_lost_record_gives_its_number_to_nobody(tmp_path: Path, corpus: Corpus) -> None:
    """A reader of an older snapshot must find nothing, never the rows of what was made later."""
    store = make_store(tmp_path / "store", corpus)
    old = FeatureReader(store, "off")
    shard = int(old.index.shard[0])
    (store / f"_commits/{shard:06d}.json").unlink()
    flip_bit(store / f"features/c/{shard}/0", 5)  # else the snapshot says what is in it, and the record is made anew
    report = verify_store(store, deep=True, repair=True)
    assert not report.problems
    assert old.index.video_id(0) in report.to_extract
    write_shards(store, {**corpus, "v0": features("v0", 3, salt=9)})
    finalise(store)
    with pytest.raises(StoreError, match="is missing"):
        old.read(0)
    assert not verify_store(store, deep=True).problems
