"""What a repair plans: lost segments anew from the commit records, a shard for what was saved (see verify.py)."""

import re
from collections.abc import Collection, Mapping, Sequence

from feature_store.commit import committed_shards
from feature_store.layout import VOIDED, StoreMeta
from feature_store.plan import (
    PlannedVideo,
    Segment,
    ShardTask,
    create_segment,
    fit_array,
    planned_shards,
    read_segment,
    segment_key,
    segment_numbers,
    segment_of,
)
from vlm_dist.errors import StoreError, StoreUnreachableError

_ASIDE = re.compile(r"plan-\d{3,}\.json\.\d+")  # in `_voided`


def restore_segments(meta: StoreMeta) -> list[str]:
    """Puts whole plan segments that lie under another's number under their own, where that is damaged or lost.

    What lay in a wrong place goes to `_voided` first, and is looked for there too: a repair that is killed loses none.

    Returns:
        What was done, a line a file.
    """
    storage = meta.storage
    there = {number: _whole(meta, segment_key(number)) for number in segment_numbers(meta)}
    sound = {number for number, found in there.items() if found and found[0] == number}
    misplaced = {number: found for number, found in there.items() if found and found[0] != number}
    for own, data in misplaced.values():
        storage.replace(f"{VOIDED}/plan-{own:03d}.json.{len(storage.names(VOIDED))}", data)
    aside = [f"{VOIDED}/{name}" for name in storage.names(VOIDED) if _ASIDE.fullmatch(name)]
    kept = dict(found for key in aside if (found := _whole(meta, key)))
    back = sorted(kept.keys() - sound)
    for number in back:
        storage.replace(segment_key(number), kept[number])
    copies = [number for number in sorted(misplaced) if number not in back]
    for number in copies:  # if it had a segment of its own, that is lost, and will be made anew as such
        storage.remove(segment_key(number))
    return [f"put plan segment {number} back under its own number" for number in back] + [
        f"took out {segment_key(number)}: it was plan segment {misplaced[number][0]}" for number in copies
    ]


def _whole(meta: StoreMeta, key: str) -> tuple[int, bytes] | None:
    """Its own number, and the bytes, of a segment in a plan file of whatever name; None where it is damaged."""
    data = meta.storage.read(key)
    try:
        return segment_of(data, meta.place(key)).number, data
    except StoreError:
        return None


def rebuild_segments(meta: StoreMeta, numbers: Sequence[int], commits: Mapping[int, Sequence[str]]) -> list[str]:
    """Makes damaged or missing segments anew from what the commit records say; a repair's last resort.

    Videos of them that are not committed are forgotten: the next extraction that is given them plans them again.

    Args:
        meta: the store.
        numbers: of the segments.
        commits: ids of each committed shard.

    Returns:
        What was done, a line a segment.
    """
    intact = {n: read_segment(meta, n) for n in segment_numbers(meta) if n not in numbers}
    ends = {n: segment.first_shard + len(segment.tasks) for n, segment in intact.items()}
    last_of_all = max([*ends.values(), max(commits, default=-1) + 1], default=0)
    rebuilt: list[Segment] = []
    for number in sorted(set(numbers)):
        first = ends.get(number - 1, 0)
        # Of neighbours that are both lost the first takes all shards between those that are known.
        last = next(
            (intact[n].first_shard for n in range(number + 1, max(intact, default=0) + 1) if n in intact), last_of_all
        )
        tasks = tuple(
            ShardTask(shard, tuple(PlannedVideo(video_id, "") for video_id in commits.get(shard, ())))
            for shard in range(first, max(first, last))
        )
        ends[number] = max(first, last)
        rebuilt.append(Segment(number, first, tasks, ()))
    for segment in rebuilt:
        key = segment_key(segment.number)
        meta.storage.move(key, f"{VOIDED}/{key.rpartition('/')[2]}.{len(meta.storage.names(VOIDED))}")
        create_segment(meta, segment)
    return [
        f"rebuilt plan segment {s.number} from the commit records: give the videos to extract again" for s in rebuilt
    ]


def planned_paths(meta: StoreMeta, shards: Collection[int]) -> dict[int, dict[str, str]]:
    """Path by id of the videos that are planned for some shards, as far as the plan can be read."""
    found: dict[int, dict[str, str]] = {}
    for number in segment_numbers(meta):
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
