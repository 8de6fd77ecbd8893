"""A damaged shard file → what is whole of it, as a shard of its own: hours of work that a repair keeps (see verify.py).

First a further shard is planned for the videos that are whole, then they are committed as that shard, as any attempt
commits, and only then is the damaged shard voided. After a kill in between, a further repair finds the planned shard
and fills it, or finds it committed and voids what is left.
"""

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader

from feature_store.commit import Commit, iter_records, read_commit, shard_place, void
from feature_store.layout import StoreMeta
from feature_store.plan import PlannedVideo
from feature_store.plan_repair import plan_shard
from feature_store.records import VideoRecord
from feature_store.shard_check import whole_rows
from feature_store.storage import fetched
from feature_store.writer import ShardAttempt
from vlm_dist.errors import StoreError

Settled = dict[tuple[str, str], int]
"""(video id, status) → the last sound shard that says so."""


def settled_elsewhere(meta: StoreMeta, damaged: Collection[int], bad: Collection[int]) -> Settled:
    """Where videos of the damaged shards have another record, in a shard that is not bad."""
    asked = {record.video_id for shard in damaged for record in read_commit(meta, shard).videos}
    settled: Settled = {}
    for shard, commit in iter_records(meta):
        if shard not in bad and not isinstance(commit, StoreError):
            settled.update(((r.video_id, r.status), shard) for r in commit.videos if r.video_id in asked)
    return settled


def salvage_shard(
    meta: StoreMeta, shard: int, paths: Mapping[str, str], open_tasks: dict[int, set[str]], settled: Settled
) -> list[str]:
    """Keeps what is whole of a damaged shard as a further shard, and voids it. Only while nobody else writes.

    Failed videos are kept too, with their reasons: nothing of theirs was damaged. What a later sound shard holds
    already needs no saving.

    Args:
        meta: the store.
        shard: its record is sound, its file is damaged or missing.
        paths: the planned path by id of its videos.
        open_tasks: ids of every planned shard that is not committed; one may be what a killed repair has planned. It
            is taken out when it is filled.
        settled: see `settled_elsewhere`.

    Returns:
        What was done.

    Raises:
        StoreError: a full disk, or somebody else committed the new shard.
    """
    commit = read_commit(meta, shard)
    left = [record for record in commit.videos if record.status != "overflow" and not _later(record, shard, settled)]
    done: list[str] = []
    with _opened(meta, commit) as file:
        whole = [r for r in left if r.status == "failed" or (file and whole_rows(meta, file, r) is not None)]
        if whole:
            new = _task(meta, commit, whole, paths, open_tasks)
            _copy(meta, new, whole, file)
            ok = sum(record.status == "ok" for record in whole)
            of = sum(record.status == "ok" for record in left)
            failed = f" and the reasons of {len(whole) - ok} failed ones" if len(whole) > ok else ""
            done.append(f"kept {ok} of {of} videos{failed} of shard {shard} as shard {new}")
    void(meta, shard)
    lost = len(left) - len(whole)
    done.append(
        f"voided shard {shard}: " + (f"extract again to make {lost} of its videos anew" if lost else "nothing is lost")
    )
    return done


def _later(record: VideoRecord, shard: int, settled: Settled) -> bool:
    """Whether a later shard makes the record void: features count always, a failure only for failures."""
    ok, failed = (settled.get((record.video_id, status), -1) for status in ("ok", "failed"))
    return ok > shard or (record.status == "failed" and max(ok, failed) > shard)


@contextmanager
def _opened(meta: StoreMeta, commit: Commit) -> Generator[BufferedReader | None]:
    """The shard's file, wherever it is; None where it is nowhere."""
    key, size = shard_place(meta, commit, {})
    if size is None:
        yield None
        return
    with fetched(meta.storage, key) as path, path.open("rb") as file:
        yield file


def _task(
    meta: StoreMeta,
    commit: Commit,
    whole: Sequence[VideoRecord],
    paths: Mapping[str, str],
    open_tasks: dict[int, set[str]],
) -> int:
    """The shard that a killed repair has planned for these videos (and for some that were whole then), or a new one."""
    mine, of = {record.video_id for record in whole}, {record.video_id for record in commit.videos}
    for task, ids in open_tasks.items():
        if mine <= ids <= of:
            del open_tasks[task]
            return task
    return plan_shard(meta, [PlannedVideo(r.video_id, paths.get(r.video_id, r.path)) for r in whole])


def _copy(meta: StoreMeta, new: int, whole: Sequence[VideoRecord], file: BufferedReader | None) -> None:
    with ShardAttempt(meta.root, new) as attempt:
        for record in whole:
            rows = whole_rows(meta, file, record) if file and record.status == "ok" else None
            if rows is not None or record.status == "failed":  # a disk may fail between two reads
                attempt.add(record, rows)
        if not attempt.commit():
            raise StoreError(
                f"somebody else wrote shard {new} of {meta.root} during the repair: "
                "run it again when nobody writes to the store"
            )
