"""Features of many videos → one committed shard: the attempt of one task (videos → features).

Any number of attempts may work on the same shard at once, on any machines that share the folder, and any of them may be
killed at any moment: exactly one wins, whole (store facts 5.2).
"""

import contextlib
import os
import shutil
import uuid
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from feature_store.commit import (
    Commit,
    commit_key,
    create_record,
    read_commit,
    roll_forward,
    staged_key,
    staging_name,
)
from feature_store.files import SCRATCH, crc32c, disk_guard
from feature_store.layout import open_store, shard_key
from feature_store.records import VideoRecord
from feature_store.shard import REPAIR, ShardFile, shard_bytes
from feature_store.storage import Root
from vlm_dist.errors import StoreError

_BUFFER = 4 << 20  # long writes: the page cache keeps the file in large pieces, and reads of it are quicker
_INF = 0x7C00  # the smallest float16 pattern, without its sign, that is not finite


class ShardAttempt:
    """Stages a shard video by video and commits it once; a context manager that abandons what was not committed."""

    def __init__(self, root: Root, task_shard: int) -> None:
        self._meta = open_store(root)
        self._shard = task_shard
        self._attempt = uuid.uuid4().hex
        self._path, self._file = self._open()
        self._folder = self._path.parent
        self._rows = ShardFile(self._meta, self._file)
        self._records: dict[str, VideoRecord] = {}
        self._broken = False

    def room(self) -> int:
        """Rows that the shard has place for yet."""
        return self._meta.rows_per_shard - self._rows.rows

    def add(self, record: VideoRecord, features: np.ndarray | None) -> VideoRecord:
        """Stages one video.

        Args:
            record: status `ok` with features, or `failed` with a reason and None.
            features: (n, F) float16, one row per second.

        Returns:
            The record as it will be committed: with rows and crc32c; `overflow` where the shard is too full for it
            (the next plan gives the video out again); `failed` with reason `too_long` where no shard could hold it.

        Raises:
            StoreError: features that no encoder gives (not finite, all zero, another shape or type), or a full disk.
        """
        assert record.video_id not in self._records, f"video {record.video_id} was added twice to shard {self._shard}"
        assert (record.status == "ok") == (features is not None), "exactly the videos with status ok have features"
        if features is not None:
            record = self._stage(record, features)
        self._records[record.video_id] = record
        return record

    def commit(self) -> bool:
        """Makes the attempt the shard's content, durably; False if another attempt was first (this one is deleted).

        Raises:
            StoreError: a full disk, the winning record is damaged, or the shard is published and its record is lost.
        """
        self._require_whole()
        self._require_record_of_published()
        with disk_guard(self._path, shard_bytes(self._meta, self._rows.rows)):
            if self._rows.rows:
                self._rows.finish()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        commit = Commit(
            shard=self._shard,
            attempt=self._attempt,
            size=self._rows.size,
            crc32c=self._rows.crc32c,
            rows=self._rows.rows,
            origin=self._meta.provenance.digest,
            videos=tuple(self._records.values()),
        )
        try:
            self._meta.storage.upload(self._path, staged_key(self._shard, self._attempt))
            won = create_record(self._meta, commit)
        except FileNotFoundError:  # our staging was swept, because another attempt had won
            if self._meta.storage.size(commit_key(self._shard)) is None:
                raise StoreError(
                    f"the staged shard {self._folder} was deleted while it was written: "
                    "run no repair while an extraction is at work, and run the extraction again"
                ) from None
            won = False
        if won:
            roll_forward(self._meta, commit)
        else:
            roll_forward(self._meta, read_commit(self._meta, self._shard))
        self._remove()
        return won

    def abandon(self) -> None:
        """Deletes what was staged, unless it is committed."""
        with contextlib.suppress(OSError):  # a full disk: what is buffered is not wanted any more
            self._file.close()
        try:
            committed = read_commit(self._meta, self._shard).attempt == self._attempt
        except FileNotFoundError:
            committed = False
        if not committed:
            self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def _open(self) -> tuple[Path, BinaryIO]:
        """The staged file, empty."""
        while True:
            path = self._meta.storage.scratch(staging_name(self._shard, self._attempt)) / "shard"
            # Swept at once, where another attempt was first: this one goes on, and loses when it commits.
            with contextlib.suppress(FileNotFoundError), disk_guard(path, 4096):
                return path, path.open("wb", buffering=_BUFFER)

    def _remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._meta.storage.remove(f"{SCRATCH}/{staging_name(self._shard, self._attempt)}")

    def _stage(self, record: VideoRecord, features: np.ndarray) -> VideoRecord:
        where = f"video {record.video_id} (shard {self._shard})"
        meta = self._meta
        if features.ndim != 2 or features.shape[1] != meta.feature_dim or features.dtype != np.float16:
            raise StoreError(
                f"features of {where} are {features.dtype} {features.shape}; this store takes float16 "
                f"(seconds, {meta.feature_dim})"
            )
        # The largest magnitude by its bits: one quick pass where float16 arithmetic takes two slow ones.
        rows = np.ascontiguousarray(features, "<f2")
        if not 0 < int((rows.view("<u2") & 0x7FFF).max(initial=0)) < _INF:
            raise StoreError(
                f"features of {where} are empty, not finite or all zero: the encoder or its input is broken"
            )
        if len(features) > meta.rows_per_shard:
            message = f"{len(features)} seconds; a shard of this store holds {meta.rows_per_shard}"
            return record.model_copy(update={"status": "failed", "reason": "too_long", "message": message})
        if self._rows.rows + len(features) > meta.rows_per_shard:
            return record.model_copy(update={"status": "overflow"})
        self._require_whole()
        row = self._rows.rows
        self._broken = True  # until all of it is written: half a video must never be followed by another
        with disk_guard(self._path, shard_bytes(meta, row + len(rows))):
            self._rows.append(rows)
        self._broken = False
        return record.model_copy(update={"row": row, "n_rows": len(rows), "crc32c": crc32c(rows)})

    def _require_whole(self) -> None:
        if self._broken:
            raise StoreError(f"an earlier write to {self._path} failed: abandon this attempt and start another")

    def _require_record_of_published(self) -> None:
        """A published shard without a record is never overwritten; the record of another attempt is older than it."""
        storage, key = self._meta.storage, shard_key(self._shard)
        if storage.size(key) is not None and storage.size(commit_key(self._shard)) is None:
            raise StoreError(
                f"{self._meta.place(key)} is there, and its commit record is lost: it is not written anew. {REPAIR}"
            )


def shard_done(root: Root, shard: int) -> bool:
    """True if a shard is committed (published too, on return): whoever was given its task has nothing to do."""
    meta = open_store(root)
    try:
        roll_forward(meta, read_commit(meta, shard))
    except FileNotFoundError:
        return False
    return True
