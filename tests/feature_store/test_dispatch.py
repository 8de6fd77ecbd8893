"""feature_store.dispatch on a real Ray: who is given what when workers are slow, silent, dead, or come later."""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray

from feature_store import dispatch
from feature_store.dispatch import SHARDS_AT_ONCE, Dispatch
from feature_store.plan import PlannedVideo, ShardTask
from feature_store.tally import Sign, Tally, Work
from vlm_dist.errors import ExtractionError, StoreError, StoreUnreachableError

pytestmark = pytest.mark.usefixtures("ray_session")


class Worker:
    """Behaves as the files in a folder say: `SHARD.first` is what the first worker at that shard does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.times = 0

    def worked(self) -> Work:
        self.times += 1
        return Work(10 * self.times, 1.0 * self.times, 2.0 * self.times)

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def ready(self) -> None:
        if (self.folder / "first-start-hangs").exists():
            (self.folder / "first-start-hangs").unlink()
            time.sleep(600)
        if (self.folder / "no-worker-starts").exists():
            os._exit(1)
        if (counter := self.folder / "first-workers-die").exists():
            if left := int(counter.read_text()):
                counter.write_text(str(left - 1))
                os._exit(1)
            time.sleep(6)

    def extract(self, task: ShardTask, careful: bool, given_up: Mapping[str, str]) -> Iterator[Sign]:
        (self.folder / f"{task.shard}.{os.getpid()}.ran").touch()
        if given_up:
            (self.folder / "given-up").write_text("\n".join(f"{key}={why}" for key, why in given_up.items()))
        yield Sign(Tally())
        order = self.folder / f"{task.shard}.first"
        first = order.read_text() if order.exists() else ""
        if first:
            order.unlink()
        if careful and (self.folder / "killers").exists():
            yield from self.one_by_one(task)
            return
        if first == "wait for the next":
            yield Sign(Tally(), all_begun=True)
            while not list(self.folder.glob(f"{task.shard + 1}.*.ran")):
                time.sleep(0.05)
        elif first == "be long":
            time.sleep(1.5)
            (self.folder / "begun-meanwhile").write_text(str(len(list(self.folder.glob("*.ran"))) - 1))
        elif first == "die with the next":
            yield Sign(Tally(), all_begun=True)
            while not list(self.folder.glob(f"{task.shard + 1}.*.ran")):
                time.sleep(0.05)
            os._exit(1)
        elif (self.folder / "killers").exists() and not given_up:
            os._exit(1)
        elif first == "sleep":
            time.sleep(600)
        elif first == "die":
            os._exit(1)
        elif first == "store error":
            raise StoreError("the store is damaged")
        elif first == "broken GPU":
            raise RuntimeError("the GPU is lost")
        elif first == "say one and die":
            yield Sign(Tally(1, 5), self.worked())
            time.sleep(1)
            os._exit(1)
        elif first == "full scratch disk":
            raise StoreUnreachableError("this node's disk is full")
        elif (self.folder / "always-die").exists():
            os._exit(1)
        elif (self.folder / "always-die-after-one").exists():
            yield Sign(Tally(1, 5), self.worked())
            time.sleep(0.2)
            os._exit(1)
        time.sleep(0.05)
        yield Sign(Tally(len(task.videos), 10, {"corrupt": 1}), self.worked())

    def one_by_one(self, task: ShardTask) -> Iterator[Sign]:
        killers = (self.folder / "killers").read_text().split()
        for place, video in enumerate(task.videos):
            yield Sign(Tally(place), alone=video.video_id)
            if video.video_id in killers:
                os._exit(1)
        yield Sign(Tally(len(task.videos)))


class Case:
    """A dispatch over such workers; `room` may change while it runs."""

    def __init__(self, folder: Path, room: int) -> None:
        self.folder, self.room = folder, room
        self.polls: list[tuple[int, Tally]] = []
        actor: Any = ray.remote(num_cpus=0, max_concurrency=SHARDS_AT_ONCE)(Worker)
        self.dispatch = Dispatch(lambda: actor.remote(folder), lambda: self.room, self.look)

    def look(self, it: Dispatch) -> None:
        self.polls.append((len(it._pool), it.tally))

    def run(self, shards: int, first: dict[int, str] | None = None) -> None:
        for shard, what in (first or {}).items():
            (self.folder / f"{shard}.first").write_text(what)
        videos = (PlannedVideo("a", "a.mp4"), PlannedVideo("b", "b.mp4"))
        try:
            self.dispatch.run([ShardTask(shard, videos) for shard in range(shards)])
        finally:
            self.dispatch.close()

    @property
    def runs(self) -> Counter[int]:
        return Counter(int(path.name.split(".")[0]) for path in self.folder.glob("*.ran"))


@pytest.fixture
def two(tmp_path: Path) -> Case:
    return Case(tmp_path, room=2)


def test_every_task_once(two: Case) -> None:
    two.run(9)
    assert two.runs == Counter(range(9))
    it = two.dispatch
    assert (it.shards, it.shards_done, it.videos, it.deaths, it.most_workers) == (9, 9, 18, 0, 2)
    assert (it.tally, it.work) == (Tally(18, 90, {"corrupt": 9}), Work(90, 9.0, 18.0))
    assert max(size for size, _ in two.polls) == 2
    done = [tally.ok for _, tally in two.polls]
    assert done == sorted(done)


@pytest.mark.slow
def test_what_takes_far_longer_than_the_rest_is_given_out_again(two: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_SLOW_S", 1.0)
    two.run(6, {0: "sleep"})
    assert two.runs == Counter([0, *range(6)])
    assert (two.dispatch.shards_done, two.dispatch.tally.ok) == (6, 12), "the shard of two counts once"
    assert two.dispatch.deaths == 0


@pytest.mark.slow
def test_who_gives_no_sign_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_SILENCE_S", 1.0)
    one = Case(tmp_path, room=1)
    one.run(3, {1: "sleep"})
    assert one.runs == Counter([0, 1, 1, 2])
    assert one.dispatch.deaths == 1


@pytest.mark.parametrize("what", ["die", "broken GPU", "full scratch disk", "say one and die"])
@pytest.mark.slow
def test_a_lost_worker_is_replaced(two: Case, what: str) -> None:
    two.run(4, {0: what, 3: what})
    assert two.runs == Counter([0, 0, 1, 2, 3, 3])
    assert two.dispatch.deaths == 2
    assert two.dispatch.tally == Tally(8, 40, {"corrupt": 4}), "what the dead had done counts once"


def test_the_time_of_an_attempt_that_died_counts_and_its_videos_do_not(two: Case) -> None:
    two.run(4, {0: "say one and die"})
    assert (two.dispatch.tally, two.dispatch.work) == (Tally(8, 40, {"corrupt": 4}), Work(50, 5.0, 10.0))


def test_a_shard_begins_while_the_last_videos_of_another_are_in_work(tmp_path: Path) -> None:
    one = Case(tmp_path, room=1)
    one.run(5, {0: "wait for the next", 1: "wait for the next", 2: "wait for the next"})
    assert one.runs == Counter(range(5))
    assert (one.dispatch.deaths, one.dispatch.most_workers, one.dispatch.tally.ok) == (0, 1, 10)


def test_a_shard_does_not_begin_while_videos_of_another_wait(tmp_path: Path) -> None:
    one = Case(tmp_path, room=1)
    one.run(2, {0: "be long"})
    assert (tmp_path / "begun-meanwhile").read_text() == "0"


@pytest.mark.slow
def test_both_shards_of_a_worker_that_dies_are_given_out_again(tmp_path: Path) -> None:
    one = Case(tmp_path, room=1)
    one.run(4, {0: "die with the next", 1: "be long"})
    assert one.runs == Counter([0, 0, 1, 1, 2, 3])
    assert (one.dispatch.deaths, one.dispatch.tally) == (1, Tally(8, 40, {"corrupt": 4}))


@pytest.mark.slow
def test_a_video_that_workers_die_of_is_given_up(tmp_path: Path) -> None:
    one = Case(tmp_path, room=1)
    (tmp_path / "killers").write_text("b")
    one.run(1)
    assert one.dispatch.deaths == 4, "two with all videos in work, two with this one alone"
    assert (tmp_path / "given-up").read_text().startswith("b=b.mp4: 2 workers died that had no other video in work: ")


@pytest.mark.slow
def test_a_start_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_START_S", 1.0)
    (tmp_path / "first-start-hangs").touch()
    one = Case(tmp_path, room=1)
    one.run(2)
    assert (one.dispatch.shards_done, one.dispatch.deaths) == (2, 1)


OUT_OF_MEMORY = """
import sys, time
from pathlib import Path
import ray
from tests.feature_store.test_dispatch import Case
from vlm_dist.errors import ExtractionError
config = {"memory_usage_threshold": 0.0001, "memory_monitor_refresh_ms": 200}
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _system_config=config)
try:
    Case(Path(sys.argv[1]), room=1).run(1, {0: "sleep"})
except ExtractionError as error:
    print("ended:", error)
"""


@pytest.mark.slow
def test_workers_that_ray_kills_for_memory_die_as_any_other(tmp_path: Path) -> None:
    """A Ray to which every process is one too many; its error for that is no RayActorError."""
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "times without coming any further" in done.stdout
    assert "memory" in done.stdout


def test_the_stores_own_trouble_ends_the_work(two: Case) -> None:
    with pytest.raises(StoreError, match="the store is damaged"):
        two.run(4, {1: "store error"})
    assert not two.dispatch._pool


@pytest.mark.slow
def test_a_shard_at_which_every_worker_dies_ends_the_work(two: Case) -> None:
    (two.folder / "always-die").touch()
    with pytest.raises(ExtractionError, match=r"shard \d: its worker died 3 times without coming any further"):
        two.run(4)


@pytest.mark.slow
def test_a_shard_that_is_never_finished_ends_the_work(two: Case) -> None:
    (two.folder / "always-die-after-one").touch()
    with pytest.raises(ExtractionError, match=r"shard \d: its worker died 3 times without coming any further"):
        two.run(2)
    assert max(two.runs.values()) == 4, "one that came further than nothing, and three that came no further"


@pytest.mark.slow
def test_a_worker_that_does_not_start_leaves_the_others_time(tmp_path: Path) -> None:
    five = Case(tmp_path, room=5)
    (tmp_path / "first-workers-die").write_text("3")
    five.run(8)
    assert five.dispatch.shards_done == 8
    assert five.dispatch.deaths == 3


@pytest.mark.slow
def test_workers_that_never_start_end_the_work(two: Case) -> None:
    (two.folder / "no-worker-starts").touch()
    with pytest.raises(ExtractionError, match=r"workers died \d times without coming any further"):
        two.run(4)
    assert not two.runs


def test_workers_come_with_the_room_and_go_with_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_LOOK_S", 0.2)
    case = Case(tmp_path, room=1)
    look = case.dispatch.on_poll

    def grow(it: Dispatch) -> None:
        look(it)
        case.room = 3 if it.shards_done >= 2 else 1

    case.dispatch.on_poll = grow
    case.run(60, {59: "say one and die"})
    sizes = [size for size, _ in case.polls]
    assert sizes[0] == 1
    assert max(sizes) == 3
    assert sizes[-1] <= 2, "those that nothing is left for are ended"
    assert case.dispatch.most_workers == 3
