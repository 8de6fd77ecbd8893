"""How fast the feature store reads, writes and looks up, beside other formats and libraries: one table.

    python benchmarks/store.py [--small] [--peers] [--wall] [--json FILE] [--only SECTION ...]

Medians over alternating rounds; a ratio above 1 is ours ahead. Every reader is compared bit for bit before it is timed.
What never waits (warm reads, look-ups, clips) is counted by CPU time, all threads of a process together, so that other
work on the machine tells less; `--wall` counts warm reads by the wall clock. Cold reads and writing are wall-clock.
HDF5, LMDB, mosaicml-streaming and litdata live in an environment of their own, since their requirements clash with
ours: `--peers` makes it, in `.bench/`, and without it they are left out. The whole run takes some ten minutes, 8 GB of
disk and as much memory to hold it warm.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from store_bench import clips, cold, index, windows, writing
from store_bench.corpus import Corpus, make_corpus
from store_bench.peers import peers_python
from store_bench.table import Row, machine, render, versions

FULL = {"videos": 2000, "rounds": 9, "cold": 15, "shards": 4, "writes": 7, "index_videos": 1_100_000, "opens": 5}
SMALL = {"videos": 200, "rounds": 3, "cold": 3, "shards": 1, "writes": 3, "index_videos": 20_000, "opens": 3}


@dataclass(frozen=True)
class Setting:
    """What a section measures with: the corpus (its folder too), sizes, and two empty folders of its own."""

    corpus: Corpus
    flat: Path
    size: dict[str, int]
    peers: Path | None
    clock: str
    disk: Path
    memory: Path


def page_cache(at: Setting) -> tuple[list[Row], Any]:
    """Warm reads from a disk's file system."""
    return windows.measure("page cache", at.disk, at.flat, at.peers, at.size["rounds"], at.clock)


def tmpfs(at: Setting) -> tuple[list[Row], Any]:
    """Warm reads from a file system in memory."""
    make_corpus(at.memory / "flat", at.size["videos"])
    return windows.measure("tmpfs", at.memory, at.memory / "flat", at.peers, at.size["rounds"], at.clock)


def cold_reads(at: Setting) -> tuple[list[Row], Any]:
    """Reads from the disk itself."""
    return cold.measure(at.disk, at.corpus, at.size["cold"])


def write(at: Setting) -> tuple[list[Row], Any]:
    """Writing with its commit, to the disk and to memory."""
    return writing.measure({"disk": at.disk, "tmpfs": at.memory}, at.corpus, at.size["shards"], at.size["writes"])


def look_ups(at: Setting) -> tuple[list[Row], Any]:
    """The index of a whole HowTo100M."""
    return index.measure(at.disk, at.size["index_videos"], at.size["opens"])


def clip_batches(at: Setting) -> tuple[list[Row], Any]:
    """What training asks the store for."""
    return clips.measure(at.disk, at.corpus, at.size["rounds"])


SECTIONS: dict[str, Callable[[Setting], tuple[list[Row], Any]]] = {
    "page-cache": page_cache,
    "tmpfs": tmpfs,
    "cold": cold_reads,
    "write": write,
    "index": look_ups,
    "clips": clip_batches,
}


def main() -> None:
    """Measure the sections that are asked for, and print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a test run: a tenth of the corpus, a few rounds")
    parser.add_argument("--peers", action="store_true", help="make the environment of the peers if it is not there")
    parser.add_argument("--wall", action="store_true", help="count warm reads by wall-clock time (on an idle machine)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS], help="measure these sections")
    parser.add_argument("--disk", default=gettempdir(), help="a folder on a real disk")
    parser.add_argument("--memory", default="/dev/shm", help="a folder on a file system in memory")
    arguments = parser.parse_args()
    size = SMALL if arguments.small else FULL
    clock = "wall" if arguments.wall else "cpu"
    peers = peers_python(arguments.peers)
    rows: list[Row] = []
    figures: dict[str, Any] = {}
    with TemporaryDirectory(prefix="store-bench-", dir=arguments.disk) as folder:
        flat = Path(folder, "flat")
        corpus = make_corpus(flat, size["videos"])
        for section in arguments.only:
            print(f"measuring {section}", file=sys.stderr)
            with TemporaryDirectory(dir=folder) as disk, TemporaryDirectory(dir=arguments.memory) as memory:
                setting = Setting(corpus, flat, size, peers, clock, Path(disk), Path(memory))
                measured, figures[section] = SECTIONS[section](setting)
            rows += measured
    told = [machine(), versions(figures)]
    if not peers:
        told.append("left out, for want of their environment (make it with --peers): HDF5, LMDB, MDS, litdata")
    if arguments.small:
        told.append("--small: a test of the benchmark; no figure of it says anything")
    print("\n".join([render(rows), "", *told]))
    if arguments.json:
        told_rows = [asdict(row) for row in rows]
        arguments.json.write_text(json.dumps({"told": told, "size": size, "rows": told_rows, "figures": figures}))


if __name__ == "__main__":
    main()
