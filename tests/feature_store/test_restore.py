"""feature_store.restore: a sound shard file whose commit record is damaged or lost gets it back from a snapshot."""

from collections.abc import Callable

import numpy as np
import pytest

from feature_store.commit import commit_key, read_commit
from feature_store.info import failures
from feature_store.layout import VOIDED, create_store, open_store, shard_key
from feature_store.marks import delete_videos
from feature_store.plan import PlannedVideo, plan_videos, segment_key
from feature_store.plan_repair import plan_shard
from feature_store.reader import FeatureReader
from feature_store.snapshot import finalise
from feature_store.storage import open_storage
from feature_store.verify import verify_store
from feature_store.writer import ShardAttempt
from tests.feature_store.store_tools import add_video, change, features, flipped, provenance

CORPUS = {f"v{number}": features(f"v{number}", 60 + 50 * number) for number in range(5)}


@pytest.fixture
def place(long_place: str) -> str:
    """A folder, and (slow) a bucket."""
    return long_place


@pytest.fixture
def two_shards(place: str) -> str:
    """Four videos and a failed one in shard 0, one in shard 1; in a snapshot."""
    meta = create_store(place, provenance(), 1024)
    for shard, ids in enumerate((["v0", "v1", "broken", "v2", "v3"], ["v4"])):
        videos = [PlannedVideo(video_id, f"/videos/{video_id}.mp4") for video_id in ids]
        assert plan_shard(meta, videos) == shard
        with ShardAttempt(place, shard) as attempt:
            for video in videos:
                add_video(attempt, video, CORPUS.get(video.video_id))
            assert attempt.commit()
    finalise(place)
    return place


def lose(root: str, key: str) -> None:
    open_storage(root).remove(key)


def damage(root: str, key: str) -> None:
    change(root, key, flipped(150, 3))


def held(root: str) -> set[str]:
    """What readers see; every byte of it is right."""
    reader = FeatureReader(root, "always")
    found = {reader.index.video_id(v): reader.read(v) for v in range(reader.index.num_videos)}
    assert all(np.array_equal(rows, CORPUS[i]) for i, rows in found.items())
    return set(found)


@pytest.mark.parametrize("harm", [lose, damage])
def test_the_record_is_back(two_shards: str, harm: Callable[[str, str], None]) -> None:
    meta = open_store(two_shards)
    before, name = read_commit(meta, 0), FeatureReader(two_shards).index.name
    old = FeatureReader(two_shards, "always")
    harm(two_shards, commit_key(0))
    assert verify_store(two_shards).problems
    report = verify_store(two_shards, repair=True)
    assert report.problems == []
    assert report.repaired[0] == f"kept 4 of 5 videos of shard 0: made its commit record anew from snapshot {name}"
    assert report.to_extract == ["broken"], "no snapshot says why it failed: it has another try"
    after = read_commit(meta, 0)
    assert (after.size, after.crc32c, after.rows) == (before.size, before.crc32c, before.rows)
    assert after.origin == before.origin == meta.provenance.digest
    places = [(r.video_id, r.path, r.row, r.n_rows, r.crc32c) for r in before.videos if r.status == "ok"]
    assert [(r.video_id, r.path, r.row, r.n_rows, r.crc32c) for r in after.videos] == places
    aside = [key for key in open_storage(two_shards).names(VOIDED) if key.startswith("000000.")]
    assert len(aside) == (harm is damage), "the damaged record is kept aside"
    assert held(two_shards) == set(CORPUS)
    assert np.array_equal(old.read(0), CORPUS["v0"]), "readers that were at work go on"
    (task,) = plan_videos(two_shards, [], 1)
    assert [video.video_id for video in task.videos] == ["broken"]
    assert failures(two_shards) == []
    assert verify_store(two_shards, deep=True).problems == []


def test_a_kill_between_taking_the_record_out_and_writing_it_anew(
    two_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(two_shards, commit_key(0))
    with monkeypatch.context() as patch:
        patch.setattr("feature_store.commit._sealed", lambda commit: pytest.exit("killed"))
        with pytest.raises(pytest.exit.Exception):
            verify_store(two_shards, repair=True)
    assert open_storage(two_shards).size(commit_key(0)), "the damaged record stays until the new one is there"
    assert verify_store(two_shards, repair=True).problems == []
    assert held(two_shards) == set(CORPUS)


def test_with_a_lost_plan(two_shards: str) -> None:
    """What the record says again is planned again with it."""
    for key in (commit_key(0), segment_key(0), commit_key(1), segment_key(1)):
        lose(two_shards, key)
    report = verify_store(two_shards, repair=True)
    assert report.problems == []
    assert held(two_shards) == set(CORPUS)
    assert plan_videos(two_shards, [], 1) == [], "that a video failed is known to nobody any more"


def test_an_older_snapshot_tells_of_deleted_videos(two_shards: str) -> None:
    delete_videos(two_shards, ["v1", "v3"])
    lose(two_shards, commit_key(0))
    report = verify_store(two_shards, repair=True)
    assert report.problems == []
    assert "from snapshot 000001" in report.repaired[0]
    assert held(two_shards) == {"v0", "v2", "v4"}
    delete_videos(two_shards, ["v1", "v3"], undo=True)
    assert held(two_shards) == set(CORPUS)


def test_files_that_are_not_what_a_snapshot_says_are_voided(two_shards: str) -> None:
    lose(two_shards, commit_key(0))
    change(two_shards, shard_key(0), flipped(9))
    report = verify_store(two_shards, repair=True)
    assert report.problems == []
    assert report.to_extract == ["broken", "v0", "v1", "v2", "v3"]
    assert "which no commit record names" in report.repaired[0]
    assert held(two_shards) == {"v4"}


def test_a_file_that_no_snapshot_names_is_voided(two_shards: str) -> None:
    """Committed, and its record lost before the next snapshot: nobody knows which rows are whose."""
    meta = open_store(two_shards)
    assert plan_shard(meta, [PlannedVideo("late", "late.mp4")]) == 2
    with ShardAttempt(two_shards, 2) as attempt:
        add_video(attempt, PlannedVideo("late", "late.mp4"), features("late", 9))
        assert attempt.commit()
    damage(two_shards, commit_key(2))
    report = verify_store(two_shards, repair=True)
    assert (report.problems, report.to_extract) == ([], ["late"])
    assert report.repaired[0] == "voided shard 2: extract again to make its videos anew"
    assert held(two_shards) == set(CORPUS)


def test_a_video_that_is_not_planned_for_the_shard(two_shards: str) -> None:
    """A file from another store in this one's place, with its snapshot: the plan does not know it."""
    meta = open_store(two_shards)
    storage = open_storage(two_shards)
    lose(two_shards, commit_key(1))
    lose(two_shards, segment_key(1))
    assert plan_shard(meta, [PlannedVideo("another", "a.mp4")]) == 1
    report = verify_store(two_shards, repair=True)
    assert report.problems == []
    assert storage.size(shard_key(1)) is None
    assert held(two_shards) == set(CORPUS) - {"v4"}
