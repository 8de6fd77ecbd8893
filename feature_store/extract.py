"""A corpus of videos → a feature store, on every CPU or GPU of a Ray cluster, or in this process (videos → features).

The driver plans shards and hands each to a worker that has decoders free; features go from worker to disk and never
through the driver. The store's commits make every shard count exactly once, so the same command can be killed and run
again at any moment.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from feature_store.at_work import at_work
from feature_store.config import ExtractConfig
from feature_store.dispatch import SHARDS_AT_ONCE, Dispatch
from feature_store.encoder import prepare_encoder
from feature_store.extract_worker import RemoteShardWorker, ShardWorker
from feature_store.layout import open_store
from feature_store.plan import PlannedVideo, ShardTask, plan_videos
from feature_store.snapshot import finalise
from feature_store.storage import Root
from feature_store.tally import Tally, Work
from feature_store.worker_share import WorkerShare, alive_nodes, worker_share, workers_on


@dataclass(frozen=True)
class ExtractProgress:
    """How far an extraction is; rates are over the whole run."""

    videos: int
    """Videos of this run."""
    tally: Tally
    shards: int
    shards_done: int
    elapsed_s: float
    worker_deaths: int
    waiting: float
    """Share of their time in which the encoders waited for decoding."""
    encoded_s: int
    """Seconds of video that went through the network, also of videos that are not finished."""
    workers: int
    """Workers that are there and through with their start."""

    @property
    def done(self) -> int:
        """Videos that are through, failed ones counted."""
        return self.tally.ok + self.tally.failed

    @property
    def videos_per_s(self) -> float:
        """Videos a second."""
        return self.done / max(self.elapsed_s, 1e-9)

    @property
    def video_seconds_per_s(self) -> float:
        """Seconds of video a second."""
        return self.encoded_s / max(self.elapsed_s, 1e-9)

    @property
    def eta_s(self) -> float | None:
        """Seconds to go at this rate; None before the first video is through."""
        return (self.videos - self.done) / self.videos_per_s if self.done else None


@dataclass(frozen=True)
class ExtractSummary:
    """What one call of `extract_corpus` did."""

    listed: int
    """Videos that were asked for."""
    tally: Tally
    shards: int
    workers: int
    worker_deaths: int
    elapsed_s: float
    waiting: float
    """Share of their time in which the encoders waited for decoding."""
    snapshot: str
    """Name of the store's snapshot afterwards."""

    @property
    def nothing_to_do(self) -> bool:
        """All listed videos were in the store before."""
        return self.shards == 0


def extract_corpus(
    store: Root,
    videos: Sequence[PlannedVideo],
    cfg: ExtractConfig,
    *,
    random_seed: int | None = None,
    weights: Path | None = None,
    rows_per_shard: int = 0,
    retry_failed: bool = False,
    here: bool = False,
    on_progress: Callable[[ExtractProgress], None] = lambda progress: None,
    on_calibration: Callable[[], None] = lambda: None,
) -> ExtractSummary:
    """Extract videos into a store, made or continued; the caller has called `ray.init`, unless it is done `here`.

    Broken videos are recorded with their reason. Committed shards are never redone: after an interruption, the same
    call does the rest; after the end it does nothing.

    Args:
        store: A folder on a file system that every worker sees, or s3://bucket/prefix.
        videos: What to extract; known ids are passed over.
        cfg: Decoding, layer, batch, workers.
        random_seed: Use random weights of this seed, fitted to a sample of the corpus and kept in the store.
        weights: The S3D weights file; exactly one of weights and random_seed is given.
        rows_per_shard: See `create_store`.
        retry_failed: Try the store's failed videos again.
        here: Extract in this process, without Ray: for a few videos.
        on_progress: Called about twice a second; `here`, every few seconds.
        on_calibration: Called before random weights are fitted, if they are.

    Raises:
        ConfigError: no weights, or more workers than the cluster has room for.
        StoreError: a store of another extractor, a damaged store, a full disk.
        ExtractionError: wrong weights, or workers that keep dying without coming any further.
    """
    start = time.monotonic()
    share = None if here else worker_share(cfg, alive_nodes())
    encoder = prepare_encoder(
        store,
        videos,
        cfg,
        random_seed=random_seed,
        weights=weights,
        rows_per_shard=rows_per_shard,
        on_calibration=on_calibration,
    )
    with at_work(open_store(store), "extract"):
        finalise(store)  # publishes what an interrupted run had committed
        run = _Here(store, cfg, encoder.state()) if share is None else _OnRay(store, cfg, share, encoder.state())
        run.on_progress = lambda: on_progress(run.progress(time.monotonic() - start))
        try:
            while tasks := plan_videos(store, videos, share.workers if share else 1, retry_failed):
                run.work(tasks)
                finalise(store)
                retry_failed = False  # only what overflowed its shard is left to plan
        finally:
            run.close()
        progress = run.progress(time.monotonic() - start)
        return ExtractSummary(
            listed=len(videos),
            tally=progress.tally,
            shards=progress.shards_done,
            workers=run.workers,
            worker_deaths=progress.worker_deaths,
            elapsed_s=progress.elapsed_s,
            waiting=progress.waiting,
            snapshot=finalise(store),
        )


class _OnRay:
    """Shards in work on the workers of a cluster."""

    on_progress: Callable[[], None]

    def __init__(self, store: Root, cfg: ExtractConfig, share: WorkerShare, state: dict[str, Any]) -> None:
        actor: Any = ray.remote(num_cpus=share.cpus, num_gpus=cfg.gpus_per_worker)(RemoteShardWorker)
        weights = ray.put(state)
        start = partial(
            actor.options(max_concurrency=SHARDS_AT_ONCE).remote, store, cfg, weights, share.threads,
            decoders=share.decoders, chunk_seconds=share.chunk_seconds,
        )  # fmt: skip

        def room() -> int:
            here = sum(workers_on(node, cfg) for node in alive_nodes())
            return min(cfg.workers, here) if cfg.workers else here

        self._dispatch = Dispatch(start, room, lambda dispatch: self.on_progress())

    @property
    def workers(self) -> int:
        return self._dispatch.most_workers

    def work(self, tasks: Sequence[ShardTask]) -> None:
        self._dispatch.run(tasks)

    def close(self) -> None:
        self._dispatch.close()

    def progress(self, elapsed_s: float) -> ExtractProgress:
        it = self._dispatch
        return _progress(
            it.tally, it.work, it.videos, it.shards, it.shards_done, elapsed_s, it.deaths, it.ready_workers
        )


class _Here:
    """Shards in work in this process, one after another."""

    on_progress: Callable[[], None]
    workers = 1

    def __init__(self, store: Root, cfg: ExtractConfig, state: dict[str, Any]) -> None:
        import torch

        self._worker = ShardWorker(store, cfg, state, 1 if cfg.deterministic else torch.get_num_threads())
        self._worker.ready()
        self._tally, self._work = Tally(), Work()
        self._videos = self._shards = self._shards_done = 0

    def work(self, tasks: Sequence[ShardTask]) -> None:
        self._videos += sum(len(task.videos) for task in tasks)
        self._shards += len(tasks)
        for task in tasks:
            before = self._tally
            for sign in self._worker.extract(task):
                self._tally, self._work = before.plus(sign.tally), sign.work
                self.on_progress()
            self._shards_done += 1
        self.on_progress()

    def close(self) -> None:
        self._worker.close()

    def progress(self, elapsed_s: float) -> ExtractProgress:
        return _progress(self._tally, self._work, self._videos, self._shards, self._shards_done, elapsed_s, 0, 1)


def _progress(
    tally: Tally, work: Work, videos: int, shards: int, shards_done: int, elapsed_s: float, deaths: int, workers: int
) -> ExtractProgress:
    waiting = work.waiting_s / max(work.waiting_s + work.working_s, 1e-9)
    once = videos - tally.reasons.get("overflow", 0)  # they are in two shards
    return ExtractProgress(once, tally, shards, shards_done, elapsed_s, deaths, waiting, work.encoded_s, workers)
