"""How extraction grows: with a second worker, with many decoders, and to 1.1 million videos: three tables.

    python benchmarks/extract_scale.py [--videos 1100000] [--small] [--json FILE]

The first part extracts rendered videos on a Ray of one core and on one of two. The second gives one real worker 15 and
156 decoders that only take their time, a thousandth of a video's length, and compares one shard in work at a time with
as many as the dispatcher gives. The third plans, hands out and commits
every shard of a corpus whose videos have the lengths of HowTo100M's (390 s on average) and rows one number wide: real
plan, actors, streams of signs, commits with fsync, and the index at the end; only decoding and the network are left
out. It says what the driver costs and whether its memory stays flat. Fifteen minutes on two cores, 2 GB of disk.
"""

import argparse
import json
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import ray
import torch
from extract_bench.video import render

from feature_store import dispatch
from feature_store.chunks import Chunk
from feature_store.config import DecodeConfig, ExtractConfig
from feature_store.dispatch import SHARDS_AT_ONCE, Dispatch
from feature_store.extract import extract_corpus
from feature_store.extract_worker import RemoteShardWorker, ShardWorker
from feature_store.layout import create_store
from feature_store.manifest import list_inputs
from feature_store.plan import PlannedVideo, ShardTask, plan_videos
from feature_store.records import Provenance, VideoRecord
from feature_store.s3d import S3D
from feature_store.shared_encoder import SharedEncoder
from feature_store.snapshot import finalise
from feature_store.tally import Sign, Tally
from feature_store.writer import ShardAttempt
from store_bench.table import machine

WORKERS = 2
MEAN_S, SPREAD = 390, 0.6  # of a log-normal distribution of lengths


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=1_100_000, help="videos of the simulated corpus")
    parser.add_argument("--small", action="store_true", help="a test run: a few short videos, 20,000 simulated ones")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="extract-scale-") as name:
        folder = Path(name)
        growth = scaling(folder, *((4, 4) if arguments.small else (16, 8)))
        one, two = (growth[count] for count in ("1", "2"))
        print("| workers | s of video a second | against one | goal |\n|---|---|---|---|")
        print(f"| 1 | {one:.2f} | | |\n| 2 | {two:.2f} | {two / one:.2f} | 1.8 |\n")
        idle = overlap(folder, 3 if arguments.small else 12)
        print("| decoders | shards of a worker at once | wall time, s | decoders idle |\n|---|---|---|---|")
        for decoders, at_once, took_s, share in idle:
            print(f"| {decoders} | {at_once} | {took_s:.1f} | {100 * share:.0f} % |")
        print()
        told = simulated(folder, 20_000 if arguments.small else arguments.videos)
    print("| simulated extraction | |\n|---|---|")
    for what, value in told.items():
        print(f"| {what} | {value} |")
    print(machine())
    if arguments.json:
        arguments.json.write_text(json.dumps({"scaling": growth, "overlap": idle, "simulated": told}))


def scaling(folder: Path, count: int, seconds: int) -> dict[str, float]:
    """Seconds of video a second with one worker of one core, and with two, between the first video and the last."""
    for number in range(count):
        render(folder / "videos" / f"v{number:02}.mp4", seconds, number)
    videos, rates = list_inputs([folder / "videos"]), {}
    for workers in (1, 2):
        seen: list[tuple[float, int]] = []
        _start_ray(workers)
        extract_corpus(
            folder / f"store-{workers}",
            videos,
            ExtractConfig(decode=DecodeConfig(), workers=workers),
            random_seed=0,
            on_progress=lambda state, seen=seen: seen.append((state.elapsed_s, state.tally.seconds)),
        )
        ray.shutdown()
        began = next(pair for pair in seen if pair[1])
        ended = next(pair for pair in seen if pair[1] == seen[-1][1])
        rates[str(workers)] = (ended[1] - began[1]) / (ended[0] - began[0])
    return rates


class SleepingDecoders:
    """Decoders of videos named by their length: a second of frames for each, after a thousandth of its length."""

    def __init__(self, size: int, cfg: DecodeConfig) -> None:
        self.size = size
        self._second = np.zeros((1, cfg.fps, cfg.size, cfg.size, 3), np.uint8)

    def read(self, path: str) -> Generator[Chunk]:
        """Wait, and give the second."""
        time.sleep(float(Path(path).stem) / 1000)
        yield Chunk(self._second, 1.0, 1.0)


class OnesEncoder:
    """Tokens of ones."""

    device = torch.device("cpu")

    def __call__(self, clips: torch.Tensor, /) -> torch.Tensor:
        """(B, 512) of (B, T, H, W, 3)."""
        return torch.ones(len(clips), 512)


class TimedWorker(RemoteShardWorker):
    """A worker whose decoders and network are stand-ins."""

    def __init__(self, store: Path, cfg: ExtractConfig, state: dict[str, np.ndarray], decoders: int) -> None:
        self._store, self._cfg, self._state, self._decoders = store, cfg, state, decoders

    def ready(self) -> None:
        """Make it."""
        it = self._worker = ShardWorker(self._store, self._cfg, self._state, 1)
        it._pool = SleepingDecoders(self._decoders, self._cfg.decode)
        it._shared = SharedEncoder(OnesEncoder(), 8, join=True)
        it._threads = ThreadPoolExecutor(self._decoders)


def overlap(folder: Path, shards: int) -> list[tuple[int, int, float, float]]:
    """(decoders, shards at once, wall time in s, share of the decoders' time that was idle) of one worker."""
    cfg, rng = ExtractConfig(decode=DecodeConfig(fps=2, size=32)), np.random.default_rng(0)
    state = {key: value.numpy() for key, value in S3D().state_dict().items()}
    lengths = rng.lognormal(np.log(MEAN_S) - SPREAD**2 / 2, SPREAD, (shards, 168))
    tasks = [
        ShardTask(k, tuple(PlannedVideo(f"{k}-{n}", f"{one:.6f}.mp4") for n, one in enumerate(row)))
        for k, row in enumerate(lengths)
    ]
    found = []
    _start_ray(1)
    actor = ray.remote(num_cpus=1)(TimedWorker)
    usual = dispatch.SHARDS_AT_ONCE
    for decoders in (15, 156):
        for at_once in (1, usual):
            store = folder / f"overlap-{decoders}-{at_once}"
            create_store(store, Provenance(extractor="none", weights="none", weights_sha256="", feature_dim=512), 256)
            begun: list[float] = []

            def look(it: Dispatch, begun: list[float] = begun) -> None:
                if it.ready_workers and not begun:
                    begun.append(time.monotonic())

            start = partial(actor.options(max_concurrency=usual).remote, store, cfg, state, decoders)
            dispatch.SHARDS_AT_ONCE = at_once
            it = Dispatch(start, lambda: 1, look)
            it.run(tasks)
            took_s = time.monotonic() - begun[0]
            it.close()
            found.append((decoders, at_once, took_s, 1 - float(lengths.sum()) / 1000 / decoders / took_s))
    dispatch.SHARDS_AT_ONCE = usual
    ray.shutdown()
    return found


class SyntheticWorker:
    """Commits shards of random rows, one number wide, of videos with random lengths."""

    def __init__(self, store: Path) -> None:
        self.store = store

    def node(self) -> str:
        """The node."""
        return ray.get_runtime_context().get_node_id()

    def ready(self) -> None:
        """Nothing to prepare."""

    def extract(self, task: ShardTask, careful: bool, given_up: Mapping[str, str]) -> Iterator[Sign]:
        """Commit the shard; a video in a hundred is broken."""
        rng = np.random.default_rng(task.shard)
        tally = Tally()
        with ShardAttempt(self.store, task.shard) as attempt:
            for video in task.videos:
                seconds = max(1, int(rng.lognormal(np.log(MEAN_S) - SPREAD**2 / 2, SPREAD)))
                rows = rng.random((seconds, 1), np.float32).astype(np.float16) + np.float16(0.01)
                known = {"video_id": video.video_id, "path": video.path, "decoded_s": seconds, "claimed_s": seconds}
                if rng.random() < 0.01:
                    record = VideoRecord(**known, status="failed", reason="corrupt", message="simulated")
                    tally = tally.plus_record(attempt.add(record, None))
                else:
                    tally = tally.plus_record(attempt.add(VideoRecord(**known), rows))
            attempt.commit()
        yield Sign(tally)


def simulated(folder: Path, count: int) -> dict[str, str]:
    """Extract a corpus of `count` videos without decoding."""
    store, process = folder / "simulated", psutil.Process()
    create_store(store, Provenance(extractor="simulated", weights="none", weights_sha256="", feature_dim=1), 65_536)
    _start_ray(WORKERS)
    began = time.monotonic()
    videos = [PlannedVideo(f"video-{number:07}", f"/videos/{number:07}.mp4") for number in range(count)]
    tasks = plan_videos(store, videos, WORKERS)
    planned = time.monotonic() - began
    del videos
    memory: list[tuple[int, float]] = []

    def look(it: Dispatch) -> None:
        memory.append((it.shards_done, process.memory_info().rss / 2**20))
        if len(memory) % 60 == 0:
            print(f"{it.shards_done} of {it.shards} shards", file=sys.stderr)

    actor = ray.remote(num_cpus=1, max_concurrency=SHARDS_AT_ONCE)(SyntheticWorker)
    it = Dispatch(lambda: actor.remote(store), lambda: WORKERS, look)
    cpu, began, rounds = time.process_time(), time.monotonic(), 0
    finalising = handed = 0.0
    while tasks:
        it.run(tasks)
        rounds += 1
        if rounds == 1:
            ran, driver = time.monotonic() - began, time.process_time() - cpu
            handed = process.memory_info().rss / 2**20
            shards, first = it.shards_done, time.monotonic()
            finalise(store)
            finalising = time.monotonic() - first
        tasks = plan_videos(store, (), WORKERS)
    it.close()
    finalise(store)
    ray.shutdown()
    tenth = next(rss for done, rss in memory if done >= shards // 10)
    return {
        "videos": f"{count:,} in {shards:,} shards (and {it.shards_done - shards:,} of what overflowed)",
        "planning": f"{planned:.1f} s",
        "handing out, with commits": f"{ran:.0f} s, {1000 * ran / shards:.0f} ms a shard",
        "driver": f"{1000 * driver / shards:.1f} ms of a core a shard",
        "driver's memory": f"{tenth:.0f} MB after a tenth of the shards, {handed:.0f} MB after all",
        "finalising": f"{finalising:.1f} s (goal: 60)",
    }


def _start_ray(cpus: int) -> None:
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


if __name__ == "__main__":
    main()
