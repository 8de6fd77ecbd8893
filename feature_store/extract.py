"""A corpus of videos → a feature store, on every CPU or GPU of a Ray cluster (videos → features).

The driver plans shards and hands each to an idle actor; features go from actor to disk and never through the driver.
A worker that dies is replaced and its shard tried again; the store's commits make every shard count exactly once, so
the same command can be killed and run again at any moment.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from feature_store.at_work import at_work
from feature_store.config import ExtractConfig
from feature_store.encoder import prepare_encoder
from feature_store.extract_worker import ATTEMPTS, Blame, ShardWorker
from feature_store.layout import open_store
from feature_store.notes import Notes, Tally
from feature_store.plan import PlannedVideo, ShardTask, plan_videos
from feature_store.snapshot import finalise
from feature_store.storage import Root
from vlm_dist.errors import ConfigError, ExtractionError

_POLL_S = 0.5
_HANG_GRACE_S = 60.0  # beyond a video's own time limit, which the decoder checks after every frame
_SHARD_DEATHS = 3  # deaths between videos (loading, committing) after which the work stops


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
        return self.tally.seconds / max(self.elapsed_s, 1e-9)

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
    on_progress: Callable[[ExtractProgress], None] = lambda progress: None,
    on_calibration: Callable[[], None] = lambda: None,
) -> ExtractSummary:
    """Extract videos into a store, made or continued; the caller has called `ray.init`.

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
        on_progress: Called about twice a second.
        on_calibration: Called before random weights are fitted, if they are.

    Raises:
        ConfigError: no weights, or more workers than the cluster has room for.
        StoreError: a store of another extractor, a damaged store, a full disk.
        ExtractionError: wrong weights, or workers that keep dying outside of any video.
    """
    start = time.monotonic()
    workers = _num_workers(cfg)
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
        state = ray.put(encoder.state())
        run = _Run(store, cfg, workers, state, start, on_progress)
        given: Sequence[PlannedVideo] = videos
        while tasks := plan_videos(store, given, workers, retry_failed):
            run.work(tasks)
            finalise(store)
            given, retry_failed = (), False  # only what overflowed its shard is left to plan
        return ExtractSummary(
            listed=len(videos),
            tally=run.tally,
            shards=run.shards_done,
            workers=workers,
            worker_deaths=run.deaths,
            elapsed_s=time.monotonic() - start,
            snapshot=finalise(store),
        )


def _num_workers(cfg: ExtractConfig) -> int:
    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 0)), resources.get("GPU", 0.0)
    room = min(cpus, int(gpus / cfg.gpus_per_worker)) if cfg.gpus_per_worker > 0 else cpus
    wanted = cfg.workers or max(1, room)
    if wanted > room:
        each = f"1 CPU and {cfg.gpus_per_worker:g} GPU" if cfg.gpus_per_worker > 0 else "1 CPU"
        advice = f"use --workers {room}" if room else "extract on CPUs (--set extract.gpus_per_worker=0)"
        raise ConfigError(
            f"{wanted} extraction workers of {each} each do not fit: Ray has {cpus} CPUs and {gpus:g} GPUs; {advice}"
        )
    return wanted


@dataclass
class _Run:
    """The pull queue: shards wait, actors work, the dead are replaced."""

    store: Root
    cfg: ExtractConfig
    workers: int
    state: Any
    start: float
    on_progress: Callable[[ExtractProgress], None]
    tally: Tally = field(default_factory=Tally)
    shards_done: int = 0
    shards: int = 0
    videos: int = 0
    deaths: int = 0
    blames: dict[str, Blame] = field(default_factory=dict[str, Blame])

    def __post_init__(self) -> None:
        self.notes = Notes(self.store)

    def work(self, tasks: Sequence[ShardTask]) -> None:
        """Run the tasks to their end, on as many actors as there are workers."""
        self.shards += len(tasks)
        self.videos += sum(len(task.videos) for task in tasks)
        queue, lost = deque(tasks), Counter[int]()
        count = min(self.workers, len(tasks))
        idle = [self._actor(count) for _ in range(count)]
        running: dict[Any, tuple[Any, ShardTask]] = {}
        watch = _Watch(self.notes, self.cfg.decode.timeout_s + _HANG_GRACE_S)
        self.notes.clear_all([task.shard for task in tasks])
        try:
            while queue or running:
                while queue and idle:
                    actor, task = idle.pop(), queue.popleft()
                    blames = {v.video_id: self.blames[v.video_id] for v in task.videos if v.video_id in self.blames}
                    running[actor.extract.remote(task, blames)] = actor, task
                ready, _ = ray.wait(list(running), num_returns=len(running), timeout=_POLL_S)
                for ref in ready:
                    actor, task = running.pop(ref)
                    try:
                        self.tally = self.tally.plus(ray.get(ref))
                        self.shards_done += 1
                    except RayTaskError as error:
                        raise error.cause from None
                    except RayActorError as error:
                        ray.kill(actor)
                        actor = self._actor(count)
                        queue.appendleft(task)
                        self._blame(task.shard, lost, watch.is_hung(task.shard), error)
                    idle.append(actor)
                    watch.forget(task.shard)
                for actor, task in running.values():
                    if watch.is_hung(task.shard):
                        ray.kill(actor)
                self._report([task for _, task in running.values()])
        finally:
            for actor in [*idle, *(actor for actor, _ in running.values())]:
                ray.kill(actor)

    def _actor(self, count: int) -> Any:
        # On one machine the workers share all its cores; over several, a worker of one core fits everywhere.
        cpus = int(ray.cluster_resources().get("CPU", 1)) // count if len(ray.nodes()) == 1 else 1
        cpus = max(1, cpus)
        worker: Any = ray.remote(num_cpus=cpus, num_gpus=self.cfg.gpus_per_worker)(ShardWorker)
        return worker.remote(self.store, self.cfg, self.state, cpus)

    def _blame(self, shard: int, lost: Counter[int], hung: bool, error: Exception) -> None:
        """Note which video a dead worker was at; a shard whose workers die outside of any video stops the run."""
        self.deaths += 1
        note = self.notes.read(shard, fresh=True)
        self.notes.clear(shard)  # else the next worker's death while loading is blamed on it
        deaths = self.blames[note.video_id].deaths if note and note.video_id in self.blames else 0
        if note and note.video_id and deaths < ATTEMPTS:
            deaths = ATTEMPTS if hung else deaths + 1
            message = "the decoder hung" if hung else f"the worker died {deaths} times while it was at this video"
            self.blames[note.video_id] = Blame(deaths, "timeout" if hung else "decoder_crash", message)
            return
        lost[shard] += 1
        if lost[shard] >= _SHARD_DEATHS:
            raise ExtractionError(f"shard {shard}: its worker died {lost[shard]} times outside of any video: {error}")

    def _report(self, working: Sequence[ShardTask]) -> None:
        tally = self.tally
        for task in working:
            if note := self.notes.read(task.shard):
                tally = tally.plus(note.tally)
        elapsed = time.monotonic() - self.start
        self.on_progress(ExtractProgress(self.videos, tally, self.shards, self.shards_done, elapsed, self.deaths))


class _Watch:
    """Finds workers that have shown no sign of life within a video for longer than decoding may take."""

    def __init__(self, notes: Notes, limit_s: float) -> None:
        self.notes, self.limit_s = notes, limit_s
        self.since: dict[int, tuple[float, float]] = {}

    def is_hung(self, shard: int) -> bool:
        """Whether the shard's note names a video and has not been renewed for longer than the limit."""
        note, now = self.notes.read(shard), time.monotonic()
        beat = note.beat if note else 0.0
        before, since = self.since.get(shard, (-1.0, now))
        if beat != before:
            self.since[shard] = beat, now
            return False
        return note is not None and note.video_id != "" and now - since > self.limit_s

    def forget(self, shard: int) -> None:
        """Start anew with the shard's next attempt."""
        self.since.pop(shard, None)
