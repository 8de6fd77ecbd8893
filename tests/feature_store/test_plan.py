"""feature_store.plan: shares, segments that only grow, duplicates, and videos that found no place."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zarr

from feature_store.commit import void
from feature_store.info import failures
from feature_store.layout import FEATURES_JSON, create_store, open_store, set_shard_count
from feature_store.plan import (
    PlannedVideo,
    Segment,
    ShardTask,
    anything_to_do,
    create_segment,
    plan_videos,
    read_plan,
)
from feature_store.plan_repair import missing_segments
from feature_store.records import VideoRecord
from feature_store.verify import verify_store
from feature_store.writer import ShardAttempt
from tests.feature_store.store_tools import change, features, provenance, write_shards
from vlm_dist.errors import StoreError, StoreUnreachableError


def planned(count: int, start: int = 0) -> list[PlannedVideo]:
    return [PlannedVideo(f"v{number}", f"/videos/{number}.mp4") for number in range(start, start + count)]


@pytest.mark.parametrize(
    ("videos", "workers", "shards", "largest"),
    [(1, 8, 1, 1), (100, 2, 9, 12), (100, 1, 4, 25), (1000, 1, 6, 167), (3, 1, 3, 1), (5000, 4, 30, 167)],
)
def test_shares(tmp_path: Path, videos: int, workers: int, shards: int, largest: int) -> None:
    create_store(tmp_path, provenance(feature_dim=512))
    tasks = plan_videos(tmp_path, planned(videos), workers)
    assert [task.shard for task in tasks] == list(range(shards))
    assert max(len(task.videos) for task in tasks) == largest <= 168
    assert [video for task in tasks for video in task.videos] == planned(videos)
    assert zarr.open_group(tmp_path, mode="r")["features"].shape == (shards * 65536, 512)


def test_again_adds_nothing_and_new_videos_add_one_segment(tmp_path: Path) -> None:
    meta = create_store(tmp_path, provenance(), 512)
    first = plan_videos(tmp_path, planned(20), 1)
    assert plan_videos(tmp_path, planned(20), 4) == first
    both = plan_videos(tmp_path, planned(30, 10), 1)
    assert both[: len(first)] == first
    assert [segment.first_shard for segment in read_plan(meta)] == [0, len(first)]
    assert {video for task in both for video in task.videos} == set(planned(40))
    write_shards(tmp_path, {video.video_id: features(video.video_id, 5) for video in planned(40)})
    assert plan_videos(tmp_path, planned(40), 1) == []
    assert not anything_to_do(tmp_path, planned(40))
    assert anything_to_do(tmp_path, planned(41))
    assert anything_to_do(tmp_path, [*planned(40), PlannedVideo("v0", "/another/0.mp4")])


def test_a_corpus_may_move(tmp_path: Path) -> None:
    create_store(tmp_path, provenance(), 512)
    plan_videos(tmp_path, planned(2), 1)
    (task, other) = plan_videos(tmp_path, [PlannedVideo("v0", "/elsewhere/0.mp4")], 1)
    assert task.videos[0].path == "/elsewhere/0.mp4"
    assert other.videos[0].path == "/videos/1.mp4"


def test_a_known_id_of_another_file_in_a_later_run_is_a_duplicate(tmp_path: Path) -> None:
    one, two, root = tmp_path / "one", tmp_path / "two", tmp_path / "store"
    for folder in (one, two):
        folder.mkdir()
        (folder / "v.mp4").write_text(folder.name)
    (tmp_path / "link.mp4").symlink_to(one / "v.mp4")
    create_store(root, provenance(), 512)
    (first,) = plan_videos(root, [PlannedVideo("v", str(one / "v.mp4"))], 1)
    other = [PlannedVideo("v", str(two / "v.mp4"))]
    assert anything_to_do(root, [PlannedVideo("w", ""), *other])
    assert plan_videos(root, other, 1) == [first]
    assert [segment.duplicates for segment in read_plan(open_store(root))] == [(), tuple(other)]
    for same in (str(two / "v.mp4"), str(tmp_path / "link.mp4")):
        plan_videos(root, [PlannedVideo("v", same)], 1)
    assert len(read_plan(open_store(root))) == 2
    (one / "v.mp4").rename(two / "moved.mp4")
    (task,) = plan_videos(root, other, 1)
    assert task.videos == tuple(other), "the planned file is gone: the corpus has moved"


def test_duplicates_are_recorded_once_for_each_further_input(tmp_path: Path) -> None:
    create_store(tmp_path, provenance(), 512)
    videos = [
        PlannedVideo("a", "1.mp4"),
        PlannedVideo("a", "2.mp4"),
        PlannedVideo("a", "2.mp4"),
        PlannedVideo("b", "b"),
    ]
    assert anything_to_do(tmp_path, videos)
    for _ in range(2):
        tasks = plan_videos(tmp_path, videos, 1)
        assert [video.path for task in tasks for video in task.videos] == ["1.mp4", "b"]
        assert [(record.video_id, record.path, record.reason) for record in failures(tmp_path)] == [
            ("a", "2.mp4", "duplicate")
        ] * 2
    assert len(read_plan(open_store(tmp_path))) == 1


def test_videos_without_a_place_are_planned_again(tmp_path: Path) -> None:
    create_store(tmp_path, provenance(feature_dim=512))
    (task, *_) = plan_videos(tmp_path, planned(16), 1)
    assert len(task.videos) == 4
    with ShardAttempt(tmp_path, task.shard) as attempt:
        kept = attempt.add(VideoRecord(video_id="v0"), features("v0", 40000, 512))
        overflow = attempt.add(VideoRecord(video_id="v1"), features("v1", 30000, 512))
        long = attempt.add(VideoRecord(video_id="v2"), features("v2", 70000, 512))  # and v3 is left out
        assert attempt.commit()
    assert (kept.status, overflow.status, long.status, long.reason) == ("ok", "overflow", "failed", "too_long")
    tasks = plan_videos(tmp_path, [], 1)
    assert [[video.video_id for video in task.videos] for task in tasks[-2:]] == [["v1"], ["v3"]]
    assert [record.video_id for record in failures(tmp_path)] == ["v2"]
    assert plan_videos(tmp_path, [], 1) == tasks


def failed_once(root: Path) -> PlannedVideo:
    """A store in which shard 0 says that the video failed, and that is planned again."""
    create_store(root, provenance(), 512)
    video = PlannedVideo("v", "videos/v.mp4")
    write_shards(root, {"v": None})
    (task,) = plan_videos(root, [video], 1, retry_failed=True)
    assert (task.shard, task.videos) == (1, (video,))
    return video


def test_a_failure_before_a_shard_that_was_voided_settles_nothing(tmp_path: Path) -> None:
    video = failed_once(tmp_path)
    write_shards(tmp_path, {"v": features("v", 9)})
    assert plan_videos(tmp_path, [video], 1, retry_failed=True) == []
    void(open_store(tmp_path), 1)
    assert anything_to_do(tmp_path, [video])
    assert [task.shard for task in plan_videos(tmp_path, [video], 1)] == [2]


def test_a_retry_that_found_no_place_is_planned_again(tmp_path: Path) -> None:
    video = failed_once(tmp_path)
    with ShardAttempt(tmp_path, 1) as attempt:
        attempt.add(VideoRecord(video_id="other"), features("other", 500))
        assert attempt.add(VideoRecord(video_id="v"), features("v", 100)).status == "overflow"
        assert attempt.commit()
    (task,) = plan_videos(tmp_path, [], 1)
    assert (task.shard, task.videos) == (2, (video,))
    with ShardAttempt(tmp_path, 2) as attempt:
        attempt.add(VideoRecord(video_id="v", status="failed", reason="timeout"), None)
        assert attempt.commit()
    assert plan_videos(tmp_path, [], 1) == [], "the last try counts"


def test_planners_at_once_lose_nothing(tmp_path: Path) -> None:
    create_store(tmp_path, provenance(), 512)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: plan_videos(tmp_path, planned(10, 5 * k), 1), range(8)))
    tasks = plan_videos(tmp_path, [], 1)
    found = [video for task in tasks for video in task.videos]
    assert sorted(found, key=lambda video: int(video.video_id[1:])) == planned(45)
    assert [task.shard for task in tasks] == list(range(len(tasks)))
    assert zarr.open_group(tmp_path, mode="r")["features"].shape[0] == len(tasks) * 512


@pytest.mark.parametrize("damage", ["smaller than what is written", "larger than the plan", "other", "lost"])
def test_an_array_that_was_not_grown_yet(tmp_path: Path, damage: str) -> None:
    """What a planner leaves that is killed after its segment is whole; an array that does not fit is none."""
    meta = create_store(tmp_path, provenance(), 512)
    write_shards(tmp_path, {"v0": features("v0", 9)})
    (video,) = planned(1, 1)
    assert create_segment(meta, Segment(1, 1, (ShardTask(1, (video,)),), ()))
    assert verify_store(tmp_path).problems == []
    if damage.startswith("smaller"):
        with ShardAttempt(tmp_path, 1) as attempt:
            attempt.add(VideoRecord(video_id="v1"), features("v1", 9))
            assert attempt.commit()
    elif damage.startswith("larger"):
        set_shard_count(meta, 3)
    elif damage == "other":
        change(tmp_path, FEATURES_JSON, lambda data: data.replace(b"float16", b"float32"))
    else:
        (tmp_path / FEATURES_JSON).unlink()
    (problem,) = verify_store(tmp_path).problems
    lost = damage.startswith("larger")  # a segment is, whose planner had grown the array
    named = ("plan", "plan segment 2") if lost else ("metadata", f"{tmp_path}/{FEATURES_JSON}")
    assert (problem.kind, problem.where) == named
    report = verify_store(tmp_path, repair=True)
    assert report.problems == []
    assert ("plan segment 2 is lost: give the videos to extract again" in report.repaired) == lost
    assert "wrote features/zarr.json anew" in report.repaired
    assert zarr.open_group(tmp_path, mode="r")["features"].shape[0] == 2 * 512


def test_an_id_that_is_too_long(tmp_path: Path) -> None:
    create_store(tmp_path, provenance(), 512)
    plan_videos(tmp_path, [PlannedVideo("\u00e9" * 500, "a.mp4")], 1)
    with pytest.raises(StoreError, match=r"of b\.mp4 has 1,001 bytes, and 1,000 are the most: give it another one"):
        plan_videos(tmp_path, [PlannedVideo("\u00e9" * 500 + "x", "b.mp4")], 1)


def test_ids_that_are_not_utf8_are_made_so(tmp_path: Path) -> None:
    create_store(tmp_path, provenance(), 512)
    (task,) = plan_videos(tmp_path, [PlannedVideo("bad\udcff", "/x/bad\udcff.mp4")], 1)
    assert task.videos == (PlannedVideo("bad?", "/x/bad\udcff.mp4"),)
    with ShardAttempt(tmp_path, 0) as attempt:
        attempt.add(VideoRecord(video_id="bad?", path=task.videos[0].path), features("x", 3))
        assert attempt.commit()
    assert plan_videos(tmp_path, [PlannedVideo("bad\udcff", "/x/bad\udcff.mp4")], 1) == []


def test_a_missing_file_has_its_turn_once_it_is_there(tmp_path: Path) -> None:
    root = tmp_path / "store"
    create_store(root, provenance(), 512)
    video = PlannedVideo("late", str(tmp_path / "late.mp4"))

    def commit(status: str, reason: str) -> None:
        (task,) = plan_videos(root, [video], 1)
        with ShardAttempt(root, task.shard) as attempt:
            rows = features("late", 4) if status == "ok" else None
            record = {"video_id": "late", "path": video.path, "status": status, "reason": reason}
            attempt.add(VideoRecord.model_validate(record), rows)
            assert attempt.commit()

    commit("failed", "missing")
    assert not anything_to_do(root, [video])
    (tmp_path / "late.mp4").touch()
    assert anything_to_do(root, [video])
    commit("failed", "empty_file")
    assert not anything_to_do(root, [video]), "only what was missing is tried again"
    assert [record.reason for record in failures(root)] == ["empty_file"]


def test_a_place_that_does_not_answer_is_no_damaged_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = create_store(tmp_path, provenance(), 512)

    def unreachable(_: object) -> int:
        raise StoreUnreachableError("no answer")

    monkeypatch.setattr("feature_store.plan_repair.planned_shards", unreachable)
    with pytest.raises(StoreUnreachableError):
        missing_segments(meta)
