"""One committed shard file against its record (shard file → what is wrong with it, which of its videos are whole)."""

from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Literal

import numpy as np

from feature_store.commit import Commit
from feature_store.files import crc32c, file_crc32c
from feature_store.layout import CHUNK_ROWS, StoreMeta
from feature_store.records import VideoRecord
from feature_store.shard import bad_chunks, read_rows
from vlm_dist.errors import StoreError, StoreUnreachableError

Found = tuple[Literal["shard", "chunk", "video"], str, str]
"""Kind, where (after the shard's own place), what."""


def whole_rows(meta: StoreMeta, file: BufferedReader, record: VideoRecord) -> np.ndarray | None:
    """A video's rows from an open shard file, if their own checksum is right; whatever else is wrong with the file."""
    rows = read_rows(meta, file, record.row, record.n_rows)
    return rows if rows is not None and crc32c(rows) == record.crc32c else None


def broken_videos(meta: StoreMeta, commit: Commit, path: Path) -> list[VideoRecord]:
    """The records of a shard whose rows are not in its file as they were committed; one video in memory at a time."""
    with path.open("rb") as file:
        return [r for r in commit.videos if r.status == "ok" and whole_rows(meta, file, r) is None]


def check_shard(meta: StoreMeta, commit: Commit, path: Path) -> Iterator[Found]:
    """Checksums of the chunk index, of every chunk, of every video, and of the file."""
    try:
        bad = list(bad_chunks(meta, path))
    except StoreUnreachableError:
        raise
    except StoreError as error:
        yield "shard", "", str(error)
        return
    for chunk, why in bad:
        first, last = chunk * CHUNK_ROWS, (chunk + 1) * CHUNK_ROWS
        ok = (record for record in commit.videos if record.status == "ok")
        hit = [record.video_id for record in ok if record.row < last and record.row + record.n_rows > first]
        yield "chunk", f", chunk {chunk}, video {', '.join(hit) or 'none'}", why
    broken = broken_videos(meta, commit, path)
    for record in broken:
        first, last = record.row // CHUNK_ROWS, (record.row + record.n_rows - 1) // CHUNK_ROWS
        yield "video", f", video {record.video_id}, chunks {first} to {last}", "crc32c differs"
    if not bad and not broken and file_crc32c(path) != commit.crc32c:
        yield "shard", "", "crc32c of the file differs from the commit record"
