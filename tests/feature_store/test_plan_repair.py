"""feature_store.plan_repair: segments that are lost, in a wrong place, old, or of another store."""

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from feature_store.commit import read_commit
from feature_store.files import seal, unseal
from feature_store.index import StoreIndex
from feature_store.layout import create_store, open_store
from feature_store.local_storage import LocalStorage
from feature_store.plan import PlannedVideo, Segment, create_segment, plan_videos, read_plan
from feature_store.plan_repair import restore_segments
from feature_store.snapshot import finalise
from feature_store.verify import verify_store
from tests.feature_store.store_tools import features, flip_bit, provenance, write_shards
from vlm_dist.errors import StoreError

LATER = [PlannedVideo(f"v{number}", f"/videos/{number}.mp4") for number in range(10, 15)]


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """A store of three segments; the last one's shards are not committed yet."""
    root = tmp_path / "store"
    create_store(root, provenance(), 512)
    for start in (0, 5):
        write_shards(root, {f"v{number}": features(f"v{number}", 9) for number in range(start, start + 5)})
    plan_videos(root, LATER, 1)
    finalise(root)
    return root


def swap(one: Path, other: Path) -> None:
    one_has, other_has = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_has)
    other.write_bytes(one_has)


@pytest.mark.parametrize(("one", "other"), [(0, 1), (1, 2)])
def test_plan_files_that_were_swapped(grown: Path, one: int, other: int) -> None:
    plan = read_plan(open_store(grown))
    keys = [f"_plan/plan-{number:03d}.json" for number in (one, other)]
    swap(*(grown / key for key in keys))
    with pytest.raises(StoreError, match=f"{keys[0]} is plan segment {other}: a file was copied or renamed"):
        plan_videos(grown, [], 1)
    told = {(problem.kind, problem.where): problem.message for problem in verify_store(grown).problems}
    assert set(told) == {("plan", f"plan segment {number}") for number in (one, other)}
    assert not any("missing" in message for message in told.values())
    report = verify_store(grown, repair=True)
    assert report.problems == []
    assert report.repaired == [f"put plan segment {number} back under its own number" for number in (one, other)]
    assert read_plan(open_store(grown)) == plan


@pytest.mark.parametrize("kill_at", range(4))
def test_a_repair_of_swapped_plan_files_that_is_killed(
    grown: Path, kill_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = read_plan(open_store(grown))
    swap(grown / "_plan/plan-001.json", grown / "_plan/plan-002.json")
    calls = count()

    def killed(step: str) -> Callable[[LocalStorage, str, bytes], bool | None]:
        real = getattr(LocalStorage, step)

        def write(storage: LocalStorage, key: str, data: bytes) -> bool | None:
            if next(calls) == kill_at:
                raise KeyboardInterrupt
            return real(storage, key, data)

        return write

    for step in ("create", "replace"):
        monkeypatch.setattr(LocalStorage, step, killed(step))
    with pytest.raises(KeyboardInterrupt):
        restore_segments(open_store(grown))
    monkeypatch.undo()
    assert verify_store(grown, repair=True).problems == []
    assert read_plan(open_store(grown)) == plan


def test_a_plan_file_that_was_renamed_or_copied(grown: Path) -> None:
    plan = read_plan(open_store(grown))
    (grown / "_plan/plan-001.json").rename(grown / "_plan/plan-003.json")
    report = verify_store(grown, repair=True)
    assert report.problems == []
    assert report.repaired[:2] == [
        "put plan segment 1 back under its own number",
        "took out _plan/plan-003.json: it was plan segment 1",
    ]
    assert read_plan(open_store(grown)) == plan
    shutil.copy(grown / "_plan/plan-000.json", grown / "_plan/plan-001.json")
    assert verify_store(grown, repair=True).problems == []
    assert read_plan(open_store(grown)) == plan, "its own bytes were put aside before"


@pytest.mark.parametrize("other", ["the same shape", "longer", "an extractor of its own"])
def test_the_plan_of_another_store(grown: Path, tmp_path: Path, other: str) -> None:
    """It is whole, and named as the own one; the records say what was planned, and cost no shard."""
    there = tmp_path / "there"
    meta = create_store(there, provenance(**{"weights": "w"} if other.startswith("an") else {}), 512)
    write_shards(there, {f"w{number}": features(f"w{number}", 9) for number in range(5 + (other == "longer"))})
    shutil.copy(there / "_plan/plan-000.json", grown / "_plan/plan-000.json")
    problems = [problem for problem in verify_store(grown).problems if problem.kind == "plan"]
    assert [problem.where for problem in problems] == ["plan segment 0"]
    if other.startswith("an"):
        assert meta.provenance.digest != open_store(grown).provenance.digest
        assert "is of a store of another extractor" in problems[0].message
    else:
        assert "plans other videos for shard 0 than are committed there" in problems[0].message
    report = verify_store(grown, repair=True)
    assert (report.problems, report.to_extract) == ([], [])
    rebuilt = "rebuilt plan segment 0 from the commit records: give the videos to extract again"
    assert report.repaired == [rebuilt, "wrote features/zarr.json anew"]
    assert StoreIndex(grown).num_videos == 10
    tasks = [task for segment in read_plan(open_store(grown)) for task in segment.tasks]
    assert [video.video_id for task in tasks for video in task.videos] == [f"v{number}" for number in range(15)]
    assert verify_store(grown, deep=True, repair=True).repaired == []


def test_the_plan_of_another_store_and_a_damaged_shard(grown: Path, tmp_path: Path) -> None:
    """What is whole of the shard is kept all the same."""
    there = tmp_path / "there"
    create_store(there, provenance(), 512)
    write_shards(there, {f"w{number}": features(f"w{number}", 9) for number in range(5)})
    shutil.copy(there / "_plan/plan-000.json", grown / "_plan/plan-000.json")
    (grown / "features/c/1/0").write_bytes((grown / "features/c/1/0").read_bytes()[:-3])
    report = verify_store(grown, repair=True)
    assert (report.problems, report.to_extract) == ([], [])
    assert StoreIndex(grown).num_videos == 10


def test_a_record_of_another_store(grown: Path, tmp_path: Path) -> None:
    """The plan and the other records agree: the record is the wrong one, and the snapshot knows the right one."""
    there = tmp_path / "there"
    create_store(there, provenance(), 512)
    write_shards(there, {f"w{number}": features(f"w{number}", 9) for number in range(5)})
    whole = read_commit(open_store(grown), 1)
    shutil.copy(there / "_commits/000001.json", grown / "_commits/000001.json")
    told = {problem.where: problem.message for problem in verify_store(grown).problems if problem.kind == "commit"}
    assert told == {f"{grown}/_commits/000001.json": "holds videos that are not planned for shard 1"}
    report = verify_store(grown, repair=True)
    assert (report.problems, report.to_extract) == ([], [])
    assert [(r.video_id, r.crc32c) for r in read_commit(open_store(grown), 1).videos] == [
        (r.video_id, r.crc32c) for r in whole.videos
    ]


def test_a_record_of_a_store_with_the_same_videos(grown: Path, tmp_path: Path) -> None:
    """Only its checksums are others: neither is the good file voided, nor are they written into a snapshot."""
    there = tmp_path / "there"
    create_store(there, provenance(), 512)
    write_shards(there, {f"v{number}": features(f"w{number}", 9) for number in range(5)})
    shutil.copy(there / "_commits/000001.json", grown / "_commits/000001.json")
    (index, file) = verify_store(grown).problems
    assert index.message.startswith("is in no commit record as shard, row, rows, crc [1, 0, 9, ")
    assert (file.where, file.message) == (
        f"shard 1 ({grown}/features/c/1/0), video v1, chunks 0 to 0",
        "crc32c differs",
    )
    report = verify_store(grown, repair=True)
    assert (report.problems, report.to_extract) == ([], [])
    assert report.repaired[0] == "kept 1 of 1 videos of shard 1: made its commit record anew from snapshot 000001"
    assert verify_store(grown, deep=True).problems == []


def test_a_last_segment_that_is_lost_before_a_commit(grown: Path) -> None:
    (grown / "_plan/plan-002.json").unlink()
    (problem,) = verify_store(grown).problems
    assert (problem.kind, problem.where) == ("plan", "plan segment 2")
    assert "the features have room for 15 shards, and 10 are planned" in problem.message
    assert "give the videos to extract again" in problem.message
    report = verify_store(grown, repair=True)
    assert report.problems == []
    assert report.repaired[0] == "plan segment 2 is lost: give the videos to extract again"
    assert verify_store(grown, repair=True).repaired == []
    plan_videos(grown, LATER, 1)
    assert len(read_plan(open_store(grown))) == 3


@pytest.mark.parametrize("whole", [False, True])
def test_a_stray_file_among_the_plan_files(grown: Path, whole: bool) -> None:
    plan = read_plan(open_store(grown))
    if whole:
        (grown / "_plan/plan-002.json").rename(grown / "_plan/plan-002.json.bak")
    else:
        (grown / "_plan/plan-000.json.bak").write_text("notes")
    (stray,) = (problem for problem in verify_store(grown).problems if problem.kind == "stray")
    assert stray.where == f"{grown}/_plan/plan-00{2 * whole}.json.bak"
    report = verify_store(grown, repair=True)
    assert report.problems == []
    assert any(line.startswith(f"took out _plan/plan-00{2 * whole}.json.bak: it") for line in report.repaired)
    assert verify_store(grown, repair=True).repaired == []
    assert read_plan(open_store(grown)) == plan, "the segment that it is comes back"


def test_a_stale_segment_is_not_put_back(grown: Path) -> None:
    """It was put aside when it lay in a wrong place; since then its number has had another content."""
    meta = open_store(grown)
    stale = grown / "_voided/plan-002.json.0"
    shutil.copy(grown / "_plan/plan-002.json", stale)
    (grown / "_plan/plan-002.json").unlink()
    assert "plan segment 2 back" in verify_store(grown, repair=True).repaired[0], "nothing says that it is stale"
    (grown / "_plan/plan-002.json").unlink()
    stale.unlink()
    verify_store(grown, repair=True)
    write_shards(grown, {f"new{number}": features(f"new{number}", 9) for number in range(2)})
    newer = read_plan(meta)
    shutil.copy(grown / "_plan/plan-001.json", grown / "_voided/plan-001.json.3")
    create_segment(meta, Segment(3, newer[-1].end, (), ()))
    body = unseal((grown / "_plan/plan-001.json").read_bytes(), "")
    stale.write_bytes(seal(body | {"segment": 2, "first_shard": newer[2].first_shard}))
    flip_bit(grown / "_plan/plan-002.json", 99)
    report = verify_store(grown, repair=True)
    assert report.problems == []
    assert report.repaired[0].startswith("rebuilt plan segment 2 from the commit records")
    ids = [[video.video_id for task in segment.tasks for video in task.videos] for segment in read_plan(meta)]
    assert ids[2] == ["new0", "new1"], "the records contradict the older one"
    assert (grown / "_voided/plan-001.json.3").exists()
    assert not stale.exists(), "it is never looked at again"
