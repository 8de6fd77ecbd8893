"""Cold reads: batches of 8 videos from a disk whose pages the page cache was told to forget.

Every round drops all files and then gives each reader the same batches, the others' pages dropped again before.
"""

import mmap
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from store_bench.corpus import WIDTH, Corpus, write_store
from store_bench.files import drop_from_cache, resident_share, write_synced
from store_bench.table import Row, compare

BATCH = 8
BATCHES = 8  # of one round: few, since in a small corpus all that read-ahead brings is soon asked for
ROW_BYTES = 2 * WIDTH

Read = Callable[[np.ndarray], list[np.ndarray]]


class Mapped:
    """The flat file, memory-mapped anew in each round: a page that is mapped is never dropped."""

    def __init__(self, corpus: Corpus, flat: Path, will_need: bool) -> None:
        self.ptr, self.flat, self.will_need = corpus.ptr.tolist(), flat, will_need

    def open(self) -> Read:
        with self.flat.open("rb") as file:
            self.mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self.rows = np.frombuffer(self.mapped, "<f2").reshape(-1, WIDTH)
        return self.read

    def read(self, videos: np.ndarray) -> list[np.ndarray]:
        if self.will_need:
            for video in videos:
                start, end = (self.ptr[video + k] * ROW_BYTES for k in (0, 1))
                start -= start % mmap.PAGESIZE
                self.mapped.madvise(mmap.MADV_WILLNEED, start, end - start)
        return [np.array(self.rows[self.ptr[video] : self.ptr[video + 1]]) for video in videos]

    def close(self) -> None:
        del self.rows
        self.mapped.close()


class Ours:
    """Our reader, its shards open (as they are after the first moments of a training)."""

    def __init__(self, root: Path, check: str, batched: bool) -> None:
        from feature_store.reader import FeatureReader

        self.reader, self.batched = FeatureReader(root, check=check), batched

    def open(self) -> Read:
        one_by_one = lambda videos: [self.reader.read(int(video)) for video in videos]  # noqa: E731
        return self.reader.read_many if self.batched else one_by_one

    def close(self) -> None:
        pass


def measure(scratch: Path, corpus: Corpus, rounds: int) -> tuple[list[Row], dict]:
    """The rows of this section, and all figures; `scratch` must lie on a real disk."""
    root, flat = scratch / "cold-store", scratch / "cold.f16"
    write_store(root, corpus)
    write_synced(flat, [corpus.rows])  # the corpus's own file is mapped, and would stay
    files = [flat, *(root / "features" / "c").glob("*/0")]
    readers = {
        "read_many (fadvise)": Ours(root, "off", batched=True),
        "read_many, always checked": Ours(root, "always", batched=True),
        "read, one by one": Ours(root, "off", batched=False),
        "mmap": Mapped(corpus, flat, will_need=False),
        "mmap, MADV_WILLNEED": Mapped(corpus, flat, will_need=True),
    }
    for reader in readers.values():  # opens the shards
        reader.open()(np.arange(len(corpus)))
        reader.close()
    figures: dict[str, list[float]] = {name: [] for name in readers}
    resident = []
    for number in range(rounds):
        videos = np.random.default_rng(number).permutation(len(corpus))[: BATCHES * BATCH].reshape(-1, BATCH)
        for name, reader in readers.items():
            drop_from_cache(files)
            resident.append(resident_share(files))
            read = reader.open()
            began = time.perf_counter()
            for batch in videos:
                read(batch)
            figures[name].append(videos.size / (time.perf_counter() - began))
            reader.close()
    left = median(resident)
    if left > 0.01:
        print(f"cold reads are not cold: {left:.0%} of the pages stayed in the page cache", file=sys.stderr)
    section = "cold reads, batches of 8" + (f" ({left:.0%} still cached!)" if left > 0.01 else "")
    rows = [
        compare(section, ours, "videos/s", figures[ours], other, figures[other], goal)
        for ours, other, goal in (
            ("read_many (fadvise)", "mmap", 4),
            ("read_many (fadvise)", "mmap, MADV_WILLNEED", None),
            ("read_many, always checked", "mmap, MADV_WILLNEED", None),
            ("read_many (fadvise)", "read, one by one", None),
        )
    ]
    return rows, {"readers": figures, "still_cached": left}
