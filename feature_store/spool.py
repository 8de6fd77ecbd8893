"""Finished videos of shards that are not committed yet, on the node's own disk (a saving of the extraction's workers).

A shard is days of a core's work. When its worker dies or is stopped, the next one on this node takes the videos that
were finished from here. Nothing depends on it: what is damaged, or of a file that has changed, is made again.
"""

import io
import shutil
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from feature_store.files import crc32c
from feature_store.layout import StoreMeta
from feature_store.node_files import cache_folder, digest
from feature_store.plan import PlannedVideo
from feature_store.records import VideoRecord
from feature_store.video_source import video_identity
from vlm_dist.errors import ExtractionError

_KEEP_S = 7 * 24 * 3600.0  # extractions that nobody has gone on with for so long


class Spool:
    """The finished videos of one store and one encoder, on this node."""

    def __init__(self, meta: StoreMeta) -> None:
        base = cache_folder() / "spool"
        self._folder = base / digest(f"{meta.storage.address}\n{meta.provenance.digest}")
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in base.iterdir():
                if time.time() - path.stat().st_mtime > _KEEP_S:
                    shutil.rmtree(path, ignore_errors=True)

    def put(self, video: PlannedVideo, record: VideoRecord, features: np.ndarray) -> None:
        """Keep a finished video; a disk that is full or not writable keeps nothing."""
        if not (path := self._path(video)):
            return
        file = io.BytesIO()
        np.save(file, features)
        body = record.model_dump_json().encode() + b"\n" + file.getvalue()
        staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            staged.write_bytes(b"%08x\n" % crc32c(body) + body)
            staged.replace(path)
        except OSError:
            with suppress(OSError):
                staged.unlink()

    def get(self, video: PlannedVideo) -> tuple[VideoRecord, np.ndarray] | None:
        """A finished video's record and (n, F) float16 features; None where it is not here, or not whole."""
        if not (path := self._path(video)):
            return None
        try:
            crc, _, body = path.read_bytes().partition(b"\n")
            if crc != b"%08x" % crc32c(body):
                return None
            record, _, array = body.partition(b"\n")
            return VideoRecord.model_validate_json(record), np.load(io.BytesIO(array))
        except (OSError, ValueError, ValidationError):
            return None

    def drop(self, videos: Iterable[PlannedVideo]) -> None:
        """Forget videos, whose shard is committed."""
        for video in videos:
            if path := self._path(video):
                with suppress(OSError):
                    path.unlink()

    def _path(self, video: PlannedVideo) -> Path | None:
        """Where a video lies; another file under the same path lies elsewhere. None where there is no file."""
        with suppress(ExtractionError):  # a bucket that does not answer: the video's turn will tell
            if identity := video_identity(video.path):
                return self._folder / digest(f"{video.video_id}\0{video.path}\0{identity}")
        return None
