"""Deleting videos and naming splits: what is said of videos by id, as a new snapshot (index → index)."""

import re
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, Field

from feature_store.draft import Draft, Marks
from feature_store.index import StoreIndex
from feature_store.layout import open_store
from feature_store.snapshot import (
    committed_videos,
    finalise,
    snapshot_captions,
    snapshot_marks,
    snapshot_videos,
    update_snapshot,
)
from feature_store.storage import Root
from vlm_dist.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class MarkReport(BaseModel):
    """What became of a list of ids."""

    model_config = ConfigDict(frozen=True)

    snapshot: str
    changed: int = Field(description="Videos that were not marked so before.")
    marked: int = Field(description="Videos that are marked now.")
    unknown: int = Field(description="Ids of the list that have no features in the store.")
    unknown_ids: list[str] = Field(description="The first three of them.")


def delete_videos(root: Root, video_ids: Iterable[str], undo: bool = False) -> MarkReport:
    """Takes videos out of the snapshot that readers open, or (`undo`) back into it.

    Older snapshots keep them, so that runs that are bound to one go on. Their rows stay in the shards and their
    captions with those that wait: nothing is lost, and nothing is freed. Extraction does not bring them back.
    """
    meta = open_store(root)
    asked = {video_id.encode("utf-8", "replace") for video_id in video_ids}
    before: set[bytes] = set()
    unknown: set[bytes] = set()

    def build(parent: StoreIndex | None) -> Draft | None:
        marks = snapshot_marks(parent)
        committed = committed_videos(meta)
        for ids, found in ((before, marks.deleted), (unknown, asked.difference(committed.ids))):
            ids.clear()  # of a build that another was faster than
            ids.update(found)
        deleted = before - asked if undo else before | (asked - unknown)
        videos = committed.without(deleted)
        if parent and deleted == before and videos.same(snapshot_videos(parent)):
            return None
        return Draft(videos, snapshot_captions(parent), Marks(sorted(deleted), marks.splits))

    name = update_snapshot(meta, build)
    now = set(StoreIndex(root, name).deleted())
    return _report(name, before, now, unknown)


def name_split(root: Root, name: str, video_ids: Iterable[str] | None) -> MarkReport:
    """Makes (or replaces) the named split of the store; None removes it. Ids without features may be in it.

    Raises:
        ConfigError: a name that cannot be a folder's.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"split name {name!r}: use up to 64 letters, digits, dots, dashes and underscores")
    meta = open_store(root)
    finalise(root)
    ids = None if video_ids is None else sorted({video_id.encode("utf-8", "replace") for video_id in video_ids})
    before: set[bytes] = set()

    def build(parent: StoreIndex | None) -> Draft | None:
        assert parent is not None, "finalise has made one"
        marks = snapshot_marks(parent)
        old = marks.splits.get(name)
        before.clear()
        before.update(old or ())
        if ids == (None if old is None else list(old)):
            return None
        splits = {key: value for key, value in marks.splits.items() if key != name}
        if ids is not None:
            splits[name] = ids
        return Draft(snapshot_videos(parent), snapshot_captions(parent), Marks(marks.deleted, splits))

    snapshot = update_snapshot(meta, build)
    now = set(ids or ())
    index = StoreIndex(root, snapshot)
    found = index.find_many([key.decode() for key in ids or ()]).tolist()
    unknown = {key for key, number in zip(ids or (), found, strict=True) if number < 0}
    return _report(snapshot, before, now, unknown)


def _report(snapshot: str, before: set[bytes], now: set[bytes], unknown: set[bytes]) -> MarkReport:
    return MarkReport(
        snapshot=snapshot,
        changed=len(now ^ before),
        marked=len(now),
        unknown=len(unknown),
        unknown_ids=[key.decode() for key in sorted(unknown)[:3]],
    )
