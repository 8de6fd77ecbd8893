"""The store against a plain dict: plan, write, kill, commit, publish, delete, damage, repair, in any order."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from feature_store.commit import Commit, commit_key, committed_shards, create_record, read_commit
from feature_store.index import current_snapshot
from feature_store.layout import CHUNK_ROWS, create_store, open_store, shard_key
from feature_store.marks import delete_videos
from feature_store.plan import PlannedVideo, ShardTask, plan_videos
from feature_store.reader import FeatureReader
from feature_store.snapshot import finalise
from feature_store.verify import verify_store
from feature_store.writer import ShardAttempt
from tests.feature_store.store_tools import F, add_video, features, flip_bit, provenance, whole_after_cut

ROWS = 512
LENGTHS = {f"v{number}": 1 + number * 67 % 300 for number in range(30)} | {"broken": 0, "long": ROWS + 1}
some_ids = st.lists(st.sampled_from(sorted(LENGTHS)), min_size=1, max_size=8)


class StoreMachine(RuleBasedStateMachine):
    """`committed` is what commit records hold, `visible` what the current snapshot must give: id → salt of the rows."""

    @initialize()
    def create(self) -> None:
        self.root = Path(tempfile.mkdtemp()) / "store"
        self.meta = create_store(self.root, provenance(), ROWS)
        self.planned: set[str] = set()
        self.committed: dict[str, int] = {}
        self.deleted: set[str] = set()
        self.visible: dict[str, int] = {}
        self.salt = 0

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root.parent)

    @rule(ids=some_ids, workers=st.integers(1, 3))
    def plan(self, ids: list[str], workers: int) -> None:
        plan_videos(self.root, [PlannedVideo(video_id, f"{video_id}.mp4") for video_id in dict.fromkeys(ids)], workers)
        self.planned.update(ids)

    @rule(pick=st.integers(0, 99), end=st.sampled_from(["commit", "commit", "abandon", "killed early", "killed late"]))
    def write(self, pick: int, end: str) -> None:
        if tasks := plan_videos(self.root, [], 1):
            self.attempt(tasks[pick % len(tasks)], end)

    @rule(pick=st.integers(0, 99))
    def race(self, pick: int) -> None:
        """A second attempt at a task whose first was committed meanwhile."""
        if tasks := plan_videos(self.root, [], 1):
            task = tasks[pick % len(tasks)]
            self.salt += 1
            late = ShardAttempt(self.root, task.shard)
            for video in task.videos:
                add_video(late, video, self.rows(video.video_id))
            self.attempt(task, "commit")
            assert not late.commit()

    def rows(self, video_id: str) -> np.ndarray | None:
        return features(video_id, LENGTHS[video_id], salt=self.salt) if LENGTHS[video_id] else None

    def attempt(self, task: ShardTask, end: str) -> None:
        self.salt += 1
        attempt = ShardAttempt(self.root, task.shard)
        records = [add_video(attempt, video, self.rows(video.video_id)) for video in task.videos]
        if end == "abandon":
            attempt.abandon()
        elif end == "killed early":
            attempt._file.close()
        elif end == "killed late":  # right after the commit point
            attempt._rows.finish() if attempt._rows.rows else None
            attempt._file.close()
            rows = attempt._rows
            made = Commit(
                shard=task.shard, attempt=attempt._attempt, size=rows.size, crc32c=rows.crc32c, rows=rows.rows,
                videos=tuple(records),
            )  # fmt: skip
            assert create_record(self.meta, made)
        else:
            assert attempt.commit()
        if end in ("commit", "killed late"):
            self.committed |= {record.video_id: self.salt for record in records if record.status == "ok"}

    def publish(self) -> None:
        self.visible = {i: salt for i, salt in self.committed.items() if i not in self.deleted}

    @rule()
    def finalise(self) -> None:
        finalise(self.root)
        self.publish()

    @rule(ids=some_ids, undo=st.booleans())
    def delete(self, ids: list[str], undo: bool) -> None:
        delete_videos(self.root, ids, undo)
        self.deleted = self.deleted - set(ids) if undo else self.deleted | (set(ids) & self.committed.keys())
        self.publish()

    @precondition(lambda self: any(read_commit(self.meta, s).size for s in committed_shards(self.meta)))
    @rule(pick=st.integers(0, 99), byte=st.integers(0, 10**6), what=st.sampled_from(["flip", "cut", "lose", "record"]))
    def damage_and_repair(self, pick: int, byte: int, what: str) -> None:
        finalise(self.root)
        shards = [shard for shard in committed_shards(self.meta) if read_commit(self.meta, shard).size]
        shard = shards[pick % len(shards)]
        commit = read_commit(self.meta, shard)
        held = {record.video_id for record in commit.videos if record.status == "ok"}
        lost = set[str]() if what == "record" else held
        path = self.root / (commit_key(shard) if what == "record" else shard_key(shard))
        if what == "lose":
            path.unlink()
        elif what == "cut":
            path.write_bytes(path.read_bytes()[: byte % path.stat().st_size])
            lost = held - whole_after_cut(commit, path.stat().st_size)
        else:
            at = byte % path.stat().st_size
            flip_bit(path, at)
            if what == "flip":  # the videos that end before this byte, or begin after it, are whole
                lost = whole_after_cut(commit, 10**9) - whole_after_cut(commit, at) - self.after(commit, at)
        assert verify_store(self.root, deep=True).problems
        report = verify_store(self.root, deep=True, repair=True)
        assert not report.problems
        if what == "record" and held & self.deleted:  # perhaps no snapshot ever had all of it
            lost = held - {i for s in committed_shards(self.meta) for i in self.ok(s)}
            assert lost in (set(), held)
        assert held & set(report.to_extract) == lost - self.deleted
        self.committed = {i: salt for i, salt in self.committed.items() if i not in lost}
        self.publish()

    def ok(self, shard: int) -> set[str]:
        return {record.video_id for record in read_commit(self.meta, shard).videos if record.status == "ok"}

    def after(self, commit: Commit, at: int) -> set[str]:
        """Videos of a shard that begin after a byte, and all where the byte is in no row."""
        chunk, within = divmod(at, CHUNK_ROWS * F * 2 + 4)
        row = chunk * CHUNK_ROWS + within // (F * 2)
        if within >= CHUNK_ROWS * F * 2 or row >= commit.rows:
            return {record.video_id for record in commit.videos}
        return {record.video_id for record in commit.videos if record.row > row}

    @invariant()
    def readers_see_what_was_published(self) -> None:
        if not current_snapshot(open_store(self.root)):
            assert not self.visible
            return
        reader = FeatureReader(self.root, "always")
        found = {reader.index.video_id(video): reader.read(video) for video in range(reader.index.num_videos)}
        assert found.keys() == self.visible.keys()
        for video_id, rows in found.items():
            assert np.array_equal(rows, features(video_id, LENGTHS[video_id], salt=self.visible[video_id]))

    @invariant()
    def the_store_is_whole(self) -> None:
        assert not verify_store(self.root, deep=True).problems


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=20, stateful_step_count=16, deadline=None, suppress_health_check=list(HealthCheck)
)
