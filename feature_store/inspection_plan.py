"""The plan, and whether the commit records say the same (any store → its problems; see inspection.py).

A segment may be whole and still be wrong: another store's, copied over it, carries the same name. Which of the two is
wrong, where a segment and a record differ, the shard's file decides: a record is proven by every byte of it. So a plan
never costs a shard that is whole.
"""

from feature_store.commit import Commit
from feature_store.layout import StoreMeta
from feature_store.plan import ShardTask, read_segment, segment_numbers, stray_files
from feature_store.plan_repair import missing_segments
from feature_store.problem import Kind, Problem
from vlm_dist.errors import StoreUnreachableError, VlmDistError


class PlanInspection:
    """All segments as they are; records are shown to it one by one, then `judge` says what is wrong."""

    def __init__(self, meta: StoreMeta) -> None:
        self.meta = meta
        self.problems: list[Problem] = []
        self.bad: list[int] = []  # numbers of segments
        self.planned: dict[int, set[str]] = {}  # ids by shard, of segments that are not bad
        self.uncommitted: dict[int, ShardTask] = {}  # of bad segments that are this store's
        self.forgotten: set[str] = set()  # ids that only what records contradict says
        self._spans: dict[int, tuple[int, int]] = {}  # by number: first shard, and the one after the last
        self._plans: dict[int, list[tuple[int, set[str]]]] = {}  # by shard: number of the segment, ids
        self._proven: set[int] = set()  # shards whose record is as its file
        self._supported: dict[int, set[int]] = {}  # by number: shards of which a record says the same
        self._contradicted: dict[int, int] = {}  # by number: the first shard of which its record says something else
        for number in missing_segments(meta):
            self._wrong(number, "is missing")
        for number in segment_numbers(meta):
            try:
                segment = read_segment(meta, number)
            except StoreUnreachableError:
                raise
            except VlmDistError as error:
                self._wrong(number, error)
                continue
            self._spans[number] = segment.first_shard, segment.end
            for task in segment.tasks:
                self._plans.setdefault(task.shard, []).append((number, {video.video_id for video in task.videos}))
        for key in stray_files(meta):
            self._report("stray", meta.place(key), "is no file of the plan, and nobody reads it")

    def _wrong(self, number: int, message: object) -> None:
        self.bad.append(number)
        self._report("plan", f"plan segment {number}", message)

    def _report(self, kind: Kind, where: str, message: object) -> None:
        self.problems.append(Problem(kind=kind, where=where, message=str(message)))

    def against(self, commit: Commit) -> list[int]:
        """Segments that do not plan for its shard what a record holds."""
        told = {record.video_id for record in commit.videos}
        return [number for number, ids in self._plans.get(commit.shard, ()) if not told <= ids]

    def trust(self, commit: Commit) -> None:
        """A record that is right, whatever was planned."""
        against = self.against(commit)
        for number in against:
            self._contradicted.setdefault(number, commit.shard)
        self._proven.add(commit.shard)
        if commit.size:
            for number in (n for n, _ in self._plans.get(commit.shard, ()) if n not in against):
                self._supported.setdefault(number, set()).add(commit.shard)

    def suspects(self) -> list[int]:
        """Shards whose records say what a segment does that others contradict: both may be another store's."""
        return sorted({shard for number in self._contradicted for shard in self._supported.get(number, ())})

    def withdraw(self, shard: int) -> None:
        """A record that is not right after all."""
        self._proven.discard(shard)
        for shards in self._supported.values():
            shards.discard(shard)

    def doubts(self, commit: Commit) -> bool:
        """Whether a record that nothing proves is wrong: other records prove the segments that it contradicts."""
        return any(self._supported.get(n) and n not in self._contradicted for n in self.against(commit))

    def judge(self) -> None:
        """After all records: which segments are wrong, and what is planned."""
        for number, shard in sorted(self._contradicted.items()):
            self._wrong(number, f"plans other videos for shard {shard} than are committed there")
            if self._supported.get(number):
                tasks = read_segment(self.meta, number).tasks  # again: paths of all videos would fill the memory
                self.uncommitted |= {task.shard: task for task in tasks if task.shard not in self._proven}
                self.forgotten.update(v.video_id for task in tasks for v in task.videos if task.shard in self._proven)
        before, end = -1, 0
        for number, (first, after) in sorted(self._spans.items()):
            if number in self._contradicted:
                continue
            if first < end or (before + 1 == number and first != end):
                if before >= 0 and self._supported.get(number) and not self._supported.get(before):
                    self._wrong(before, f"ends at shard {end}, and the next begins at {first}")
                else:
                    self._wrong(number, f"begins at shard {first}, not {end}")
                    continue
            before, end = number, after
        bad = set(self.bad)
        good = ((shard, ids) for shard, plans in self._plans.items() for number, ids in plans if number not in bad)
        self.planned = dict(good)
