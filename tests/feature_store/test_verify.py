"""feature_store.verify and info: every kind of damage is found and named, and a repair loses nothing that is whole."""

import json
import random
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from feature_store import inspection
from feature_store.captions import write_captions
from feature_store.commit import Commit, commit_key, committed_shards, iter_commits, iter_records, read_commit, void
from feature_store.config import CaptionConfig
from feature_store.index import StoreIndex, current_line
from feature_store.info import failures, store_info
from feature_store.layout import StoreMeta, create_store, open_store, shard_key
from feature_store.plan import plan_videos
from feature_store.prune import prune_store
from feature_store.reader import FeatureReader
from feature_store.s3_storage import S3Storage
from feature_store.snapshot import finalise, snapshot_names
from feature_store.verify import verify_store
from tests.feature_store.store_tools import (
    change,
    features,
    flip_bit,
    flipped,
    make_store,
    provenance,
    random_corpus,
    whole_after_cut,
    write_shards,
)
from vlm_dist.errors import StoreError

Corpus = dict[str, np.ndarray | None]


def restore(store: Path, corpus: Corpus) -> None:
    """Extracts again what a repair took out; the store is then as it was."""
    write_shards(store, corpus)
    finalise(store)
    report = verify_store(store, deep=True)
    assert not report.problems
    reader = FeatureReader(store, "always")
    assert reader.index.num_videos == 30
    for video in range(30):
        assert np.array_equal(reader.read(video), corpus[reader.index.video_id(video)])


def test_a_sound_store(narrated: Path) -> None:
    report = verify_store(narrated, deep=True)
    assert (report.problems, report.videos, report.repaired) == ([], 30, [])
    assert report.bytes_checked == sum(path.stat().st_size for path in (narrated / "features/c").glob("*/0"))
    before = {path: path.stat().st_mtime_ns for path in narrated.rglob("*") if path.is_file()}
    assert verify_store(narrated, deep=True, repair=True).repaired == []
    assert before == {path: path.stat().st_mtime_ns for path in narrated.rglob("*") if path.is_file()}


def test_flipped_bit_in_features_names_video_shard_and_chunk(narrated: Path, corpus: Corpus) -> None:
    fingerprint = StoreIndex(narrated).fingerprint
    flip_bit(narrated / "features/c/1/0", 100)
    assert not verify_store(narrated).problems, "quick looks at sizes"
    problems = verify_store(narrated, deep=True).problems
    assert [problem.kind for problem in problems] == ["chunk", "video"]
    index = StoreIndex(narrated)
    (video,) = np.flatnonzero((index.shard == 1) & (index.row == 0)).tolist()
    assert all(f"video {index.video_id(video)}" in problem.where for problem in problems)
    assert "shard 1" in problems[0].where
    assert "chunk 0" in problems[0].where
    report = verify_store(narrated, deep=True, repair=True)
    assert not report.problems
    held = int((index.shard == 1).sum())
    assert held > 1
    assert report.repaired[0].startswith(f"kept {held - 1} of {held} videos")
    assert report.repaired[1] == "voided shard 1: extract again to make 1 of its videos anew"
    assert report.to_extract == [index.video_id(video)], "nothing else of the shard is lost"
    assert report.videos == 29
    restore(narrated, corpus)
    assert StoreIndex(narrated).fingerprint == fingerprint, "captions came back with their videos"


@pytest.mark.parametrize("damage", ["deleted", "truncated", "empty"])
def test_shards_that_are_gone_or_short(narrated: Path, corpus: Corpus, damage: str) -> None:
    path = narrated / "features/c/2/0"
    data = path.read_bytes()
    kept = data[: 3000 if damage == "truncated" else 0]
    path.unlink() if damage == "deleted" else path.write_bytes(kept)
    with pytest.raises(StoreError, match="shard 2"):
        finalise(narrated)
    commit = read_commit(open_store(narrated), 2)
    lost = {r.video_id for r in commit.videos if r.status == "ok"} - whole_after_cut(commit, len(kept))
    (problem,) = verify_store(narrated).problems
    assert problem.kind == "shard"
    assert "shard 2" in problem.where
    report = verify_store(narrated, repair=True)
    assert not report.problems
    assert set(report.to_extract) == lost
    assert report.videos == 30 - len(lost)
    restore(narrated, corpus)


def test_damaged_commit_record(narrated: Path, corpus: Corpus) -> None:
    flip_bit(narrated / "_commits/000003.json", 200, 2)
    kinds = {problem.kind for problem in verify_store(narrated).problems}
    assert "commit" in kinds
    with pytest.raises(StoreError, match=r"000003\.json is damaged"):
        plan_videos(narrated, [], 1)
    report = verify_store(narrated, repair=True)
    assert not report.problems
    assert list((narrated / "_voided").glob("000003.*"))
    assert report.videos == 30, "the file is sound, and the snapshot knows what is in it"
    assert set(report.to_extract) <= {"broken"}
    restore(narrated, corpus)


def test_a_half_copied_store(narrated: Path, corpus: Corpus) -> None:
    """Features and index came over, some commit records did not; nobody may read what no record vouches for."""
    for number in (0, 4):
        (narrated / f"_commits/{number:06d}.json").unlink()
    problems = verify_store(narrated).problems
    assert {problem.kind for problem in problems} == {"stray", "video"}
    assert any("features/c/4/0" in problem.where for problem in problems)
    report = verify_store(narrated, repair=True)
    assert not report.problems
    assert StoreIndex(narrated).num_videos == report.videos == 30, (
        "the snapshot vouches for them: their records are back"
    )
    assert set(report.to_extract) <= {"broken"}
    restore(narrated, corpus)


def test_a_half_copied_store_without_its_snapshots(narrated: Path, corpus: Corpus) -> None:
    for number in (0, 4):
        (narrated / f"_commits/{number:06d}.json").unlink()
    for snapshot in (narrated / "index").glob("0*"):
        shutil.rmtree(snapshot)
    (narrated / "CURRENT").unlink()
    report = verify_store(narrated, repair=True)
    assert not report.problems
    assert StoreIndex(narrated).num_videos == report.videos < 30
    assert len(set(report.to_extract) - {"broken"}) == 30 - report.videos
    assert sum("which no commit record names" in line for line in report.repaired) == 2
    restore(narrated, corpus)


@pytest.mark.parametrize("damage", ["lost", "flipped"])
def test_a_current_that_is_lost(narrated: Path, corpus: Corpus, damage: str) -> None:
    current = narrated / "CURRENT"
    told = current.read_bytes()
    current.unlink() if damage == "lost" else flip_bit(current, 2)
    (problem,) = verify_store(narrated).problems
    assert (problem.kind, problem.where) == ("index", "CURRENT")
    report = verify_store(narrated, repair=True)
    assert not report.problems
    assert report.repaired == [f"wrote CURRENT anew: it names snapshot {told[:6].decode()}"]
    assert current.read_bytes() == told


@pytest.mark.parametrize("pruned", [False, True])
def test_a_snapshot_that_is_made_while_the_store_is_looked_at(
    store: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, pruned: bool
) -> None:
    """Of videos that were committed after the records were read: an extraction at work harms nothing."""
    finalised = StoreIndex(store).name

    def records(meta: StoreMeta, shards: list[int]) -> Iterator[tuple[int, Commit | StoreError]]:
        yield from iter_records(meta, shards)
        write_shards(store, {**corpus, "late": features("late", 9)})
        assert finalise(store) > finalised
        if pruned:
            assert prune_store(store).snapshots == [finalised]

    monkeypatch.setattr("feature_store.inspection.iter_records", records)
    assert verify_store(store).problems == []
    monkeypatch.undo()
    assert verify_store(store).problems == []


def test_a_shard_that_is_planned_while_the_store_is_looked_at(
    store: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record is there before the records are read; its plan was not when the plan was."""

    def later(name: str, video_id: str) -> None:
        """Another video is extracted when the inspection calls this."""
        real = getattr(inspection, name)

        def extract_first(*args: object) -> object:
            monkeypatch.setattr(inspection, name, real)
            write_shards(store, {**corpus, video_id: features(video_id, 9)})
            return real(*args)

        monkeypatch.setattr(inspection, name, extract_first)

    later("array_shards", "late")
    assert verify_store(store).problems == []
    later("iter_records", "later")
    assert verify_store(store).problems == []


def test_the_newest_snapshot_is_compared_where_current_names_a_lost_one(store: Path) -> None:
    void(open_store(store), 0)
    held = {problem.where for problem in verify_store(store).problems}
    assert held
    assert all(where.startswith("index 000001, video ") for where in held)
    (store / "CURRENT").write_bytes(current_line("000009"))
    assert {problem.where for problem in verify_store(store).problems} == {*held, "CURRENT"}
    report = verify_store(store, repair=True)
    assert report.problems == []
    lost = "lost with snapshot 000009: what was deleted, split and said in it (its folder is gone)"
    assert report.repaired == [lost, "wrote snapshot 000010", "wrote CURRENT anew: it names snapshot 000010"]


def test_a_kill_before_the_first_current(store: Path) -> None:
    """The only snapshot was published, and its writer killed before CURRENT was there: no damage."""
    (store / "CURRENT").unlink()
    assert verify_store(store).problems == []


def test_all_records_are_read_at_once_and_damaged_ones_named(
    place: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(place, corpus)
    for shard in (1, 3):
        change(place, commit_key(shard), flipped(200, 2))
    readers: set[str] = set()
    if place.startswith("s3:"):
        read = S3Storage.read

        def watched(self: S3Storage, key: str) -> bytes:
            readers.update({threading.current_thread().name} if key.startswith("_commits/") else ())
            return read(self, key)

        monkeypatch.setattr(S3Storage, "read", watched)
    report = verify_store(place)
    bad = [problem.where for problem in report.problems if problem.kind == "commit"]
    assert bad == [open_store(place).place(commit_key(shard)) for shard in (1, 3)]
    assert report.shards == len(committed_shards(open_store(place)))
    assert threading.current_thread().name not in readers, "one request after another"
    assert not verify_store(place, repair=True).problems


def test_damaged_index_arrays(narrated: Path, corpus: Corpus, tmp_path: Path) -> None:
    current = StoreIndex(narrated).name
    for name, byte in (("tokens", 3), ("clip_start_ms", 4 * 2 * 7 + 1), ("n_rows", 5), ("text", 30)):
        path = narrated / "index" / current / name / "c" / "0"
        data = path.read_bytes()
        flip_bit(path, byte, 4)
        problems = verify_store(narrated, deep=True).problems
        assert any(f"array {name}" in problem.where and problem.kind == "index" for problem in problems), name
        if name != "n_rows":
            assert any(problem.kind == "captions" and "video video-" in problem.where for problem in problems), name
        path.write_bytes(data)
    flip_bit(path, 30, 4)
    report = verify_store(narrated, deep=True, repair=True)
    assert not report.problems
    assert any("took out damaged snapshot" in line for line in report.repaired)
    assert [line for line in report.repaired if line.startswith("lost")] == [
        f"lost with snapshot {current}: captions of video-001"
    ]
    assert StoreIndex(narrated).num_videos == 30
    assert (np.diff(StoreIndex(narrated).clip_ptr) == [2 * (n != 1) for n in range(30)]).all()
    restore(narrated, corpus)
    again = write_captions(narrated, tmp_path / "captions.json", CaptionConfig(tokenizer="wordpiece:100"))
    assert int(again.snapshot) > int(current), "a number is never used twice"


def test_damaged_metadata_and_plan(narrated: Path, corpus: Corpus) -> None:
    (narrated / "features/zarr.json").unlink()
    flip_bit(narrated / "_plan/plan-000.json", 300)
    flip_bit(narrated / "CURRENT", 2)
    with pytest.raises(StoreError, match=r"plan-000\.json is damaged"):
        plan_videos(narrated, [], 1)
    kinds = {problem.kind for problem in verify_store(narrated).problems}
    assert {"plan", "index"} <= kinds
    report = verify_store(narrated, deep=True, repair=True)
    assert not report.problems
    assert any(line.startswith("rebuilt plan segment 0") for line in report.repaired)
    assert StoreIndex(narrated).num_videos == 30
    restore(narrated, corpus)


@pytest.mark.parametrize(
    ("source", "target", "what", "kind"),
    [
        ("_plan/store.json", "_plan/plan-000.json", "a plan segment", "plan"),
        ("_commits/000002.json", "index/000002/snapshot.json", "the snapshot.json of a snapshot", "index"),
        ("_plan/plan-000.json", "_commits/000003.json", "a commit record", "commit"),
        ("index/000002/snapshot.json", "_plan/store.json", "", "metadata"),
    ],
)
def test_a_sealed_file_of_another_kind(
    narrated: Path, corpus: Corpus, source: str, target: str, what: str, kind: str
) -> None:
    """A seal does not say what it seals: each reader of one must."""
    whole = (narrated / target).read_bytes()
    shutil.copy(narrated / source, narrated / target)
    (problem,) = (problem for problem in verify_store(narrated).problems if problem.kind == kind)
    if what:
        assert f"{narrated}/{target} is damaged: it is not {what}" in problem.message
        assert "\n" not in problem.message
    report = verify_store(narrated, deep=True, repair=True)
    assert report.problems == []
    assert StoreIndex(narrated).num_videos == 30
    assert kind in ("plan", "commit") or (narrated / target).read_bytes() == whole
    restore(narrated, corpus)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_commits/000003.json", "commit"),
        ("_plan/plan-000.json", "plan"),
        ("features/c/2/0", "shard"),
        ("CURRENT", "index"),
        ("index/000002/snapshot.json", "index"),
        ("index/000002/clip_ptr/c/0", "index"),
        ("index/000002/snapshot-copy.json", "metadata"),
        ("features/zarr.json", "metadata"),
        ("zarr.json", ""),
    ],
)
def test_a_folder_in_the_place_of_a_file(narrated: Path, corpus: Corpus, name: str, kind: str) -> None:
    path = narrated / name
    path.unlink()
    path.mkdir()
    (path / "thesis.tex").write_text("not ours")

    def look() -> None:
        reader = FeatureReader(narrated, "always")
        for video in range(30):
            reader.read(video)
        plan_videos(narrated, [], 1)

    if kind != "metadata":  # which our readers do not need, and each plan writes
        with pytest.raises(StoreError, match=re.escape(name)):
            look()
    if kind:
        assert kind in {problem.kind for problem in verify_store(narrated).problems}
    report = verify_store(narrated, deep=True, repair=True)
    assert report.problems == []
    aside = [path.read_bytes() for path in (narrated / "_voided").rglob("*") if path.is_file()]
    assert aside.count(b"not ours") == 1
    restore(narrated, corpus)


def test_a_copy_of_the_metadata_that_is_none(narrated: Path) -> None:
    whole = (narrated / "zarr.json").read_bytes()
    shutil.copy(narrated / "_plan/plan-000.json", narrated / "_plan/store.json")
    (narrated / "zarr.json").unlink()
    for look in (lambda: verify_store(narrated, repair=True), lambda: create_store(narrated, provenance(), 1024)):
        with pytest.raises(StoreError, match=r"zarr\.json of .* and so is its second copy _plan/store\.json: restore"):
            look()
    (narrated / "zarr.json").write_bytes(whole)
    assert verify_store(narrated, repair=True).repaired == ["wrote _plan/store.json anew"]


def test_two_hundred_flipped_bits(narrated: Path, corpus: Corpus, tmp_path: Path) -> None:
    """Every flipped bit is found by a deep look, or an error names the file; with checks no wrong byte is read."""
    rng = random.Random(0)
    skip = ("zarr.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json")  # descriptions for other readers
    files = [path for path in sorted(narrated.rglob("*")) if path.is_file() and path.name not in skip]
    assert len(files) > 60
    for _ in range(200):
        path = rng.choice(files)
        data = path.read_bytes()
        byte, bit = rng.randrange(len(data)), rng.randrange(8)
        flip_bit(path, byte, bit)
        problems = verify_store(narrated, deep=True).problems
        assert problems, f"bit {bit} of byte {byte} of {path}"
        try:
            reader = FeatureReader(narrated, "always")
            found = {reader.index.video_id(v): reader.read(v) for v in range(reader.index.num_videos)}
        except StoreError:
            found = {}
        assert all(np.array_equal(rows, corpus.get(i)) for i, rows in found.items()), path
        path.write_bytes(data)
    assert not verify_store(narrated, deep=True).problems


def test_a_copy_elsewhere_is_the_same_store(narrated: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(narrated, tmp_path / "copy")
    assert not verify_store(copy, deep=True).problems
    assert StoreIndex(copy).fingerprint == StoreIndex(narrated).fingerprint


def test_a_shard_that_is_done_again_settles_a_failure(store: Path, corpus: Corpus) -> None:
    meta = open_store(store)
    shard = next(commit.shard for commit in iter_commits(meta) if any(r.status == "failed" for r in commit.videos))
    void(meta, shard)
    assert failures(store) == []
    write_shards(store, {**corpus, "broken": features("broken", 9)})
    finalise(store)
    reader = FeatureReader(store, "always")
    assert np.array_equal(reader.read(reader.index.find("broken")), features("broken", 9))
    assert store_info(store)["videos"] == {"planned": 31, "ok": 31, "failed": 0, "open": 0, "deleted": 0}
    assert not verify_store(store, deep=True).problems


def test_a_lost_index_is_made_anew(store: Path) -> None:
    before = StoreIndex(store).fingerprint
    shutil.rmtree(store / "index")
    (store / "CURRENT").unlink()
    assert verify_store(store).snapshot == ""
    finalise(store)
    assert StoreIndex(store).fingerprint == before
    assert [problem.where for problem in verify_store(store, deep=True).problems] == [f"{store}/index/zarr.json"]
    report = verify_store(store, deep=True, repair=True)
    assert (report.problems, report.repaired, report.snapshot) == ([], ["wrote index/zarr.json anew"], "000001")


METADATA = [
    "zarr.json",
    "index/zarr.json",
    "index/000002/zarr.json",
    "index/000002/tokens/zarr.json",
    "index/000002/pending/zarr.json",
    "index/000002/pending/text/zarr.json",
    "index/000002/snapshot-copy.json",
    "index/000002/tokenizer/vocab.txt",
    "index/000002/tokenizer/tokenizer_config.json",
    "_plan/store.json",
]


def test_what_follows_from_the_rest_is_made_anew(store: Path, tmp_path: Path) -> None:
    told = {i: {"start": [0], "end": [1], "text": ["now cut the onion"]} for i in ("video-001", "waits")}
    (tmp_path / "c.json").write_text(json.dumps(told))
    write_captions(store, tmp_path / "c.json", CaptionConfig(tokenizer="wordpiece:60"))
    before = StoreIndex(store).fingerprint
    # One after the other on one store, which each repair leaves as it was.
    for number, name in enumerate(METADATA):
        for damage in {"flip", ("cut", "lose")[number % 2]} if number else ("flip", "cut", "lose"):
            made_anew(store, name, damage)
            assert StoreIndex(store).fingerprint == before


def made_anew(store: Path, name: str, damage: str) -> None:
    path = store / name
    whole = path.read_bytes()
    if damage == "lose":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(whole[:-2])
    else:
        flip_bit(path, len(whole) // 3)
    if name == "zarr.json":
        with pytest.raises(StoreError, match=r"zarr.json.*(lost|damaged).*`vlm-dist store verify --repair` makes it"):
            verify_store(store, deep=True)
    else:
        assert [problem.kind for problem in verify_store(store, deep=True).problems] == ["metadata"], name
    assert not verify_store(store, deep=True, repair=True).problems
    assert path.read_bytes() == whole


@pytest.mark.parametrize("deep", [False, True])
def test_the_copy_of_the_metadata_comes_back_where_a_store_has_none(store: Path, deep: bool) -> None:
    whole = (store / "_plan/store.json").read_bytes()
    (store / "_plan/store.json").unlink()
    (problem,) = verify_store(store, deep=deep).problems
    assert (problem.kind, problem.where) == ("metadata", f"{store}/_plan/store.json")
    assert verify_store(store, deep=deep, repair=True).repaired == ["wrote _plan/store.json anew"]
    assert (store / "_plan/store.json").read_bytes() == whole
    (store / "_plan/store.json").unlink()
    create_store(store, provenance(), 1024)
    assert (store / "_plan/store.json").read_bytes() == whole


def test_a_flipped_bit_of_the_frame_of_the_metadata(store: Path) -> None:
    """The checksum covers the attributes; the rest of it is compared byte for byte."""
    whole = (store / "zarr.json").read_bytes()
    (store / "zarr.json").write_bytes(whole.replace(b"zarr_format", b"zarr_formau"))
    (problem,) = verify_store(store).problems
    assert problem.where == f"{store}/zarr.json"
    assert verify_store(store, repair=True).repaired == ["wrote zarr.json anew"]
    assert (store / "zarr.json").read_bytes() == whole


def test_of_a_snapshot_that_is_taken_out_nothing_comes_back(tmp_path: Path) -> None:
    """An array is damaged, so that the snapshot goes; its metadata is too, and would be made anew where it lay."""
    corpus = random_corpus(6, 300)
    store = make_store(tmp_path / "store", corpus)
    before = snapshot_names(open_store(store))
    for name in ("c/0", "zarr.json"):
        flip_bit(store / "index" / before[0] / "crc32c" / name, 3)
    assert verify_store(store, deep=True, repair=True).problems == []
    assert set(snapshot_names(open_store(store))).isdisjoint(before)
    assert verify_store(store, deep=True).problems == []
    reader = FeatureReader(store, check="always")
    assert sorted(reader.index.id_list()) == sorted(name.encode() for name in corpus)


def test_videos_whose_shard_and_record_are_gone_are_named(narrated: Path) -> None:
    """Only the index knows them any more."""
    meta = open_store(narrated)
    ids = sorted(record.video_id for record in read_commit(meta, 0).videos if record.status == "ok")
    (narrated / commit_key(0)).unlink()
    (narrated / shard_key(0)).unlink()
    assert f"{len(ids)} videos of the index are in no commit record" in store_info(narrated)["damage"]
    assert verify_store(narrated).to_extract == ids
    report = verify_store(narrated, deep=True, repair=True)
    assert (report.problems, report.to_extract) == ([], ids)


def test_metadata_whose_second_copy_is_lost_too(narrated: Path) -> None:
    for name in ("zarr.json", "_plan/store.json"):
        (narrated / name).unlink()
    with pytest.raises(StoreError, match=r"second copy _plan/store\.json is lost: .*from a backup"):
        verify_store(narrated, repair=True)


def test_a_lost_current_is_not_a_store_without_an_index(narrated: Path) -> None:
    finalise(narrated)
    write_captions(narrated, None, CaptionConfig(tokenizer="wordpiece:90"))
    (narrated / "CURRENT").unlink()
    for look in (store_info, StoreIndex):
        with pytest.raises(StoreError, match="has lost CURRENT: run `vlm-dist store verify --repair`"):
            look(narrated)
