"""The index of a whole HowTo100M (1.1M videos, 121M clips): opening it, memory of its own, look-ups.

    python -m store_bench.index STORE mapped|ram

opens it in a fresh process and says what that took; `ram` is the alternative, the clip columns read into memory.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from feature_store.arrays import ColumnWriter, write_column
from feature_store.caption_table import CLIP_COLUMNS
from feature_store.files import seal, write_durable
from feature_store.index import StoreIndex, current_line
from feature_store.layout import CURRENT, SNAPSHOTS, create_store
from store_bench.corpus import LONGEST, SHORTEST, provenance
from store_bench.files import read_through
from store_bench.peers import ROOT
from store_bench.table import Row, bound

CLIPS_PER_VIDEO = 110
TOKENS = (4, 14)  # of a caption, 8.5 on average
LOOK_UPS = 5000
CLIPS = 32
BATCH = 8
VOCABULARY = 30_522
_BLOCK = 20_000  # videos made at once


def make_index(root: Path, videos: int, seed: int = 0) -> None:
    """Write a store that has an index and no features, column by column in blocks: no object for a video or a clip.

    The text of the captions is left empty: a look-up does not read it.
    """
    rng = np.random.default_rng(seed)
    meta = create_store(root, provenance())
    folder = root / SNAPSHOTS / "000001"
    dtypes = {"clip_ntok": "uint16", "tokens": "uint16"}
    streams = {name: ColumnWriter(folder, name, dtypes.get(name, "uint32")) for name in (*CLIP_COLUMNS, "tokens")}
    n_rows = rng.integers(SHORTEST, LONGEST + 1, videos, dtype=np.uint32)
    clips = n_rows.astype(np.int64) * CLIPS_PER_VIDEO * 2 // (SHORTEST + LONGEST)
    tokens = np.empty(videos, np.int64)
    for first in range(0, videos, _BLOCK):
        counts = clips[first : first + _BLOCK]
        begin = np.cumsum(counts) - counts
        lengths = rng.integers(*TOKENS, counts.sum(), dtype=np.uint16)
        start = (np.arange(counts.sum()) - np.repeat(begin, counts)).astype(np.uint32) * np.uint32(3400)
        tokens[first : first + _BLOCK] = np.add.reduceat(lengths, begin, dtype=np.int64)
        streams["clip_start_ms"].append(start)
        streams["clip_end_ms"].append(start + np.uint32(3300))
        streams["clip_ntok"].append(lengths)
        streams["clip_ntext"].append(np.zeros(len(start), np.uint32))
        streams["tokens"].append(rng.integers(1000, VOCABULARY, lengths.sum(dtype=np.int64), dtype=np.uint16))
    numbers = np.arange(videos, dtype=np.uint32)
    digits = numbers[:, None] // 10 ** np.arange(10, -1, -1) % 10
    columns = {
        "video_id": (digits + ord("0")).astype(np.uint8).ravel(),
        "video_id_ptr": np.arange(videos + 1, dtype=np.int64) * 11,
        "shard": numbers // 168,
        "row": np.zeros(videos, np.uint32),
        "n_rows": n_rows,
        "crc32c": numbers,
        "status": np.zeros(videos, np.uint8),
        "clip_ptr": np.concatenate([[0], np.cumsum(clips)]),
        "tok_ptr": np.concatenate([[0], np.cumsum(tokens)]),
        "text_ptr": np.zeros(videos + 1, np.int64),
        "text": np.empty(0, np.uint8),
        "caption_crc32c": numbers,
    }
    arrays = {name: stream.finish() for name, stream in streams.items()}
    arrays |= {name: write_column(folder, name, values) for name, values in columns.items()}
    body = {"parent": None, "arrays": arrays, "pending": {}, "failed": {}, "captions": {}, "fingerprint": "0" * 32}
    write_durable(folder / "snapshot.json", seal(body))
    meta.storage.replace(CURRENT, current_line(folder.name))


def measure(scratch: Path, videos: int, rounds: int) -> tuple[list[Row], dict]:
    """The rows of this section, and all figures."""
    root = scratch / "index-store"
    began = time.perf_counter()
    make_index(root, videos)
    made = time.perf_counter() - began
    read_through(root / "index")
    figures: dict[str, dict[str, list[float]]] = {"mapped": {}, "ram": {}}
    for _ in range(rounds):
        for way, values in figures.items():
            command = [sys.executable, "-m", "store_bench.index", str(root), way]
            paths = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
            environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
            for name, value in json.loads(done.stdout).items():
                values.setdefault(name, []).append(value)
    ours, theirs = figures.values()
    clips = int(ours["clips"][0])
    section = f"index, {videos:,} videos"
    named = "clip columns in RAM"
    rows = [
        bound(section, "open", "ms", ours["open_ms"], 10, named, theirs["open_ms"], most=True),
        bound(section, "memory of its own", "MB", ours["own_mb"], 20, named, theirs["own_mb"], most=True),
        bound(
            section,
            "look-ups of 32 clips",
            "videos/core-s",
            ours["look_ups"],
            LOOK_UPS,
            named,
            theirs["look_ups"],
        ),
        bound(
            section,
            "the same, 8 videos at once",
            "videos/core-s",
            ours["batched"],
            LOOK_UPS,
            named,
            theirs["batched"],
        ),
    ]
    return rows, {"made_s": made, "clips": clips, "ways": figures}


def look_up(index: StoreIndex, video: int, draws: np.ndarray) -> list[np.ndarray]:
    """Times and tokens of 32 clips of a video, drawn from its captions."""
    captions = index.captions.video(video)
    chosen = (draws * len(captions.ntok)).astype(np.int64)
    ends = np.cumsum(captions.ntok, dtype=np.int64)
    last = ends[chosen]
    first = last - captions.ntok[chosen]
    times = [captions.start_ms[chosen], captions.end_ms[chosen]]
    tokens = captions.tokens
    return times + [tokens[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True)]


def look_up_batch(index: StoreIndex, videos: np.ndarray, draws: np.ndarray) -> list[np.ndarray]:
    """The same of 8 videos, by the function that training uses; tokens side by side."""
    from vlm_dist.data.clips import gather_captions

    captions = gather_captions(index, videos.repeat(CLIPS))
    chosen = captions.begin + (draws * (captions.end - captions.begin)).astype(np.int64)
    first, lengths = captions.token[chosen], captions.token_end[chosen] - captions.token[chosen]
    where = np.arange(lengths.sum()) + np.repeat(first - lengths.cumsum() + lengths, lengths)
    return [captions.start_ms[chosen], captions.end_ms[chosen], index.tokens[where]]


def memory() -> dict[str, float]:
    """MB of this process: `own_mb` is its alone and must stay (dirty); `pss_mb` has its share of the page cache too."""
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    megabytes = {line[0]: int(line[1]) / 1024 for line in lines}
    return {"own_mb": megabytes["Private_Dirty:"] + megabytes["Swap:"], "pss_mb": megabytes["Pss:"]}


def main() -> None:
    """Open, look up, and say what it took."""
    from vlm_dist.data.clips import gather_captions  # noqa: F401  (imported before the memory is counted)

    root, way = Path(sys.argv[1]), sys.argv[2]
    rng = np.random.default_rng(os.getpid())
    draws = rng.random((LOOK_UPS, CLIPS))
    before = memory()
    began = time.perf_counter()
    index = StoreIndex(root)
    if way == "ram":
        read = {name: np.array(getattr(index.captions, name)) for name in ("clip_ptr", "tok_ptr", *CLIP_COLUMNS)}
        index.captions = replace(index.captions, **read)
        for name in ("clip_ptr", "tok_ptr", "clip_start_ms", "clip_end_ms", "clip_ntok"):
            setattr(index, name, read[name])
    opened = time.perf_counter() - began
    videos = rng.choice(index.num_videos, 2 * LOOK_UPS, replace=index.num_videos // 2 < LOOK_UPS)
    began, cpu = time.perf_counter(), time.process_time()
    for video, draw in zip(videos[:LOOK_UPS].tolist(), draws, strict=True):
        look_up(index, video, draw)
    single, single_wall = time.process_time() - cpu, time.perf_counter() - began
    began, cpu = time.perf_counter(), time.process_time()
    for batch, draw in zip(videos[LOOK_UPS:].reshape(-1, BATCH), draws.reshape(-1, BATCH * CLIPS), strict=True):
        look_up_batch(index, batch, draw)
    batched, batched_wall = time.process_time() - cpu, time.perf_counter() - began
    same = [np.concatenate(look_up(index, video, draw)[2:]) for video, draw in zip(videos[:BATCH], draws, strict=False)]
    assert np.array_equal(np.concatenate(same), look_up_batch(index, videos[:BATCH], draws[:BATCH].ravel())[2])
    told = {
        "open_ms": 1000 * opened,
        **{name: value - before[name] for name, value in memory().items()},
        "look_ups": LOOK_UPS / single,
        "look_ups_wall": LOOK_UPS / single_wall,
        "batched": LOOK_UPS / batched,
        "batched_wall": LOOK_UPS / batched_wall,
        "clips": index.num_clips,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
