"""feature_store.salvage: what is whole of a damaged shard stays, whatever is damaged, whenever a repair is killed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from feature_store.commit import committed_shards, read_commit
from feature_store.files import SCRATCH
from feature_store.info import failures, store_info
from feature_store.layout import create_store, open_store, shard_key
from feature_store.plan import PlannedVideo, plan_videos, read_plan
from feature_store.plan_repair import plan_shard
from feature_store.reader import FeatureReader
from feature_store.records import VideoRecord
from feature_store.shard import index_bytes, shard_bytes
from feature_store.snapshot import finalise
from feature_store.storage import open_storage
from feature_store.verify import verify_store
from feature_store.writer import ShardAttempt
from tests.feature_store.store_tools import F, change, features, flipped, provenance, whole_after_cut
from vlm_dist.errors import StoreError

LENGTHS = {f"v{number}": 40 + 70 * number for number in range(6)}  # 1,290 rows in 6 chunks
CORPUS = {video_id: features(video_id, rows) for video_id, rows in LENGTHS.items()}
CHUNK = 256 * F * 2 + 4


@pytest.fixture
def place(long_place: str) -> str:
    """A folder, and (slow) a bucket."""
    return long_place


@pytest.fixture
def one_shard(place: str) -> str:
    """A store with six videos in shard 0, and one that failed, one that overflowed; two further shards of one."""
    return fill(place)


def fill(place: str) -> str:
    create_store(place, provenance(), 2048)
    videos = [PlannedVideo(video_id, f"{video_id}.mp4") for video_id in [*CORPUS, "broken", "over"]]
    # All of them in one shard, as in a store whose shards have 64 MiB; `plan_videos` gives small ones fewer.
    assert plan_shard(open_store(place), videos) == 0
    commit_shard(place, 0, [*CORPUS, "broken", "over"])
    assert [task.shard for task in plan_videos(place, [PlannedVideo("other", "other.mp4")], 1)] == [1, 2]
    for task in plan_videos(place, [], 1):
        commit_shard(place, task.shard, [video.video_id for video in task.videos])
    finalise(place)
    return place


def commit_shard(root: str, shard: int, ids: list[str]) -> None:
    with ShardAttempt(root, shard) as attempt:
        for video_id in ids:
            known = {"video_id": video_id, "path": f"{video_id}.mp4", "decoded_s": 7.5, "claimed_s": 8.0}
            if video_id == "broken":
                attempt.add(VideoRecord(**known, status="failed", reason="corrupt", message="no frame"), None)
            elif video_id == "over" and shard == 0:
                attempt.add(VideoRecord(**known, status="overflow"), None)
            else:
                rows = CORPUS.get(video_id, features(video_id, 5))
                attempt.add(VideoRecord(**known, seconds=1.25, attempts=2), rows)
        assert attempt.commit()


def held(root: str) -> set[str]:
    """What readers see; every byte of it is right."""
    reader = FeatureReader(root, "always")
    found = {reader.index.video_id(v): reader.read(v) for v in range(reader.index.num_videos)}
    assert all(np.array_equal(rows, CORPUS.get(i, features(i, 5))) for i, rows in found.items())
    return set(found)


ALL = {*CORPUS, "over", "other"}
INDEX_AT = 6 * CHUNK


How = Callable[[bytes], bytes]


@pytest.mark.parametrize(
    ("how", "deep", "lost"),
    [
        (flipped(CHUNK + 5), True, {"v2"}),  # of rows 150 to 330
        (flipped(CHUNK - 2), True, set[str]()),  # a chunk's checksum
        (flipped(INDEX_AT + 9), True, set[str]()),  # the chunk index
        (flipped(INDEX_AT - 10), True, set[str]()),  # what fills the last chunk up
        (lambda data: data[:-7], False, set[str]()),
        (lambda data: data[:INDEX_AT], False, set[str]()),
        (lambda data: data[: INDEX_AT - CHUNK], False, {"v5"}),
        (lambda data: data[:10], False, set(CORPUS)),
        (lambda data: b"", False, set(CORPUS)),
        (lambda data: data + b"more", False, set[str]()),
        (lambda data: bytes(len(data)), True, set(CORPUS)),
    ],
)
def test_only_what_is_damaged_is_lost(tmp_path: Path, how: How, deep: bool, lost: set[str]) -> None:
    mend_and_finish(fill(str(tmp_path / "store")), how, deep, lost)


def test_a_flipped_bit(one_shard: str) -> None:
    mend_and_finish(one_shard, flipped(40 * F * 2 + 3), True, {"v1"})


def test_a_file_that_is_cut_short(one_shard: str) -> None:
    mend_and_finish(one_shard, lambda data: data[: 2 * CHUNK + 11], False, {"v3", "v4", "v5"})


def mend_and_finish(one_shard: str, how: How, deep: bool, lost: set[str]) -> None:
    """Damages shard 0, repairs, extracts again what is lost, and compares everything on the way."""
    meta = open_store(one_shard)
    before = read_commit(meta, 0)
    assert before.size == shard_bytes(meta, sum(LENGTHS.values())) == INDEX_AT + index_bytes(meta)
    change(one_shard, shard_key(0), how)
    if not deep:
        assert set(LENGTHS) - whole_after_cut(before, open_storage(one_shard).size(shard_key(0)) or 0) == lost
    report = verify_store(one_shard, deep=deep)
    assert {problem.kind for problem in report.problems} <= {"shard", "chunk", "video"}
    assert set(report.to_extract) == lost, "known before the repair"
    report = verify_store(one_shard, deep=deep, repair=True)
    assert report.problems == []
    kept = len(LENGTHS) - len(lost)
    assert report.repaired == [
        f"kept {kept} of 6 videos and the reasons of 1 failed ones of shard 0 as shard 3",
        "voided shard 0: " + (f"extract again to make {len(lost)} of its videos anew" if lost else "nothing is lost"),
        *report.repaired[2:],
    ]
    assert set(report.to_extract) == lost
    assert held(one_shard) == ALL - lost
    assert verify_store(one_shard, deep=True).problems == []
    known = {record.video_id: record for record in before.videos}
    for record in read_commit(meta, 3).videos:
        old = known[record.video_id]
        assert record.model_copy(update={"row": old.row}) == old, "all that was known is kept"
    assert [video for segment in read_plan(meta)[-1:] for task in segment.tasks for video in task.videos] == [
        PlannedVideo(record.video_id, f"{record.video_id}.mp4") for record in read_commit(meta, 3).videos
    ]
    assert [(record.video_id, record.reason) for record in failures(one_shard)] == [("broken", "corrupt")]
    assert store_info(one_shard)["videos"]["open"] == len(lost)
    again = [video.video_id for task in plan_videos(one_shard, [], 1) for video in task.videos]
    assert set(again) == lost, "nothing else is given out again, the failed one neither"
    for task in plan_videos(one_shard, [], 1):
        commit_shard(one_shard, task.shard, [video.video_id for video in task.videos])
    finalise(one_shard)
    assert held(one_shard) == ALL
    assert verify_store(one_shard, deep=True).problems == []


def test_a_file_that_is_gone_leaves_its_failures(one_shard: str) -> None:
    open_storage(one_shard).remove(shard_key(0))
    report = verify_store(one_shard, repair=True)
    assert (report.problems, set(report.to_extract)) == ([], set(CORPUS))
    assert [(record.video_id, record.reason) for record in failures(one_shard)] == [("broken", "corrupt")]
    assert read_commit(open_store(one_shard), 3).size == 0
    again = [video.video_id for task in plan_videos(one_shard, [], 1) for video in task.videos]
    assert set(again) == set(CORPUS)


def test_several_shards_at_once(place: str) -> None:
    create_store(place, provenance(), 2048)
    for shard, ids in enumerate((["v0", "v1"], ["v2", "v3"], ["v4"])):
        assert plan_shard(open_store(place), [PlannedVideo(i, "") for i in ids]) == shard
        commit_shard(place, shard, ids)
    finalise(place)
    for shard in (0, 1):
        change(place, shard_key(shard), flipped(7))
    report = verify_store(place, deep=True, repair=True)
    assert (report.problems, report.to_extract) == ([], ["v0", "v2"])
    assert report.repaired[:4] == [
        "kept 1 of 2 videos of shard 0 as shard 3",
        "voided shard 0: extract again to make 1 of its videos anew",
        "kept 1 of 2 videos of shard 1 as shard 4",
        "voided shard 1: extract again to make 1 of its videos anew",
    ]
    assert held(place) == {"v1", "v3", "v4"}


def test_two_shards_with_one_video_and_one_open_task_of_it(tmp_path: Path) -> None:
    """A repair was killed when it had planned a shard for the first: the second does not take that one too."""
    root = str(tmp_path / "store")
    create_store(root, provenance(), 2048)
    video = PlannedVideo("v0", "")
    for shard in (0, 1):
        assert plan_shard(open_store(root), [video]) == shard
        commit_shard(root, shard, ["v0"])
        change(root, shard_key(shard), lambda data: data[:-1])
    assert plan_shard(open_store(root), [video]) == 2
    report = verify_store(root, repair=True)
    assert (report.problems, report.to_extract) == ([], [])
    assert committed_shards(open_store(root)) == [0, 1, 2, 3]
    assert held(root) == {"v0"}


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test takes it."""


KILLS = [
    "feature_store.plan_repair.fit_array",  # after the segment was written
    "feature_store.salvage._copy",  # after the array has room
    "feature_store.writer.ShardAttempt.commit",  # what is whole was staged
    "feature_store.writer.roll_forward",  # after the new record, before its shard is published
    "feature_store.salvage.void",  # the new shard is there, the old one as well
    "feature_store.commit.staged_attempts",  # in the middle of voiding
    "feature_store.verify.roll_all_forward",  # all is done but the snapshot
]


@pytest.mark.parametrize("step", KILLS)
def test_a_repair_that_is_killed_is_ended_by_the_next(
    one_shard: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    change(one_shard, shard_key(0), flipped(40 * F * 2 + 3))

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(step, kill)
        if step.endswith("commit"):
            patch.setattr("feature_store.writer.ShardAttempt.abandon", kill)
        with pytest.raises(Killed):
            verify_store(one_shard, deep=True, repair=True)
    left = {problem.where for problem in verify_store(one_shard, deep=True).problems if problem.kind != "metadata"}
    assert all("shard 0" in where or "index" in where for where in left), "nothing that was whole before is not now"
    report = verify_store(one_shard, deep=True, repair=True)
    assert report.problems == []
    assert held(one_shard) == ALL - {"v1"}
    assert committed_shards(open_store(one_shard)) == [0, 1, 2, 3], "what was planned or committed before is used"
    assert sum(len(segment.tasks) for segment in read_plan(open_store(one_shard))) == 4
    assert [(record.video_id, record.reason) for record in failures(one_shard)] == [("broken", "corrupt")]
    assert not open_storage(one_shard).names(SCRATCH)
    (task,) = plan_videos(one_shard, [], 1)
    assert [video.video_id for video in task.videos] == ["v1"]


def test_what_a_later_shard_says_counts(one_shard: str) -> None:
    """The failed video was tried again, with another end: an older reason does not come back over it."""
    (task,) = plan_videos(one_shard, [], 1, retry_failed=True)
    with ShardAttempt(one_shard, task.shard) as attempt:
        attempt.add(VideoRecord(video_id="broken", status="failed", reason="timeout"), None)
        assert attempt.commit()
    change(one_shard, shard_key(0), flipped(7))
    report = verify_store(one_shard, deep=True, repair=True)
    assert report.repaired[0] == "kept 5 of 6 videos of shard 0 as shard 4"
    assert [record.reason for record in failures(one_shard)] == ["timeout"]
    assert store_info(one_shard)["failures"] == {"timeout": 1}


def test_somebody_else_at_the_new_shard(one_shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change(one_shard, shard_key(0), flipped(7))
    with monkeypatch.context() as patch:
        patch.setattr(ShardAttempt, "commit", lambda self: False)
        with pytest.raises(StoreError, match=r"somebody else wrote shard 3 .*run it again when nobody writes"):
            verify_store(one_shard, deep=True, repair=True)
    assert verify_store(one_shard, deep=True, repair=True, writers_gone=True).to_extract == ["v0"]
