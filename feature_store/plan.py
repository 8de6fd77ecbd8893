"""Which videos make which shard: the plan, in segments that are only ever added (videos → features)."""

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from feature_store.commit import committed_shards, iter_commits
from feature_store.files import seal, unseal_as
from feature_store.layout import (
    COPY,
    FEATURES_JSON,
    PLANS,
    StoreMeta,
    features_json,
    open_store,
    set_shard_count,
    shard_key,
)
from feature_store.records import clean_text
from feature_store.shard import REPAIR
from feature_store.storage import Root
from vlm_dist.errors import StoreError, StoreUnreachableError

# A HowTo100M video has 390 rows on average, so that 168 of them fill a shard of 65,536 rows.
MEAN_ROWS = 390
MAX_VIDEOS = 168
SHARDS_PER_WORKER = 4
MAX_ID_BYTES = 1000  # three times as long, and in folders, as `store export` writes it, it is a path still
_SEGMENT = re.compile(r"plan-(\d{3,})\.json")


@dataclass(frozen=True, slots=True)
class PlannedVideo:
    """A video to extract: its id (any UTF-8 string) and where its file is."""

    video_id: str
    path: str


@dataclass(frozen=True, slots=True)
class ShardTask:
    """The unit of work that a worker is given: all videos of one shard, in the order they are staged."""

    shard: int
    videos: tuple[PlannedVideo, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """One plan file: its tasks, and the inputs that repeated an id."""

    number: int
    first_shard: int
    tasks: tuple[ShardTask, ...]
    duplicates: tuple[PlannedVideo, ...]
    origin: str = ""  # `Provenance.digest` of the store; empty in old ones

    @property
    def end(self) -> int:
        """The shard after its last one."""
        return self.first_shard + len(self.tasks)


def unfit_id(video_id: str) -> str:
    """Why no store can take a video of this id; empty where one can."""
    try:
        size = len(video_id.encode())
    except UnicodeEncodeError:
        return "is not UTF-8"
    return f"has {size:,} bytes, and {MAX_ID_BYTES:,} are the most" if size > MAX_ID_BYTES else ""


def read_plan(meta: StoreMeta) -> list[Segment]:
    """All segments, oldest first; StoreError where one is damaged or missing."""
    # Before the segments: another extraction plans a shard before it commits it.
    last_committed = max(committed_shards(meta), default=-1)
    numbers = segment_numbers(meta)
    segments = [_parse(meta, n, data) for n, data in zip(numbers, meta.storage.read_many(_keys(numbers)), strict=True)]
    first_shard = 0
    for place, segment in enumerate(segments):
        if segment.number != place or segment.first_shard != first_shard:
            raise StoreError(
                f"the plan in {meta.place(PLANS)} has a gap before segment {segment.number} (shard {first_shard}): "
                "a file is missing; run `vlm-dist store verify --repair` on the store"
            )
        first_shard = segment.end
    if last_committed >= first_shard:
        raise StoreError(
            f"the plan in {meta.place(PLANS)} ends at shard {first_shard}, and later ones are committed: "
            "a file is missing; run `vlm-dist store verify --repair` on the store"
        )
    return segments


def plan_videos(
    root: Root, videos: Sequence[PlannedVideo], workers: int, retry_failed: bool = False
) -> list[ShardTask]:
    """Plans the videos that the store does not know yet, in one new segment, and says what is left to do.

    Videos that overflowed their shard, or that a committed shard has no record of, are planned again too: call this
    again after the tasks are done (with no videos), until it returns none.

    Args:
        root: the store.
        videos: may repeat what is planned or committed already. Of several files with one id the first counts, in
            this call or an earlier one; each further one is recorded with the plan (reason `duplicate` in `failures`).
        workers: shards hold at most 168 videos, and fewer where each worker would else have less than 4 shards.
        retry_failed: plan videos that failed again as well: of those given, or all where none is given.

    Returns:
        Every task, of this and older segments, whose shard is not committed. A video's path is the one given now, or
        else the planned one: a corpus may move between two runs (while the planned file is there, it counts).

    Raises:
        StoreError: the plan or a record is damaged, a shard is published and its record is lost, or a new id has more
            than 1,000 bytes.
    """
    meta = open_store(root)
    published = meta.storage.sizes("features/c")  # before the records: what is published has had its record before
    while True:
        segments = read_plan(meta)
        tasks = [task for segment in segments for task in segment.tasks]
        given, repeated = _first_and_further(videos, tasks)
        new = _unplanned(meta, tasks, given, retry_failed)
        duplicates = _unrecorded(segments, repeated)
        added = _group(meta, new, workers, len(tasks))
        _require_records(meta, [*tasks, *added], published)
        if not new and not duplicates:
            break
        number = segments[-1].number + 1 if segments else 0
        if create_segment(meta, Segment(number, len(tasks), added, duplicates)):
            tasks.extend(added)
            break
    fit_array(meta)
    done = set(committed_shards(meta))
    return [_with_paths(task, given) for task in tasks if task.shard not in done]


def anything_to_do(root: Root, videos: Sequence[PlannedVideo], retry_failed: bool = False) -> bool:
    """Whether `plan_videos` would return tasks or record a further duplicate; changes nothing."""
    meta = open_store(root)
    segments = read_plan(meta)
    tasks = [task for segment in segments for task in segment.tasks]
    given, repeated = _first_and_further(videos, tasks)
    done = set(committed_shards(meta))
    return (
        any(task.shard not in done for task in tasks)
        or bool(_unrecorded(segments, repeated))
        or bool(_unplanned(meta, tasks, given, retry_failed))
    )


def planned_shards(meta: StoreMeta) -> int:
    """Shards of all segments; reads the last one only."""
    numbers = segment_numbers(meta)
    if not numbers:
        return 0
    last = read_segment(meta, numbers[-1])
    return last.end


def _require_records(meta: StoreMeta, tasks: Sequence[ShardTask], published: Collection[str]) -> None:
    """A shard that is published is never given out, though its record is lost: older snapshots read its rows."""
    there = [task.shard for task in tasks if shard_key(task.shard) in published]
    if lost := sorted(set(there).difference(committed_shards(meta))):
        raise StoreError(
            f"{meta.place(shard_key(lost[0]))} is there, and its commit record is lost"
            f"{f' ({len(lost)} shards are so)' if len(lost) > 1 else ''}: it is not written anew. {REPAIR}"
        )


def _first_and_further(
    videos: Sequence[PlannedVideo], tasks: Sequence[ShardTask]
) -> tuple[dict[str, str], Counter[PlannedVideo]]:
    """Path by id of the first of each id, and all inputs that repeat one, of this call or of the plan."""
    planned = {video.video_id: video.path for task in tasks for video in task.videos}
    given: dict[str, str] = {}
    repeated: Counter[PlannedVideo] = Counter()
    for video in videos:
        clean = PlannedVideo(str(clean_text(video.video_id)), video.path)
        if clean.video_id not in planned and (wrong := unfit_id(clean.video_id)):
            raise StoreError(
                f"the video id {clean.video_id[:40]}… of {video.path[:200] or 'a video'} {wrong}: give it another one"
            )
        if clean.video_id in given or is_another_file(clean.path, planned.get(clean.video_id, clean.path)):
            repeated[clean] += 1
        else:
            given[clean.video_id] = clean.path
    return given, repeated


def is_another_file(path: str, planned: str) -> bool:
    """Whether the planned file is still there beside this one; else the corpus has only moved."""
    if path == planned:
        return False
    try:
        return not os.path.samefile(path, planned)
    except OSError:
        return False


def _unrecorded(segments: Sequence[Segment], repeated: Counter[PlannedVideo]) -> tuple[PlannedVideo, ...]:
    """Inputs that repeat an id and are not in the plan yet."""
    known = Counter(video for segment in segments for video in segment.duplicates)
    return tuple((repeated - known).elements())


def _unplanned(
    meta: StoreMeta, tasks: Sequence[ShardTask], given: dict[str, str], retry_failed: bool
) -> list[PlannedVideo]:
    """Videos that need a (further) place: new ones, those that their committed shard did not take, those to retry."""
    waiting = {video.video_id: (task.shard, video.path) for task in tasks for video in task.videos}
    planned = set(waiting)
    settled: set[str] = set()
    failed: dict[str, str] = {}  # reason of the last try, where none went well
    done: set[str] = set()
    committed: set[int] = set()
    for commit in iter_commits(meta):
        committed.add(commit.shard)
        for record in commit.videos:
            if record.status == "ok":
                failed.pop(record.video_id, None)
                done.add(record.video_id)
            elif record.status == "failed" and record.video_id not in done:
                failed[record.video_id] = record.reason
            # A failure says nothing of what was planned after it: the last try may have overflowed, or been voided.
            last = waiting.get(record.video_id, (0, ""))[0]
            if record.status == "ok" or (record.status == "failed" and commit.shard >= last):
                settled.add(record.video_id)
    from feature_store.video_source import existing  # it loads FFmpeg, which most of what reads a plan does not need

    # A file that was not there (a disk that was not mounted) has its turn once it is.
    missing = {i: given[i] for i, reason in failed.items() if reason == "missing" and i in given}
    there = existing(missing.values()) if missing and not retry_failed else ()
    retried = failed.keys() & given.keys() if given else failed.keys()
    settled -= retried if retry_failed else {i for i, path in missing.items() if path in there}
    again = [
        PlannedVideo(video_id, given.get(video_id, path))
        for video_id, (shard, path) in waiting.items()
        if shard in committed and video_id not in settled
    ]
    return again + [PlannedVideo(i, path) for i, path in given.items() if i not in planned and i not in settled]


def _group(meta: StoreMeta, videos: Sequence[PlannedVideo], workers: int, first: int) -> tuple[ShardTask, ...]:
    """Even shares of at most as many videos as fill a shard."""
    most = min(MAX_VIDEOS, max(1, meta.rows_per_shard // MEAN_ROWS))
    share = max(1, min(most, len(videos) // (SHARDS_PER_WORKER * max(1, workers))))
    count = -(-len(videos) // share)
    bounds = [len(videos) * k // count for k in range(count + 1)] if count else [0]
    return tuple(ShardTask(first + k, tuple(videos[bounds[k] : bounds[k + 1]])) for k in range(count))


def create_segment(meta: StoreMeta, segment: Segment) -> bool:
    """Writes the plan file; whoever loses the race for the number must plan anew on what the winner wrote."""
    return meta.storage.create(segment_key(segment.number), sealed_segment(meta, segment))


def sealed_segment(meta: StoreMeta, segment: Segment) -> bytes:
    """What is in a plan file."""
    body = {
        "segment": segment.number,
        "origin": meta.provenance.digest,
        "first_shard": segment.first_shard,
        "shards": [[[video.video_id, video.path] for video in task.videos] for task in segment.tasks],
        "duplicates": [[video.video_id, video.path] for video in segment.duplicates],
    }
    return seal(body)


def segment_key(number: int) -> str:
    return f"{PLANS}/plan-{number:03d}.json"


def _keys(numbers: Sequence[int]) -> list[str]:
    return [segment_key(number) for number in numbers]


def segment_numbers(meta: StoreMeta) -> list[int]:
    """Numbers of the plan files."""
    return _sorted_out(meta)[0]


def stray_files(meta: StoreMeta) -> list[str]:
    """Keys of what lies among the plan files and is none of them, whatever is in it; hidden names are passed over."""
    return _sorted_out(meta)[1]


def _sorted_out(meta: StoreMeta) -> tuple[list[int], list[str]]:
    numbers: list[int] = []
    strays: list[str] = []
    for key in (f"{PLANS}/{name}" for name in meta.storage.names(PLANS) if name[0] != "."):
        match = _SEGMENT.fullmatch(key.rpartition("/")[2])
        if match and segment_key(int(match[1])) == key:
            numbers.append(int(match[1]))
        elif key != COPY:
            strays.append(key)
    return sorted(numbers), strays


def read_segment(meta: StoreMeta, number: int) -> Segment:
    """One plan file; StoreError where it is damaged."""
    return _parse(meta, number, meta.storage.read(segment_key(number)))


def _parse(meta: StoreMeta, number: int, data: bytes) -> Segment:
    segment = segment_of(data, meta.place(segment_key(number)))
    if segment.number != number:
        raise StoreError(
            f"{meta.place(segment_key(number))} is plan segment {segment.number}: a file was copied or renamed; "
            "run `vlm-dist store verify --repair` on the store"
        )
    if segment.origin not in ("", meta.provenance.digest):
        raise StoreError(
            f"{meta.place(segment_key(number))} is of a store of another extractor: it was copied from there; "
            "run `vlm-dist store verify --repair` on the store"
        )
    return segment


def segment_of(data: bytes, where: str) -> Segment:
    """The segment in a plan file, whatever the file's name; StoreError where it is damaged."""
    return unseal_as("a plan segment", data, where, _segment)


def _segment(body: dict[str, Any]) -> Segment:
    first: int = body["first_shard"]
    tasks = (
        ShardTask(first + k, tuple(PlannedVideo(*video) for video in videos)) for k, videos in enumerate(body["shards"])
    )
    duplicates = tuple(PlannedVideo(*video) for video in body["duplicates"])
    return Segment(body["segment"], first, tuple(tasks), duplicates, body.get("origin", ""))


def fit_array(meta: StoreMeta) -> None:
    """Grows the features array to the plan. Two planners may do so at once: the last to write looks once more."""
    while True:
        shards = planned_shards(meta)
        if array_fits(meta, shards):
            return
        set_shard_count(meta, shards)


def array_fits(meta: StoreMeta, shards: int) -> bool:
    """Whether the features array has the metadata of so many shards."""
    return array_shards(meta) == shards


def array_shards(meta: StoreMeta) -> int | None:
    """How many shards the features array has room for, by its metadata; None where that is damaged or lost."""
    try:
        data = meta.storage.read(FEATURES_JSON)
        shards = int(json.loads(data)["shape"][0]) // meta.rows_per_shard
    except StoreUnreachableError:
        raise
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
    return shards if data == features_json(meta, shards) else None


def _with_paths(task: ShardTask, given: dict[str, str]) -> ShardTask:
    return ShardTask(task.shard, tuple(PlannedVideo(v.video_id, given.get(v.video_id, v.path)) for v in task.videos))
