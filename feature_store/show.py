"""All that a store knows of one video (any store → its record, provenance and captions)."""

from typing import Any

from feature_store.commit import iter_commits, read_commit
from feature_store.index import StoreIndex, current_snapshot
from feature_store.layout import StoreMeta, open_store
from feature_store.plan import read_plan
from feature_store.records import VideoRecord, clean_text
from feature_store.storage import Root
from vlm_dist.errors import StoreError


def video_facts(root: Root, video_id: str) -> dict[str, Any]:
    """What a store knows of a video, as plain JSON values.

    Returns:
        `state` (`ok`, `failed`, `open`, `deleted`), `record` (the newest commit record's line; None before there is
        one), `shard`, `provenance` of the features, and `captions` (start and end in ms, text) of the snapshot.

    Raises:
        StoreError: no such video was ever planned; the store or the record is damaged.
    """
    meta = open_store(root)
    wanted = str(clean_text(video_id))
    index = StoreIndex(root, checked=True) if current_snapshot(meta) else None
    number = index.find(wanted) if index else -1
    if index and number >= 0:
        shard = int(index.shard[number])
        record = _of(read_commit(meta, shard).videos, wanted)
        captions = index.check_captions(number)
        times = zip(captions.start_ms.tolist(), captions.end_ms.tolist(), captions.texts(), strict=True)
        told = [{"start_ms": start, "end_ms": end, "text": text} for start, end, text in times]
        return _facts(meta, wanted, "ok", shard, record, told)
    shard, record = _newest(meta, wanted)
    if record is None and not _planned(meta, wanted):
        raise StoreError(f"{meta.root} has never heard of a video {wanted!r}; ids are exact, letters' case included")
    if index and wanted.encode() in index.deleted():
        state = "deleted"
    else:
        state = record.status if record and record.status != "overflow" else "open"
    return _facts(meta, wanted, state, shard, record, [])


def _facts(
    meta: StoreMeta, video_id: str, state: str, shard: int | None, record: VideoRecord | None, captions: list[Any]
) -> dict[str, Any]:
    return {
        "video_id": video_id,
        "state": state,
        "shard": shard,
        "record": record.model_dump() if record else None,
        "provenance": meta.provenance.model_dump(mode="json"),
        "captions": captions,
    }


def _newest(meta: StoreMeta, video_id: str) -> tuple[int | None, VideoRecord | None]:
    """The last good record of a video that the snapshot does not have, else the last of any kind."""
    found: tuple[int | None, VideoRecord | None] = None, None
    for commit in iter_commits(meta):
        record = _of(commit.videos, video_id)
        if record and not (found[1] and found[1].status == "ok" and record.status != "ok"):
            found = commit.shard, record
    return found


def _of(records: tuple[VideoRecord, ...], video_id: str) -> VideoRecord | None:
    return next((record for record in records if record.video_id == video_id), None)


def _planned(meta: StoreMeta, video_id: str) -> bool:
    videos = (video for segment in read_plan(meta) for task in segment.tasks for video in task.videos)
    return any(video.video_id == video_id for video in videos)
