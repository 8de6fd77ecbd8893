"""Writing whole shards, commit included, beside plain zarr-python: the same rows and codecs, and the same fsyncs."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import zarr

from feature_store.files import fsync_dir
from feature_store.layout import create_store, features_json, shard_key
from feature_store.records import VideoRecord
from feature_store.writer import ShardAttempt
from store_bench.corpus import Corpus, provenance, video_id
from store_bench.table import Row, compare


def measure(places: dict[str, Path], corpus: Corpus, shards: int, rounds: int) -> tuple[list[Row], dict]:
    """The rows of this section, and all figures.

    Args:
        places: a folder for each file system, by the name that the table gives it.
        corpus: whose rows are written, from memory.
        shards: that one run writes.
        rounds: alternating runs of each.
    """
    rows, figures = [], {}
    for place, scratch in places.items():
        videos = _shards(scratch, corpus, shards)
        size = sum(part.nbytes for shard in videos for _, part in shard) / 1e6
        blocks = [np.concatenate([part for _, part in shard]) for shard in videos]  # zarr-python is given whole shards
        times: dict[str, list[float]] = {"ours": [], "zarr": []}
        for _ in range(rounds + 1):
            times["ours"].append(size / _ours(scratch / "written", videos))
            times["zarr"].append(size / _zarr_python(scratch / "written", blocks))
        figures[place] = {name: values[1:] for name, values in times.items()}  # the first run warms up
        ours, theirs = figures[place].values()
        rows.append(compare(f"writing, {place}", "shards with commit", "MB/s", ours, "zarr-python", theirs, 0.8))
    return rows, figures


def _shards(scratch: Path, corpus: Corpus, shards: int) -> list[list[tuple[str, np.ndarray]]]:
    """(id, rows) of the videos that fill each shard, in memory."""
    room = create_store(scratch / "shape", provenance()).rows_per_shard
    shutil.rmtree(scratch / "shape")
    filled: list[list[tuple[str, np.ndarray]]] = [[]]
    used = 0
    for video, rows in enumerate(corpus):
        if used + len(rows) > room:
            if len(filled) == shards:
                break
            filled.append([])
            used = 0
        filled[-1].append((video_id(video), np.array(rows)))
        used += len(rows)
    return filled


def _ours(folder: Path, shards: list[list[tuple[str, np.ndarray]]]) -> float:
    """Seconds from the first row to the last commit."""
    create_store(folder, provenance())
    began = time.perf_counter()
    for number, videos in enumerate(shards):
        with ShardAttempt(folder, number) as attempt:
            for name, rows in videos:
                attempt.add(VideoRecord(video_id=name), rows)
            assert attempt.commit()
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds


def _zarr_python(folder: Path, blocks: list[np.ndarray]) -> float:
    """Seconds for whole shards into an array with the metadata of ours, each file and its folders fsynced."""
    meta = create_store(folder, provenance())
    features = folder / "features"
    (features / "zarr.json").write_bytes(features_json(meta, len(blocks)))
    array = zarr.open_array(str(features), mode="r+")
    began = time.perf_counter()
    for number, rows in enumerate(blocks):
        first = number * meta.rows_per_shard
        array[first : first + len(rows)] = rows
        path = folder / shard_key(number)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        for parent in (path.parent, path.parent.parent, path.parent.parent.parent):
            fsync_dir(parent)
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds
