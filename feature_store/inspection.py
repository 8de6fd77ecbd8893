"""One look at a whole store: what is not as the records say, and where (any store → its problems).

Quick: plan, commit records, shard files (size), index snapshots and captions fit each other. Deep: every checksum too.
States that a kill can leave (a staged attempt, a commit that is not published yet) are no problems.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from feature_store.commit import Commit, commit_key, committed_shards, iter_records, read_commit, shard_place
from feature_store.inspection_index import IndexInspection, Video
from feature_store.inspection_plan import PlanInspection
from feature_store.layout import FEATURES_JSON, StoreMeta, shard_key, wrong_metadata
from feature_store.plan import ShardTask, array_shards, planned_shards, segment_numbers
from feature_store.problem import Kind, Problem
from feature_store.shard import shard_bytes
from feature_store.shard_check import broken_videos, check_shard
from feature_store.storage import fetched
from vlm_dist.errors import StoreError


class _Look(NamedTuple):
    """What is wrong with a shard's file, and the ids of the videos that are not whole in it."""

    problems: list[Problem]
    lost: set[str]


class Inspection:
    """One pass over a store; changes nothing. Beside `problems` it remembers what a repair has to take out."""

    def __init__(self, meta: StoreMeta, deep: bool, fresh: bool) -> None:
        self.meta = meta
        self.deep = deep
        self.fresh = fresh  # judge the store itself, not what this node keeps of it
        self.planned: dict[int, set[str]] = {}
        self.problems: list[Problem] = []
        self.bytes_checked = 0
        self.bad_segments: list[int] = []
        self.lost_segment: int | None = None  # of which no file, no record, and no shard is left
        self.uncommitted: dict[int, ShardTask] = {}  # what is known of bad segments
        self.shards = 0  # records
        self.bad_shards: list[int] = []
        self.bad_records: list[int] = []  # of these, those whose record cannot be read, or is another's
        self.damaged: list[int] = []  # of these, those whose record is sound, and the file is not
        self.bad_snapshots: list[str] = []
        self.bad_current = False
        self.lost: set[str] = set()  # ids that bad shards and orphans do not have whole
        self.deleted: set[str] = set()  # ids that the current snapshot leaves out on purpose
        self.orphans: list[str] = []  # keys
        self.published: dict[str, int] = {}  # bytes of every published shard, by key
        self.derived: dict[str, bytes] = {}  # see `IndexInspection`
        self.ids: dict[int, list[str]] = {}  # of each good commit
        self.videos: set[Video] = set()  # of good commits
        self._open: list[tuple[Commit, _Look]] = []  # records that differ from the plan, and that nothing proves

    def run(self) -> None:
        """Looks at everything."""
        # Each before what it follows from, as an extraction may be at work: what a snapshot names and what is published
        # is committed, and what is committed is planned.
        index = IndexInspection(self.meta, self.deep, self.fresh)
        self.published = self.meta.storage.sizes("features/c")
        shards = committed_shards(self.meta)
        self._plan = PlanInspection(self.meta)
        for shard, commit in iter_records(self.meta, shards):
            self._commit(shard, commit)
        self._judge()
        self._array(shards)
        self._orphans()
        for key in wrong_metadata(self.meta):
            self._report("metadata", self.meta.place(key), "is not the metadata that belongs there")
        index.run(self.videos, self.bad_shards)
        self.problems.extend(index.problems)
        self.bad_snapshots, self.bad_current, self.deleted = index.bad, index.bad_current, index.deleted
        self.derived = index.derived
        self.lost |= index.unrecorded
        self._look_again(index.disputed)

    def _report(self, kind: Kind, where: Path | str, message: object) -> None:
        self.problems.append(Problem(kind=kind, where=str(where), message=str(message)))

    def _array(self, committed: Sequence[int]) -> None:
        """Between a planner's segment and its last step, where it may be killed, the array is smaller than the plan.

        That is no damage as long as nothing is written beyond it. Larger it is where a segment was lost.
        """
        numbers = (key.split("/")[2] for key in self.published)
        used = max((*committed, *(int(number) for number in numbers if number.isdigit())), default=-1) + 1
        room = array_shards(self.meta)  # before the plan is looked at once more, which others may add to meanwhile
        if self.bad_segments:
            return
        planned = planned_shards(self.meta)
        if room is None:
            self._report("metadata", self.meta.place(FEATURES_JSON), f"is not the metadata of {planned} planned shards")
        elif room > planned:
            self.lost_segment = max(segment_numbers(self.meta), default=-1) + 1
            wrong = (
                f"is lost: the features have room for {room} shards, and {planned} are planned; none of the others is "
                "committed, and nothing tells their videos: give the videos to extract again"
            )
            self._report("plan", f"plan segment {self.lost_segment}", wrong)
        elif used > room:
            wrong = f"has room for {room} shards; {planned} are planned, and {used} written to"
            self._report("metadata", self.meta.place(FEATURES_JSON), wrong)

    def _commit(self, shard: int, commit: Commit | StoreError) -> None:
        self.shards += 1
        if isinstance(commit, StoreError):
            self._bad_record(shard, commit)
            return
        row = 0
        wrong: list[str] = []
        for record in commit.videos:
            if record.status == "ok":
                if record.row != row or not record.n_rows:
                    wrong.append(f"{record.n_rows} rows of {record.video_id} from {record.row}, expected from {row}")
                row = record.row + record.n_rows
        if row != commit.rows or commit.size != (shard_bytes(self.meta, row) if row else 0):
            wrong.append(f"{commit.size} bytes do not fit {row} rows")
        if not commit.size and shard_key(shard) in self.published:
            wrong.append(f"no video has features, and {shard_key(shard)} is there")
        if wrong:
            self._bad_record(shard, "; ".join(wrong))
            return
        against = self._plan.against(commit)
        look = self._look(commit, self.deep or bool(against))
        if against and (look.problems or not commit.size):
            self._open.append((commit, look))
        else:
            if not look.problems:
                self._plan.trust(commit)
            self._take(commit, look)

    def _judge(self) -> None:
        """Whose fault it is where a record and the plan differ."""
        self._look_again(self._plan.suspects())
        for commit, look in self._open:
            if self._plan.doubts(commit):
                self._bad_record(commit.shard, f"holds videos that are not planned for shard {commit.shard}")
            else:
                self._plan.trust(commit)
                self._take(commit, look)
        self._plan.judge()
        self.problems[:0] = self._plan.problems
        self.bad_segments, self.planned = self._plan.bad, self._plan.planned
        self.uncommitted = self._plan.uncommitted
        self.lost |= self._plan.forgotten.difference(*self.ids.values())
        for shard in self.bad_records:  # they tell nothing; perhaps all that was planned is lost
            self.lost.update(self.planned.get(shard, ()))

    def _bad_record(self, shard: int, wrong: object) -> None:
        self._report("commit", self.meta.place(commit_key(shard)), wrong)
        self.bad_shards.append(shard)
        self.bad_records.append(shard)

    def _take(self, commit: Commit, look: "_Look") -> None:
        """Goes by a record; its file may be damaged."""
        self.ids[commit.shard] = [record.video_id for record in commit.videos]
        ok = (record for record in commit.videos if record.status == "ok")
        self.videos.update((r.video_id.encode(), commit.shard, r.row, r.n_rows, r.crc32c) for r in ok)
        self._damaged(commit.shard, look)

    def _damaged(self, shard: int, look: "_Look") -> None:
        if look.problems:
            self.problems.extend(look.problems)
            self.lost |= look.lost
            self.bad_shards.append(shard)
            self.damaged.append(shard)

    def _look_again(self, shards: Collection[int]) -> None:
        """Where something else says otherwise than a record: is the record as its file is?"""
        for shard in sorted(shards) if not self.deep else ():
            if shard in self.ids and shard not in self.bad_shards:
                look = self._look(read_commit(self.meta, shard), deep=True)
                self._damaged(shard, look)
                if look.problems:
                    self._plan.withdraw(shard)

    def _look(self, commit: Commit, deep: bool) -> "_Look":
        """Whether the file of a sound record is as it says."""
        look = _Look([], set())
        if not commit.size:
            return look
        key, size = shard_place(self.meta, commit, self.published)
        where = f"shard {commit.shard} ({self.meta.place(key)})"
        if size is None:
            path = self.meta.storage.local(key)
            what = "a folder is in its place" if path and path.is_dir() else "the file is missing"
            look.problems.append(Problem(kind="shard", where=where, message=f"is committed, but {what}"))
            look.lost.update(record.video_id for record in commit.videos if record.status == "ok")
            return look
        if size == commit.size and not deep:
            return look
        with fetched(self.meta.storage, key) as path:
            if size != commit.size:
                wrong = f"has {size:,} bytes, {commit.size:,} were committed"
                look.problems.append(Problem(kind="shard", where=where, message=wrong))
            else:
                self.bytes_checked += size
                for kind, which, what in check_shard(self.meta, commit, path):
                    look.problems.append(Problem(kind=kind, where=f"{where}{which}", message=what))
            if look.problems:
                look.lost.update(record.video_id for record in broken_videos(self.meta, commit, path))
        return look

    def sound_ids(self) -> set[str]:
        """Ids of the videos that some shard has whole."""
        bad = set(self.bad_shards)
        return {key.decode() for key, shard, *_ in self.videos if shard not in bad}

    def _orphans(self) -> None:
        committed = {shard_key(shard) for shard in committed_shards(self.meta)}
        for key in sorted(self.published.keys() - committed):
            self.orphans.append(key)
            number = key.split("/")[2]
            self.lost.update(self.planned.get(int(number), ()) if number.isdigit() else ())
            self._report("stray", self.meta.place(key), "is a shard whose commit record is lost")
