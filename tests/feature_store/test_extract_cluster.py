"""Extraction on three Ray nodes while nodes, drivers and decoders are killed: the store of an undisturbed run."""

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from ray.cluster_utils import Cluster

from feature_store.commit import iter_commits
from feature_store.info import failures
from feature_store.layout import open_store
from feature_store.reader import FeatureReader
from feature_store.verify import verify_store
from tests.feature_store.test_extract import Killer, processes_of

pytestmark = pytest.mark.slow
NODES = 3
DRIVER = """
import sys
import ray
from feature_store.config import DecodeConfig, ExtractConfig
from feature_store.extract import extract_corpus
from feature_store.manifest import list_inputs
store, videos, address, deterministic = sys.argv[1:]
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
cfg = ExtractConfig(
    decode=DecodeConfig(fps=16, size=64), workers=3, batch_seconds=2, deterministic=deterministic == "True"
)
show = lambda progress: print("done", progress.done, flush=True)
summary = extract_corpus(store, list_inputs([videos]), cfg, random_seed=0, on_progress=show)
print("end", summary.tally.ok, summary.worker_deaths, flush=True)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> Path:
    """Forty videos of 6 to 12 seconds, and two broken ones."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        make_video(folder / f"v{number:02}.mp4", 6 + 2 * (number % 4), seed=number)
    cut = (folder / "v00.mp4").read_bytes()
    (folder / "v10cut.mp4").write_bytes(cut[: len(cut) * 2 // 3])
    (folder / "v20text.mp4").write_text("no film")
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without cores, on which nothing runs, and three nodes of one core."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(NODES):
        made.add_node(num_cpus=1)
    yield made
    made.shutdown()


@contextmanager
def driver(cluster: Cluster, store: Path, corpus: Path, deterministic: bool) -> Iterator[subprocess.Popen[str]]:
    words = [str(store), str(corpus), cluster.address, str(deterministic)]
    command = [sys.executable, "-c", DRIVER, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(process: subprocess.Popen[str], videos: int) -> None:
    """Until so many videos are through."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("done") and int(line.split()[1]) >= videos:
            return
    raise AssertionError(f"it ended before {videos} videos were through")


def end_of(process: subprocess.Popen[str]) -> tuple[int, int]:
    """(videos with features, deaths of workers) that a driver reports at its end."""
    assert process.stdout is not None
    text = process.stdout.read()  # Ray, too, says that a node was lost
    assert process.wait(60) == 0
    (end,) = [line.split() for line in text.splitlines() if line.startswith("end ")]
    return int(end[1]), int(end[2])


@pytest.fixture(scope="module", params=[False, True], ids=["default", "deterministic"])
def calm(
    request: pytest.FixtureRequest, cluster: Cluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bool, Path]:
    """(deterministic, store) of an undisturbed run."""
    store = tmp_path_factory.mktemp("calm") / "store"
    with driver(cluster, store, corpus, request.param) as process:
        assert end_of(process) == (40, 0)
    return request.param, store


def content(store: Path) -> dict[str, tuple[int, int, np.ndarray]]:
    """Shard, first row and features by id."""
    reader = FeatureReader(store, check="always")
    index = reader.index
    return {
        index.video_id(k): (int(index.shard[k]), int(index.row[k]), reader.read(k)) for k in range(index.num_videos)
    }


def ordered(rows: np.ndarray) -> np.ndarray:
    """float16 as integers of which neighbours are neighbouring numbers."""
    bits = rows.view("<i2").astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


def assert_same(store: Path, calm: tuple[bool, Path]) -> None:
    """Equal ids, places and failures; features equal to one unit in the last place, or in every bit."""
    deterministic, other = calm
    got, expected = content(store), content(other)
    assert got.keys() == expected.keys()
    furthest = 0
    for video_id, (shard, row, rows) in expected.items():
        assert got[video_id][:2] == (shard, row), video_id
        furthest = max(furthest, int(np.abs(ordered(got[video_id][2]) - ordered(rows)).max()))
    assert furthest <= (0 if deterministic else 1), f"{furthest} units in the last place"
    told = [[(r.video_id, r.reason, r.message) for r in failures(place)] for place in (store, other)]
    assert told[0] == told[1]
    assert not verify_store(store, deep=True).problems


def test_a_node_is_killed(cluster: Cluster, calm: tuple[bool, Path], corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with driver(cluster, store, corpus, calm[0]) as process:
        wait_for(process, 8)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        ok, deaths = end_of(process)
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    assert (ok, deaths) == (40, 1)
    assert_same(store, calm)


def test_the_driver_is_killed(cluster: Cluster, calm: tuple[bool, Path], corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with driver(cluster, store, corpus, calm[0]) as process:
        wait_for(process, 12)
        process.kill()
    committed = {path.name: path.read_bytes() for path in (store / "_commits").iterdir()}
    assert committed
    psutil.wait_procs(processes_of("RemoteShardWorker"), timeout=30)
    with driver(cluster, store, corpus, calm[0]) as process:
        ok, deaths = end_of(process)
    assert ok < 40
    assert deaths == 0
    assert all((store / "_commits" / name).read_bytes() == data for name, data in committed.items())
    assert_same(store, calm)


def test_decoders_are_killed_twenty_times(
    cluster: Cluster, calm: tuple[bool, Path], corpus: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    dice = random.Random(7)

    def one_of_them() -> list[psutil.Process]:
        """Whatever it does: reads, waits for the network, starts, or has nothing to do."""
        time.sleep(dice.uniform(0, 0.35))
        return sorted(processes_of("Decoder"), key=lambda process: dice.random())

    with driver(cluster, store, corpus, calm[0]) as process, Killer(one_of_them, 20) as killer:
        ok, deaths = end_of(process)
    assert killer.kills == 20
    assert (ok, deaths) == (40, 0)
    assert_same(store, calm)
    records = [record for commit in iter_commits(open_store(store)) for record in commit.videos]
    assert any(record.attempts > 1 for record in records), "no video was hit"
