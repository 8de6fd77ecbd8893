"""One shard's videos → features → commit: what a single extraction worker does (in a Ray actor, see dispatch.py).

Some videos are in work at once, each in a thread that decodes (in another process) and encodes (together with the
others). A broken video becomes a record with its reason and the shard goes on.
"""

# pyright: reportUnknownMemberType=false
import math
import os
import queue
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any

import numpy as np
import ray
import torch

from feature_store.chunks import Chunk
from feature_store.commit import read_commit
from feature_store.config import ExtractConfig
from feature_store.decode import DecodeError
from feature_store.decode_pool import HANG_GRACE_S, DecodePool, DecoderLostError, NoDecoderError
from feature_store.encode import ClipEncoder, clip_encoder, features_from_file
from feature_store.graphed_encoder import GraphedEncoder
from feature_store.layout import open_store
from feature_store.plan import PlannedVideo, ShardTask
from feature_store.records import VideoRecord
from feature_store.s3d import S3D
from feature_store.shared_encoder import SharedEncoder
from feature_store.spool import Spool
from feature_store.storage import Root
from feature_store.tally import Sign, Tally, Work, tally_of
from feature_store.writer import ShardAttempt, shard_done
from vlm_dist.errors import ExtractionError

ATTEMPTS = 5  # a video at which this many decoders died is given up; a stray kill must not cost a video
_SIGN_S = 3.0  # between signs of life

_Outcome = tuple[VideoRecord, np.ndarray | None]


class _NoRoom(Exception):
    """A video does not fit into what is left of its shard."""


class _Stopped(Exception):
    """The shard's attempt is over, for another reason than this video."""


class ShardWorker:
    """Holds the encoder and extracts shards; the next begins while the last videos of others are in work.

    Args:
        root: The store.
        cfg: Decoding, layer, precision, batch.
        weights: S3D's, as arrays.
        threads: Cores of the network.
        decoders: Processes that decode; 0 decodes in this one.
        chunk_seconds: Seconds of video that pass from a decoder to the encoder at a time; 0: `cfg.chunk`.
    """

    def __init__(
        self,
        root: Root,
        cfg: ExtractConfig,
        weights: Mapping[str, np.ndarray],
        threads: int,
        decoders: int = 0,
        chunk_seconds: int = 0,
    ) -> None:
        torch.set_num_threads(threads)
        if cfg.deterministic:
            torch.backends.cudnn.deterministic = True
        # Chunks of another process are views of Ray's shared memory, and nothing here writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self.meta = open_store(root)
        self.cfg = cfg
        model = S3D()
        model.load_state_dict({key: torch.tensor(value) for key, value in weights.items()})
        many = decoders > 0 and cfg.gpus_per_worker > 0  # clips: preparing for them takes half a minute
        network = clip_encoder(model, cfg, compiled=many and cfg.compile and not cfg.deterministic)
        self.encoder: ClipEncoder = GraphedEncoder(network, cfg.decode, cfg.batch) if many else network
        # On a CPU joint batches gain nothing, and without them a video's features do not depend on its neighbours.
        join = cfg.gpus_per_worker > 0 and not cfg.deterministic
        self._shared = SharedEncoder(self.encoder, cfg.batch, join)
        self._pool = DecodePool(decoders, cfg.decode, chunk_seconds or cfg.chunk) if decoders else None
        self._patience_s = cfg.decode.timeout_s + HANG_GRACE_S
        self._spool = Spool(self.meta, cfg)
        # The videos in work at once are the worker's, whichever shards they are of: a shard's begin in the order given.
        self._threads = ThreadPoolExecutor(self._pool.size if self._pool else 1, thread_name_prefix="video")

    @torch.inference_mode()
    def ready(self) -> None:
        """Encode a black picture: an encoder that does not run here must stop the work, not fail every video.

        Raises:
            ExtractionError: it gives no finite numbers.
        """
        size, fps = self.cfg.decode.size, self.cfg.decode.fps
        out = self.encoder(
            torch.zeros(min(2, self.cfg.batch), fps, size, size, 3, dtype=torch.uint8, device=self.encoder.device)
        )
        if not out.isfinite().all():
            raise ExtractionError(
                "the encoder gives no finite numbers even for a black picture: its weights are damaged"
            )
        self._shared.start_clock()

    def extract(
        self, task: ShardTask, careful: bool = False, given_up: Mapping[str, str] = MappingProxyType({})
    ) -> Iterator[Sign]:
        """Extract and commit one shard; of a shard that is committed already, only the tally.

        Several threads may each be at a shard; the videos of the later one begin when all of the earlier one have.

        Args:
            task: The shard's videos.
            careful: One video at a time, each told before it begins: one of them may be the end of this process.
            given_up: Why videos are not to be tried any more, by id.

        Yields:
            Signs of life, every few seconds; the last one once the shard is committed.

        Raises:
            StoreError: the disk is full, or the store is damaged.
        """
        if shard_done(self.meta.root, task.shard):  # by a worker that died, or was thought dead, before it could tell
            yield self._sign(self._committed(task.shard))
            return
        with ShardAttempt(self.meta.root, task.shard) as attempt:
            rows = _InOrder(attempt)
            if careful:
                yield from self._one_by_one(task, rows, given_up)
            else:
                yield from self._videos(task, self._order(task), rows, given_up)
            won = attempt.commit()
        self._spool.drop(rows.spooled)
        yield self._sign(rows.tally if won else self._committed(task.shard))

    def _sign(self, tally: Tally) -> Sign:
        shared = self._shared
        return Sign(tally, Work(shared.encoded, shared.waiting_s, shared.working_s))

    def close(self) -> None:
        """End its threads; extracts no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._shared.close()

    def _committed(self, shard: int) -> Tally:
        return tally_of(read_commit(self.meta, shard).videos)

    def _order(self, task: ShardTask) -> Sequence[int]:
        # One that then finds no room was encoded in vain: that pays only where the network waits for decoders.
        return largest_first(task) if self.cfg.gpus_per_worker > 0 else range(len(task.videos))

    def _one_by_one(self, task: ShardTask, rows: "_InOrder", given_up: Mapping[str, str]) -> Iterator[Sign]:
        for place, video in enumerate(task.videos):
            alone = "" if video.video_id in given_up else video.video_id
            yield self._sign(rows.tally)._replace(alone=alone)
            for sign in self._videos(task, (place,), rows, given_up):
                yield sign._replace(alone=alone)
        yield self._sign(rows.tally)  # if it dies while it commits, no video is to blame

    def _videos(
        self, task: ShardTask, places: Sequence[int], rows: "_InOrder", given_up: Mapping[str, str]
    ) -> Iterator[Sign]:
        """Some of the shard's videos, several at a time; the first error that is not a video's own ends it."""
        events: queue.SimpleQueue[Future[None] | None] = queue.SimpleQueue()
        rows.waiting = len(places)

        def video(place: int) -> None:
            with rows.in_work():
                if not rows.waiting:  # perhaps told by two, who began at once
                    events.put(None)
                self._video(place, task.videos[place], rows, given_up)

        futures = [self._threads.submit(video, place) for place in places]
        for future in futures:
            future.add_done_callback(events.put)
        left, all_begun, signed = len(places), False, time.monotonic()
        try:
            while left:
                due = False
                with suppress(queue.Empty):
                    if done := events.get(timeout=_SIGN_S):
                        left -= 1
                        done.result()
                    else:
                        due = all_begun = True
                now = time.monotonic()
                # Who hears nothing for long ends this process: a video may wait for a disk that does not answer.
                if due or (now - signed >= _SIGN_S and not rows.stuck(now, self._patience_s)):
                    signed = now
                    yield self._sign(rows.tally)._replace(all_begun=all_begun)
        except BaseException:  # also where nobody listens any more
            rows.stopped.set()
            for future in futures:
                future.cancel()
            wait(futures)
            raise

    def _video(self, place: int, video: PlannedVideo, rows: "_InOrder", given_up: Mapping[str, str]) -> None:
        if (why := given_up.get(video.video_id)) is not None:
            known = {"video_id": video.video_id, "path": video.path}
            rows.put(place, *_failed(known, "worker_crash", why))
            return
        key = self._spool.key(video)
        outcome: _Outcome | None = self._spool.get(key)
        if outcome is None:
            outcome = record, features = self._tried(video, rows)
            if features is not None:
                self._spool.put(key, record, features)
        rows.put(place, *outcome, key)

    def _tried(self, video: PlannedVideo, rows: "_InOrder") -> _Outcome:
        known: dict[str, Any] = {"video_id": video.video_id, "path": video.path}
        for attempt in range(1, ATTEMPTS + 1):
            known["attempts"] = attempt
            try:
                return self._one(video, known, rows)
            except DecoderLostError:
                rows.stopped.wait(attempt)  # the node may be short of memory for a moment
        return _failed(known, "decoder_crash", f"{video.path}: its decoder died {ATTEMPTS} times")

    def _one(self, video: PlannedVideo, known: dict[str, Any], rows: "_InOrder") -> _Outcome:
        """A video's record and rows; what does not fit into what is left of its shard is not encoded to its end."""

        def look(chunk: Chunk) -> None:
            if rows.stopped.is_set():
                raise _Stopped
            rows.moved = time.monotonic()
            known.update(decoded_s=chunk.decoded_s, claimed_s=chunk.claimed_s)
            if not rows.may_fit(chunk.decoded_s, chunk.claimed_s):
                raise _NoRoom

        try:
            got = features_from_file(video.path, self._shared, self.cfg, look, self._pool and self._pool.read)
        except _NoRoom:
            if math.ceil(known["decoded_s"]) > (most := self.meta.rows_per_shard):
                return _failed(known, "too_long", f"{video.path}: a shard of this store holds {most} seconds")
            return VideoRecord.model_validate({**known, "status": "overflow"}), None
        except DecodeError as error:
            known |= {"decoded_s": error.decoded_s, "claimed_s": error.claimed_s}
            return _failed(known, error.reason, str(error))
        except NoDecoderError:
            raise
        except ExtractionError as error:
            return _failed(known, error.reason, str(error))
        known |= {"decoded_s": got.decoded_s, "claimed_s": got.claimed_s, "seconds": got.seconds}
        return VideoRecord.model_validate(known), got.features


class RemoteShardWorker:
    """A ShardWorker as an actor: it is made by `ready`, because what fails in a constructor reaches nobody as it is."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._made = lambda: ShardWorker(*args, **settings)

    def node(self) -> str:
        """The Ray node that it runs on."""
        return ray.get_runtime_context().get_node_id()

    def ready(self) -> None:
        """See `ShardWorker`, which also raises what is wrong with the settings."""
        self._worker = self._made()
        self._worker.ready()

    def extract(self, task: ShardTask, careful: bool, given_up: Mapping[str, str]) -> Iterator[Sign]:
        """See `ShardWorker.extract`."""
        yield from self._worker.extract(task, careful, given_up)


class _InOrder:
    """Stages videos in the plan's order, whichever is finished first, so that a shard's rows do not depend on timing.

    Attributes:
        tally: What became of the staged videos.
        spooled: Keys, in the spool, of those that got rows.
        stopped: Set when the attempt is over.
        moved: When a video was last seen to begin or come on, by the monotonic clock.
        waiting: Videos that are not begun yet.
    """

    def __init__(self, attempt: ShardAttempt) -> None:
        self.tally = Tally()
        self.spooled: list[str] = []
        self.stopped = threading.Event()
        self.moved = time.monotonic()
        self.waiting = self._in_work = 0
        self._attempt, self._most = attempt, attempt.room()
        self._lock = threading.Lock()
        self._finished: dict[int, tuple[VideoRecord, np.ndarray | None, str]] = {}
        self._next = 0

    @contextmanager
    def in_work(self) -> Generator[None]:
        """While the block runs, one video more is in work and one less waits."""
        with self._lock:
            self.waiting -= 1
            self._in_work += 1
            self.moved = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._in_work -= 1

    def stuck(self, now: float, patience_s: float) -> bool:
        """True where videos are in work and none of them has come on for long; they may wait for another shard's."""
        return self._in_work > 0 and now - self.moved > patience_s

    def may_fit(self, decoded_s: float, claimed_s: float) -> bool:
        """False once it is certain that a video of which so much is decoded will find no room at its turn."""
        with self._lock:
            room = self._attempt.room()
        # A claim may be wrong: it can put a video off until it is the first of a shard, where the truth counts.
        return math.ceil(decoded_s if room == self._most else max(decoded_s, claimed_s)) <= room

    def put(self, place: int, record: VideoRecord, features: np.ndarray | None, key: str = "") -> None:
        """Take the outcome of the shard's video number `place`; raises StoreError where it cannot be written."""
        self.moved = time.monotonic()
        with self._lock:
            self._finished[place] = record, features, key
            while (outcome := self._finished.get(self._next)) is not None:
                self._stage(*outcome)
                del self._finished[self._next]
                self._next += 1

    def _stage(self, record: VideoRecord, features: np.ndarray | None, key: str) -> None:
        room = self._attempt.room()
        # As `may_fit` would have said, had it been asked at this video's turn.
        needed = record.claimed_s if features is not None else max(record.decoded_s, record.claimed_s)
        if room < self._most and math.ceil(needed) > room:
            record, features = record.model_copy(update={"status": "overflow", "reason": "", "message": ""}), None
        added = self._attempt.add(record, features)
        self.tally = self.tally.plus_record(added)
        if added.status == "ok":
            self.spooled.append(key)


def largest_first(task: ShardTask) -> list[int]:
    """Places of the shard's videos, large files first: at its end, decoders then wait for none that is long."""
    sizes = [_size(video.path) for video in task.videos]
    return sorted(range(len(sizes)), key=lambda k: -sizes[k])


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # in a bucket, or not there
        return 0


def _failed(known: Mapping[str, Any], reason: str, message: str) -> _Outcome:
    return VideoRecord.model_validate({**known, "status": "failed", "reason": reason, "message": message}), None
