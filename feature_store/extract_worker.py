"""One shard's videos → features → commit: what a single extraction worker does (in a Ray actor, see extract.py).

A broken video becomes a record with its reason and the shard goes on. What a worker is doing stands in its note.
"""

# pyright: reportUnknownMemberType=false
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from feature_store.commit import read_commit
from feature_store.config import ExtractConfig
from feature_store.decode import DecodeError, SecondsReader
from feature_store.encode import clip_encoder, features_from_file
from feature_store.layout import open_store
from feature_store.notes import Note, Notes, Tally
from feature_store.plan import PlannedVideo, ShardTask
from feature_store.records import VideoRecord
from feature_store.s3d import S3D
from feature_store.storage import Root
from feature_store.writer import ShardAttempt, shard_done
from vlm_dist.errors import ExtractionError

ATTEMPTS = 2  # a video that was in work when this many workers died is given up


class Blame(NamedTuple):
    """A video that was in work when a worker died: how often, and the reason to record once it is given up."""

    deaths: int
    reason: str
    message: str


_NO_BLAME = Blame(0, "", "")


class _NoRoom(Exception):
    """A video does not fit into what is left of its shard."""


class ShardWorker:
    """Holds the encoder and extracts one shard after another."""

    def __init__(self, root: Root, cfg: ExtractConfig, weights: Mapping[str, np.ndarray], threads: int) -> None:
        torch.set_num_threads(threads)
        self.meta = open_store(root)
        self.notes = Notes(root)
        self.cfg = cfg
        model = S3D()
        model.load_state_dict({key: torch.tensor(value) for key, value in weights.items()})
        self.encoder = clip_encoder(model, cfg, "cuda" if cfg.gpus_per_worker > 0 else "cpu")
        self._warm_up()

    @torch.inference_mode()
    def _warm_up(self) -> None:
        # An encoder that does not run here must stop the work, instead of failing every video on its own.
        size, fps = self.cfg.decode.size, self.cfg.decode.fps
        out = self.encoder(torch.zeros(1, fps, size, size, 3, dtype=torch.uint8, device=self.encoder.device))
        if not out.isfinite().all():
            raise ExtractionError(
                "the encoder gives no finite numbers even for a black picture: its weights are damaged"
            )

    def extract(self, task: ShardTask, blames: Mapping[str, Blame]) -> Tally:
        """Extract and commit one shard; of a shard that is committed already, only the tally.

        Args:
            task: The shard's videos.
            blames: Videos that took workers down before.

        Raises:
            StoreError: the disk is full, or the store is damaged.
        """
        if shard_done(self.meta.root, task.shard):  # by a worker that died, or was thought dead, before it could tell
            return self._committed(task.shard)
        tally = Tally()
        with ShardAttempt(self.meta.root, task.shard) as attempt:
            for video in task.videos:
                blame = blames.get(video.video_id, _NO_BLAME)
                if blame.deaths >= ATTEMPTS:
                    record, features = _given_up(video, blame), None
                else:
                    note = Note(video.video_id, tally)
                    self.notes.write(task.shard, note)
                    alive = partial(self.notes.beat, task.shard, note)
                    record, features = self._one(video, blame.deaths, attempt.room(), alive)
                tally = tally.plus_record(attempt.add(record, features))
            self.notes.write(task.shard, Note("", tally))
            won = attempt.commit()
        self.notes.clear(task.shard)
        return tally if won else self._committed(task.shard)

    def _committed(self, shard: int) -> Tally:
        tally = Tally()
        for record in read_commit(self.meta, shard).videos:
            tally = tally.plus_record(record)
        return tally

    def _one(
        self, video: PlannedVideo, deaths: int, room: int, alive: Callable[[], None]
    ) -> tuple[VideoRecord, np.ndarray | None]:
        """A video's record and rows; what does not fit into `room` rows is not encoded to its end."""
        known: dict[str, object] = {"video_id": video.video_id, "path": video.path, "attempts": deaths + 1}
        empty = room == self.meta.rows_per_shard

        def look(reader: SecondsReader) -> None:
            alive()
            # A claim may be wrong: it can put a video off until it is the first of a shard, where the truth counts.
            if math.ceil(reader.decoded_s if empty else max(reader.decoded_s, reader.claimed_s)) > room:
                known.update(decoded_s=reader.decoded_s, claimed_s=reader.claimed_s)
                raise _NoRoom

        try:
            got = features_from_file(video.path, self.encoder, self.cfg, look)
        except _NoRoom:
            if empty:
                return _failed(known, "too_long", f"{video.path}: a shard of this store holds {room} seconds"), None
            return VideoRecord.model_validate({**known, "status": "overflow"}), None
        except DecodeError as error:
            known |= {"decoded_s": error.decoded_s, "claimed_s": error.claimed_s}
            return _failed(known, error.reason, str(error)), None
        except ExtractionError as error:
            return _failed(known, error.reason, str(error)), None
        known |= {"decoded_s": got.decoded_s, "claimed_s": got.claimed_s, "seconds": got.seconds}
        return VideoRecord.model_validate(known), got.features


def _failed(known: Mapping[str, object], reason: str, message: str) -> VideoRecord:
    return VideoRecord.model_validate({**known, "status": "failed", "reason": reason, "message": message})


def _given_up(video: PlannedVideo, blame: Blame) -> VideoRecord:
    known = {"video_id": video.video_id, "path": video.path, "attempts": blame.deaths}
    return _failed(known, blame.reason, f"{video.path}: {blame.message}")
