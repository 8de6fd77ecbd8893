"""What a repair plans: lost segments anew from the commit records, a shard for what was saved (see verify.py)."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress

from feature_store.commit import committed_shards, iter_records
from feature_store.layout import VOIDED, StoreMeta, aside_key
from feature_store.plan import (
    PlannedVideo,
    Segment,
    ShardTask,
    array_shards,
    create_segment,
    fit_array,
    planned_shards,
    read_segment,
    sealed_segment,
    segment_key,
    segment_numbers,
    segment_of,
    stray_files,
)
from vlm_dist.errors import StoreError, StoreUnreachableError

_MISPLACED = re.compile(r"plan-\d{3,}\.json\.(\d+)")  # in `_voided`; the highest number was put there last
_REPLACED = "replaced-"  # in `_voided`, and never put back


def restore_segments(meta: StoreMeta, bad: Collection[int] = ()) -> tuple[list[int], list[str]]:
    """Puts whole plan segments that lie under another's name under their own, where that is damaged or lost.

    What lay in a wrong place goes to `_voided` first, and is looked for there too: a repair that is killed loses none.
    Put back is only what the commit records and the segments around it do not contradict.

    Args:
        meta: the store.
        bad: numbers of segments that are whole, and known to be wrong.

    Returns:
        Numbers of the segments that were put back; and what was done, a line a file.
    """
    storage = meta.storage
    there = {number: _whole(meta, segment_key(number)) for number in segment_numbers(meta)}
    sound = {n: found[0] for n, found in there.items() if found and found[0].number == n and n not in bad}
    misplaced = {n: found for n, found in there.items() if found and found[0].number != n}
    strays = {key: _whole(meta, key) for key in stray_files(meta)}
    now = [*misplaced.values(), *(found for found in strays.values() if found)]
    for segment, data in now:
        _keep_misplaced(meta, segment.number, data)
    back = _fitting(meta, sound, max(there, default=-1))
    for number, data in back.items():
        if number not in misplaced:
            _set_aside(meta, number)
        storage.replace(segment_key(number), data)
    done = [
        f"put plan segment {number} back under its own number"
        if any(data == other for _, other in now)
        else f"put plan segment {number} back, as an earlier repair had kept it: give the videos to extract again"
        for number, data in back.items()
    ]
    copies = [number for number in sorted(misplaced) if number not in back]
    for number in copies:  # if it had a segment of its own, that is lost, and will be made anew as such
        storage.remove(segment_key(number))
    done += [f"took out {segment_key(number)}: it was plan segment {misplaced[number][0].number}" for number in copies]
    for key, found in strays.items():
        storage.move(key, aside_key(_REPLACED + key.rpartition("/")[2]))
        was = f"it was plan segment {found[0].number}" if found else "it is no file of the plan"
        done.append(f"took out {key}: {was}")
    return list(back), done


def _whole(meta: StoreMeta, key: str) -> tuple[Segment, bytes] | None:
    """The segment of this store, and the bytes, in a plan file of whatever name; None where it is none."""
    try:
        data = meta.storage.read(key)
        segment = segment_of(data, meta.place(key))
    except StoreUnreachableError:
        raise
    except (StoreError, FileNotFoundError):
        return None
    return (segment, data) if segment.origin in ("", meta.provenance.digest) else None


def _keep_misplaced(meta: StoreMeta, number: int, data: bytes) -> None:
    kept = [at for _, at in _misplaced(meta)]
    at = max(kept, default=-1) + 1
    while not meta.storage.create(f"{VOIDED}/plan-{number:03d}.json.{at}", data):
        at += 1


def _misplaced(meta: StoreMeta) -> Iterator[tuple[str, int]]:
    """(key, when in order) of the segments that were put aside because they lay in a wrong place."""
    for name in meta.storage.names(VOIDED):
        if match := _MISPLACED.fullmatch(name):
            yield f"{VOIDED}/{name}", int(match[1])


def _fitting(meta: StoreMeta, sound: Mapping[int, Segment], last: int) -> dict[int, bytes]:
    """Of the segments that are not sound, those that were put aside and fit: the newest of each.

    Beyond the `last` that has a file, one is lost only if the features have room for its shards.
    """
    newest_first = sorted(_misplaced(meta), key=lambda found: -found[1])
    kept = [found for key, _ in newest_first if (found := _whole(meta, key)) and found[0].number not in sound]
    if not kept:
        return {}
    records = {
        shard: {record.video_id for record in commit.videos}
        for shard, commit in iter_records(meta)
        if not isinstance(commit, StoreError)
    }
    room = max(array_shards(meta) or 0, max(committed_shards(meta), default=-1) + 1)
    known, back = dict(sound), dict[int, bytes]()
    for segment, data in sorted(kept, key=lambda found: found[0].number):  # stable: of one number the newest is first
        number = segment.number
        if number in known or (number > last and segment.end > room):
            continue
        said = all(records.get(task.shard, set()) <= {v.video_id for v in task.videos} for task in segment.tasks)
        if said and _between(segment, known):
            known[number], back[number] = segment, data
    return back


def _between(segment: Segment, known: Mapping[int, Segment]) -> bool:
    """Whether a segment has its place among those that are known."""
    before = max((n for n in known if n < segment.number), default=-1)
    after = min((n for n in known if n > segment.number), default=-1)
    first = known[before].end if before >= 0 else 0
    if segment.first_shard < first or (before == segment.number - 1 and segment.first_shard != first):
        return False
    if after < 0:
        return True
    end = known[after].first_shard
    return segment.end == end if after == segment.number + 1 else segment.end <= end


def _set_aside(meta: StoreMeta, number: int) -> None:
    """Keeps what a plan file holds, before it is replaced; nobody looks there for a segment."""
    key = segment_key(number)
    with suppress(FileNotFoundError):
        if data := meta.storage.read(key):
            meta.storage.replace(aside_key(_REPLACED + key.rpartition("/")[2]), data)


def retire_misplaced(meta: StoreMeta) -> None:
    """What was put aside of segments that have another content now is old, and is not put back any more."""
    for key, _ in list(_misplaced(meta)):
        found = _whole(meta, key)
        now = _whole(meta, segment_key(found[0].number)) if found else None
        if not found or (now and now[0].number == found[0].number and now[1] != found[1]):
            meta.storage.move(key, aside_key(_REPLACED + key.rpartition("/")[2]))


def rebuild_segments(
    meta: StoreMeta,
    numbers: Sequence[int],
    commits: Mapping[int, Sequence[str]],
    uncommitted: Mapping[int, ShardTask],
) -> list[str]:
    """Makes damaged or missing segments anew from what the commit records say; a repair's last resort.

    Videos of them that are not committed are forgotten: the next extraction that is given them plans them again.

    Args:
        meta: the store.
        numbers: of the segments.
        commits: ids of each committed shard.
        uncommitted: what is known of the other shards.

    Returns:
        What was done, a line a segment.
    """
    intact = {n: read_segment(meta, n) for n in segment_numbers(meta) if n not in numbers}
    ends = {n: segment.end for n, segment in intact.items()}
    shards = [*commits, *uncommitted]
    last_of_all = max([*ends.values(), max(shards, default=-1) + 1], default=0)
    rebuilt: list[Segment] = []
    for number in sorted(set(numbers)):
        first = ends.get(number - 1, 0)
        # Of neighbours that are both lost the first takes all shards between those that are known.
        last = next(
            (intact[n].first_shard for n in range(number + 1, max(intact, default=0) + 1) if n in intact), last_of_all
        )
        tasks = tuple(
            ShardTask(shard, tuple(PlannedVideo(video_id, "") for video_id in commits[shard]))
            if shard in commits
            else uncommitted.get(shard, ShardTask(shard, ()))
            for shard in range(first, max(first, last))
        )
        ends[number] = max(first, last)
        rebuilt.append(Segment(number, first, tasks, ()))
    for segment in rebuilt:
        _set_aside(meta, segment.number)
        meta.storage.replace(segment_key(segment.number), sealed_segment(meta, segment))  # at once: none is lost now
    return [
        f"rebuilt plan segment {s.number} from the commit records: give the videos to extract again" for s in rebuilt
    ]


def planned_paths(meta: StoreMeta, shards: Collection[int], bad: Collection[int]) -> dict[int, dict[str, str]]:
    """Path by id of the videos that are planned for some shards, by all segments but the bad ones."""
    found: dict[int, dict[str, str]] = {}
    for number in segment_numbers(meta):
        if number in bad:
            continue
        try:
            segment = read_segment(meta, number)
        except StoreUnreachableError:
            raise
        except StoreError:  # its shards are not found
            continue
        found |= {
            task.shard: {v.video_id: v.path for v in task.videos} for task in segment.tasks if task.shard in shards
        }
    return found


def plan_shard(meta: StoreMeta, videos: Sequence[PlannedVideo]) -> int:
    """Plans one further shard for just these videos, whatever is known of them, in a segment of its own; its number."""
    while True:
        number, shard = max(segment_numbers(meta), default=-1) + 1, planned_shards(meta)
        if create_segment(meta, Segment(number, shard, (ShardTask(shard, tuple(videos)),), ())):
            fit_array(meta)
            return shard


def missing_segments(meta: StoreMeta) -> list[int]:
    """Numbers that the plan skips, and the one after the last where shards are committed that no segment has."""
    numbers = segment_numbers(meta)
    end = max(numbers, default=-1) + 1
    missing = sorted(set(range(end)) - set(numbers))
    try:
        lost = max(committed_shards(meta), default=-1) >= planned_shards(meta)
    except StoreUnreachableError:
        raise
    except StoreError:  # the last segment is damaged, and will be made anew as far as the commits go
        lost = False
    return [*missing, end] if lost else missing
