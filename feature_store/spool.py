"""Finished videos of shards that are not committed yet, on the node's own disk (a saving of the extraction's workers).

A shard is days of a core's work. When its worker dies or is stopped, the next one on this node takes the videos that
were finished from here. Nothing depends on it: what is damaged, or of a file that has changed, is made again.
"""

import io
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from feature_store.config import ExtractConfig
from feature_store.files import crc32c
from feature_store.layout import StoreMeta
from feature_store.node_files import cache_folder, digest
from feature_store.plan import PlannedVideo
from feature_store.records import VideoRecord
from feature_store.video_source import video_identity
from vlm_dist.errors import ExtractionError

_KEEP_S = 7 * 24 * 3600.0


class Spool:
    """The finished videos of one store and one way to encode, on this node.

    A video has a key, taken before it is decoded: its file may be replaced meanwhile.
    """

    def __init__(self, meta: StoreMeta, cfg: ExtractConfig) -> None:
        base = cache_folder() / "spool"
        # What may change a last bit, too, or whether a video is taken at all.
        bits = (cfg.deterministic, cfg.batch, cfg.gpus_per_worker > 0, cfg.compile, cfg.decode.min_coverage)
        way = f"{meta.provenance.digest}\n{bits}"
        self._folder = base / digest(f"{meta.storage.address}\n{way}")
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            _sweep(base)

    def key(self, video: PlannedVideo) -> str:
        """What a video, with its file as it is now, is kept under; "" where there is no file."""
        try:
            identity = video_identity(video.path)
        except ExtractionError:  # a bucket that does not answer: the video's turn will tell
            return ""
        return digest(f"{video.video_id}\0{video.path}\0{identity}") if identity else ""

    def put(self, key: str, record: VideoRecord, features: np.ndarray) -> None:
        """Keep a finished video; a disk that is full or not writable keeps nothing."""
        if not key:
            return
        path = self._folder / key
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

    def get(self, key: str) -> tuple[VideoRecord, np.ndarray] | None:
        """A finished video's record and (n, F) float16 features; None where it is not here, or not whole."""
        if not key:
            return None
        try:
            crc, _, body = (self._folder / key).read_bytes().partition(b"\n")
            if crc != b"%08x" % crc32c(body):
                return None
            record, _, array = body.partition(b"\n")
            return VideoRecord.model_validate_json(record), np.load(io.BytesIO(array))
        except (OSError, ValueError, ValidationError):
            return None

    def drop(self, keys: Iterable[str]) -> None:
        """Forget videos, whose shard is committed."""
        for key in filter(None, keys):
            with suppress(OSError):
                (self._folder / key).unlink()


def _sweep(base: Path) -> None:
    """Remove what nobody has taken for a week: of shards that another node has finished, or nobody."""
    for folder in base.iterdir():
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _KEEP_S:
                    path.unlink()
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _KEEP_S:
                folder.rmdir()
