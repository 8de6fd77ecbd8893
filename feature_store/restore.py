"""Shard files whose commit record is not theirs, or lost → their record, from a snapshot (index → commit record).

A snapshot says of every video in which rows of which shard it is, and their checksum: all that a reader needs. So a
file that holds exactly that gets its record back. What no snapshot knows (failures, seconds that were decoded) is not
in it; videos that are planned for the shard and not in its record are given out again, as always.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from feature_store.commit import Commit, restore_record
from feature_store.files import file_crc32c
from feature_store.index import StoreIndex
from feature_store.layout import StoreMeta, shard_key
from feature_store.records import VideoRecord
from feature_store.shard import shard_bytes
from feature_store.shard_check import check_shard
from feature_store.storage import fetched
from vlm_dist.errors import StoreError, StoreUnreachableError

_ATTEMPT = "restored"  # no attempt has this name: nothing of it is staged


def restore_records(
    meta: StoreMeta, sizes: Mapping[int, int], snapshots: Sequence[str], paths: Mapping[int, Mapping[str, str]]
) -> dict[int, tuple[Commit, str]]:
    """Gives published shards without a record that fits a new one, where a snapshot tells it all.

    Args:
        meta: the store.
        sizes: bytes of their files, by shard.
        snapshots: names of those that are sound, oldest first; the newest that fits a file counts.
        paths: planned path by id, for each of these shards that the plan knows.

    Returns:
        Of every shard that has its record again the record, and the snapshot that told it.
    """
    done: dict[int, tuple[Commit, str]] = {}
    tried: set[tuple[int, tuple[VideoRecord, ...]]] = set()
    for name in reversed(snapshots):
        if done.keys() == sizes.keys():
            break
        try:
            index = StoreIndex(meta.root, name)
            index.check_columns()
        except StoreUnreachableError:
            raise
        except StoreError:
            continue
        for shard in sorted(sizes.keys() - done.keys()):
            records = tuple(_told(index, shard, paths.get(shard)))
            if (shard, records) in tried:
                continue
            tried.add((shard, records))
            if commit := _fitting(meta, shard, sizes[shard], records):
                restore_record(meta, commit)
                done[shard] = commit, name
    return done


def _told(index: StoreIndex, shard: int, paths: Mapping[str, str] | None) -> list[VideoRecord]:
    """What a snapshot knows of a shard's videos, by row; nothing where one of them is not planned for the shard."""
    numbers = np.flatnonzero(index.shard == shard)
    records = [
        VideoRecord(
            video_id=index.video_id(video),
            path=paths.get(index.video_id(video), "") if paths else "",
            row=int(index.row[video]),
            n_rows=int(index.n_rows[video]),
            crc32c=int(index.crc32c[video]),
        )
        for video in numbers[np.argsort(index.row[numbers])].tolist()
    ]
    return records if paths is None or all(record.video_id in paths for record in records) else []


def _fitting(meta: StoreMeta, shard: int, size: int, records: Sequence[VideoRecord]) -> Commit | None:
    """The record of a file in which these videos lie one after another, to its end, every byte as its checksum says."""
    rows = 0
    for record in records:
        if record.row != rows or not record.n_rows:
            return None
        rows += record.n_rows
    if not rows or size != shard_bytes(meta, rows):
        return None
    with fetched(meta.storage, shard_key(shard)) as path:
        commit = Commit(
            shard=shard,
            attempt=_ATTEMPT,
            size=size,
            crc32c=file_crc32c(path),
            rows=rows,
            origin=meta.provenance.digest,
            videos=tuple(records),
        )
        return None if any(check_shard(meta, commit, path)) else commit
