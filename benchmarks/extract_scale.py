"""How extraction grows: with a second worker, and to 1.1 million videos on a real Ray (without decoding): two tables.

    python benchmarks/extract_scale.py [--videos 1100000] [--small] [--json FILE]

The first part extracts rendered videos on a Ray of one core and on one of two. The second plans, hands out and commits
every shard of a corpus whose videos have the lengths of HowTo100M's (390 s on average) and rows one number wide: real
plan, actors, streams of signs, commits with fsync, and the index at the end; only decoding and the network are left
out. It says what the driver costs and whether its memory stays flat. Fifteen minutes on two cores, 2 GB of disk.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import ray
from extract_bench.video import render

from feature_store.config import DecodeConfig, ExtractConfig
from feature_store.dispatch import Dispatch
from feature_store.extract import extract_corpus
from feature_store.layout import create_store
from feature_store.manifest import list_inputs
from feature_store.plan import PlannedVideo, ShardTask, plan_videos
from feature_store.records import Provenance, VideoRecord
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
        told = simulated(folder, 20_000 if arguments.small else arguments.videos)
    print("| simulated extraction | |\n|---|---|")
    for what, value in told.items():
        print(f"| {what} | {value} |")
    print(machine())
    if arguments.json:
        arguments.json.write_text(json.dumps({"scaling": growth, "simulated": told}))


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


class SyntheticWorker:
    """Commits shards of random rows, one number wide, of videos with random lengths."""

    def __init__(self, store: Path) -> None:
        self.store = store

    def ready(self) -> str:
        """The node."""
        return ray.get_runtime_context().get_node_id()

    def extract(self, task: ShardTask) -> Iterator[Sign]:
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

    actor = ray.remote(num_cpus=1)(SyntheticWorker)
    dispatch = Dispatch(lambda: actor.remote(store), lambda: WORKERS, look)
    cpu, began, rounds = time.process_time(), time.monotonic(), 0
    finalising = handed = 0.0
    while tasks:
        dispatch.run(tasks)
        rounds += 1
        if rounds == 1:
            ran, driver = time.monotonic() - began, time.process_time() - cpu
            handed = process.memory_info().rss / 2**20
            shards, first = dispatch.shards_done, time.monotonic()
            finalise(store)
            finalising = time.monotonic() - first
        tasks = plan_videos(store, (), WORKERS)
    dispatch.close()
    finalise(store)
    ray.shutdown()
    tenth = next(rss for done, rss in memory if done >= shards // 10)
    return {
        "videos": f"{count:,} in {shards:,} shards (and {dispatch.shards_done - shards:,} of what overflowed)",
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
