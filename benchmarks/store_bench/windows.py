"""Random whole-video reads, warm: every format in a process of its own, measured in turn in short windows."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from store_bench.files import sync
from store_bench.formats import FORMATS, HERE, PEERS, FlatMemmap
from store_bench.peers import ROOT
from store_bench.table import Row, compare

SECONDS = 0.12
CLOCKS = ("cpu", "wall")
HEAD_START = 0.02  # so that both processes of a pair hear of the window before it begins


class Worker:
    """One process that reads one format."""

    def __init__(self, python: Path, form: str, folder: Path, corpus: Path) -> None:
        paths = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
        self.process = subprocess.Popen(
            [python, "-m", "store_bench.worker", form, folder, corpus],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        self.told = self.answer()

    def answer(self) -> dict:
        """The next line that the process says."""
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a reader ended: {self.process.args}")
        return json.loads(line)

    def ask(self, **window: float) -> None:
        """Tell it of a window."""
        self.process.stdin.write(json.dumps(window) + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def measure(
    place: str, folder: Path, flat: Path, peers: Path | None, rounds: int, clock: str
) -> tuple[list[Row], dict]:
    """The rows of this section, and all figures.

    Args:
        place: what the table calls the file system.
        folder: where the formats are written.
        flat: the corpus, on the same file system.
        peers: interpreter of the peers; None leaves their formats out.
        rounds: windows of each format, for one and for two processes.
        clock: whether the table counts by `cpu` or by `wall` time.
    """
    workers: dict[str, list[Worker]] = {}
    for name in FORMATS if peers else HERE:
        python = Path(sys.executable) if name in HERE else peers
        data = flat if FORMATS[name] is FlatMemmap else folder / FORMATS[name].folder
        print(f"  writing and checking {name}", file=sys.stderr)
        # One after the other: the first writes what the second reads.
        workers[name] = [Worker(python, name, data, flat) for _ in range(2)]
    sync(folder)
    figures = {name: {f"{clock} {n}": [] for clock in CLOCKS for n in (1, 2)} for name in workers}
    for number in range(rounds):
        for name, pair in workers.items():
            for processes in (1, 2):
                done = _window(pair[:processes], number)
                for measured in CLOCKS:
                    rate = sum(one["videos"] / one[measured] for one in done)
                    figures[name][f"{measured} {processes}"].append(rate)
    for pair in workers.values():
        for worker in pair:
            worker.close()
    versions = {name: version for form in PEERS if form in workers for name, version in workers[form][0].told.items()}
    return _rows(place, clock, figures), {"formats": figures, "peers": versions}


def _window(workers: list[Worker], seed: int) -> list[dict]:
    start = time.time() + HEAD_START
    for number, worker in enumerate(workers):
        worker.ask(start=start, seconds=SECONDS, seed=1000 * number + seed)
    return [worker.answer() for worker in workers]


# (ours, alternative, ratio that is the goal). mosaicml-streaming compares its hashes when it fetches a shard, not when
# it reads a sample, so that its goal is for our default, which checks every 16th read; `always` is told beside it.
_COMPARISONS = (
    ("ours, no check", "flat memmap", 0.5),
    ("ours, mapped, no check", "flat memmap", 0.5),
    ("ours, mapped, always", "ours, mapped, no check", 0.5),
    ("ours, always", "ours, no check", 0.5),
    ("ours, always", "zarr-python", 15),
    ("ours, always", "tensorstore", 1),
    ("ours, always", "HDF5 fletcher32", 1),
    ("ours, sampled", "mosaicml LocalDataset", 1),
    ("ours, always", "mosaicml LocalDataset", None),
    ("ours, sampled", "flat memmap", None),
    ("ours, sampled", "HDF5 contiguous", None),
    ("ours, sampled", ".npy per video", None),
    ("ours, sampled", "LMDB", None),
    ("ours, sampled", "litdata read_window", None),
)


def _rows(place: str, clock: str, figures: dict[str, dict[str, list[float]]]) -> list[Row]:
    rows = []
    for processes in (1, 2):
        section = f"warm, {place}, {processes} process{'es' if processes > 1 else ''}"
        unit = "videos/s" if clock == "wall" else "videos/core-s" if processes == 1 else "videos/2 core-s"
        key = f"{clock} {processes}"
        for ours, other, goal in _COMPARISONS:
            if other in figures:
                rows.append(compare(section, ours, unit, figures[ours][key], other, figures[other][key], goal))
    return rows
