"""One look at a whole store: what is not as the records say, and where (any store → its problems).

Quick: plan, commit records, shard files (size), index snapshots and captions fit each other. Deep: every checksum too.
States that a kill can leave (a staged attempt, a commit that is not published yet) are no problems.
"""

from collections.abc import Sequence
from pathlib import Path

from feature_store.commit import Commit, commit_key, committed_shards, iter_records, shard_place
from feature_store.inspection_index import IndexInspection, Video
from feature_store.layout import FEATURES_JSON, StoreMeta, shard_key, wrong_metadata
from feature_store.plan import array_shards, planned_shards, read_segment, segment_numbers
from feature_store.plan_repair import missing_segments
from feature_store.problem import Kind, Problem
from feature_store.shard import shard_bytes
from feature_store.shard_check import broken_videos, check_shard
from feature_store.storage import fetched
from vlm_dist.errors import StoreError, StoreUnreachableError, VlmDistError


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
        self.shards = 0  # records
        self.bad_shards: list[int] = []
        self.bad_records: list[int] = []  # of these, those whose record cannot be read
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

    def run(self) -> None:
        """Looks at everything."""
        # Each before what it follows from, as an extraction may be at work: what a snapshot names and what is published
        # is committed, and what is committed is planned.
        index = IndexInspection(self.meta, self.deep, self.fresh)
        self.published = self.meta.storage.sizes("features/c")
        shards = committed_shards(self.meta)
        self.planned = self._plan()
        self._array(shards)
        for shard, commit in iter_records(self.meta, shards):
            self._commit(shard, commit)
        self._orphans()
        for key in wrong_metadata(self.meta):
            self._report("metadata", self.meta.place(key), "is not the metadata that belongs there")
        index.run(self.videos, self.bad_shards)
        self.problems.extend(index.problems)
        self.bad_snapshots, self.bad_current, self.deleted = index.bad, index.bad_current, index.deleted
        self.derived = index.derived

    def _report(self, kind: Kind, where: Path | str, message: object) -> None:
        self.problems.append(Problem(kind=kind, where=str(where), message=str(message)))

    def _plan(self) -> dict[int, set[str]]:
        """Planned ids by shard; checks that segments follow each other."""
        planned: dict[int, set[str]] = {}
        for number in missing_segments(self.meta):
            self.bad_segments.append(number)
            self._report("plan", f"plan segment {number}", "is missing")
        for number in segment_numbers(self.meta):
            try:
                segment = read_segment(self.meta, number)
            except StoreUnreachableError:
                raise
            except VlmDistError as error:
                self.bad_segments.append(number)
                self._report("plan", f"plan segment {number}", error)
                continue
            if not self.bad_segments and segment.first_shard != len(planned):
                self.bad_segments.append(number)
                wrong = f"begins at shard {segment.first_shard}, not {len(planned)}"
                self._report("plan", f"plan segment {number}", wrong)
                continue
            planned |= {task.shard: {video.video_id for video in task.videos} for task in segment.tasks}
        return planned

    def _array(self, committed: Sequence[int]) -> None:
        """Between a planner's segment and its last step, where it may be killed, the array is smaller than the plan.

        That is no damage as long as nothing is written beyond it. Larger it is never.
        """
        numbers = (key.split("/")[2] for key in self.published)
        used = max((*committed, *(int(number) for number in numbers if number.isdigit())), default=-1) + 1
        room = array_shards(self.meta)  # before the plan is looked at once more, which others may add to meanwhile
        if self.bad_segments or (room is not None and used <= room <= planned_shards(self.meta)):
            return
        planned = max(self.planned, default=-1) + 1
        wrong = f"is not the metadata of {planned} planned shards"
        if room is not None:
            wrong = f"has room for {room} shards; {planned} are planned, and {used} written to"
        self._report("metadata", self.meta.place(FEATURES_JSON), wrong)

    def _commit(self, shard: int, commit: Commit | StoreError) -> None:
        self.shards += 1
        if isinstance(commit, StoreError):
            self._report("commit", self.meta.place(commit_key(shard)), commit)
            self.bad_shards.append(shard)
            self.bad_records.append(shard)
            self.lost.update(self.planned.get(shard, ()))  # it tells nothing; perhaps all that was planned is lost
            return
        before = len(self.problems)
        row = 0
        for record in commit.videos:
            where = f"shard {shard}, video {record.video_id}"
            if not self.bad_segments and record.video_id not in self.planned.get(shard, ()):
                self._report("commit", where, "is not planned for this shard")
            if record.status == "ok":
                if record.row != row or not record.n_rows:
                    self._report("commit", where, f"{record.n_rows} rows from {record.row}, expected from {row}")
                row = record.row + record.n_rows
        if row != commit.rows or commit.size != (shard_bytes(self.meta, row) if row else 0):
            self._report("commit", self.meta.place(commit_key(shard)), f"{commit.size} bytes do not fit {row} rows")
        ok = [record for record in commit.videos if record.status == "ok"]
        self.ids[shard] = [record.video_id for record in commit.videos]
        self.videos.update((r.video_id.encode(), shard, r.row, r.n_rows, r.crc32c) for r in ok)
        if len(self.problems) > before:
            self.bad_shards.append(shard)
            self.lost.update(self.ids[shard])
        elif not self._shard(commit):
            self.bad_shards.append(shard)
            self.damaged.append(shard)

    def _shard(self, commit: Commit) -> bool:
        """Whether the file of a sound record is as it says; else its videos that are not whole are lost."""
        if not commit.size:
            return True
        before = len(self.problems)
        key, size = shard_place(self.meta, commit, self.published)
        where = f"shard {commit.shard} ({self.meta.place(key)})"
        if size is None:
            path = self.meta.storage.local(key)
            what = "a folder is in its place" if path and path.is_dir() else "the file is missing"
            self._report("shard", where, f"is committed, but {what}")
            self.lost.update(record.video_id for record in commit.videos if record.status == "ok")
            return False
        if size == commit.size and not self.deep:
            return True
        with fetched(self.meta.storage, key) as path:
            if size != commit.size:
                self._report("shard", where, f"has {size:,} bytes, {commit.size:,} were committed")
            else:
                self.bytes_checked += size
                for kind, which, what in check_shard(self.meta, commit, path):
                    self._report(kind, f"{where}{which}", what)
            if len(self.problems) > before:
                self.lost.update(record.video_id for record in broken_videos(self.meta, commit, path))
        return len(self.problems) == before

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
