"""Shards → workers on a Ray cluster: who does which, until all are committed (under the extraction).

A shard's commit counts once whoever makes it, so a shard may be given out again at any time: when its worker died, when
it has gone silent, or, once no other work is left, when it takes far longer than the others (a slow node).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from feature_store.decode_pool import NoDecoderError
from feature_store.plan import ShardTask
from feature_store.tally import Sign, Tally
from vlm_dist.errors import ExtractionError, StoreUnreachableError, VlmDistError

_POLL_S = 0.5
_LOOK_S = 5.0  # between looks at the cluster's size
_SILENCE_S = 300.0  # a worker gives a sign every few seconds; committing to a slow place may take a while
_DEATHS = 3  # in a row, of workers that came no further with a shard than others before, or did not start
_PAUSE_S = 60.0  # at most, before the next worker is started
_STARTS = -1  # stands for the start of workers where deaths are counted by shard
_NODES_OWN = (NoDecoderError, StoreUnreachableError)  # another node may do better
_SLOW = 2.0  # times the median: a shard is then given out a second time, if there is nothing else to do
_SLOW_S = 30.0  # but not for less
_NOTHING = Sign(Tally())


@dataclass(eq=False)
class _Worker:
    """An actor: starting, idle, or at a task."""

    actor: Any
    starting: Any
    """Reference to what says that it is ready; None once it is."""
    task: ShardTask | None = None
    signs: Any = None
    """The stream of its task's signs."""
    node: str = ""
    since: float = 0.0
    heard: float = 0.0
    last: Sign = _NOTHING

    @property
    def waitable(self) -> Any:
        return self.starting if self.starting is not None else self.signs


@dataclass
class Dispatch:
    """Gives tasks to workers and follows them.

    Args:
        start: Makes an actor with a method `ready()` that gives its node, and a streaming `extract(task)` of Signs.
        room: How many workers the cluster has place for now; asked again as time goes by.
        on_poll: Called about twice a second, and at the end.
    """

    start: Callable[[], Any]
    room: Callable[[], int]
    on_poll: Callable[["Dispatch"], None]
    shards: int = 0
    shards_done: int = 0
    videos: int = 0
    deaths: int = 0
    most_workers: int = 0
    _finished: Sign = field(default=_NOTHING, init=False)
    _pool: list[_Worker] = field(default_factory=list[_Worker], init=False)
    _queue: deque[ShardTask] = field(default_factory=deque[ShardTask], init=False)
    _done: set[int] = field(default_factory=set[int], init=False)
    _took_s: list[float] = field(default_factory=list[float], init=False)
    _lost: Counter[int] = field(default_factory=Counter[int], init=False)
    _furthest: dict[int, int] = field(default_factory=dict[int, int], init=False)
    _looked: float = field(default=float("-inf"), init=False)
    _polled: float = field(default=float("-inf"), init=False)
    _room: int = field(default=0, init=False)
    _start_after: float = field(default=float("-inf"), init=False)

    def run(self, tasks: Sequence[ShardTask]) -> None:
        """Run the tasks to their end; a worker's own error ends all of it.

        Raises:
            VlmDistError: what a worker raised.
            ExtractionError: workers that keep dying without coming any further, or before they are ready.
        """
        self._queue.extend(tasks)
        self.shards += len(tasks)
        self.videos += sum(len(task.videos) for task in tasks)
        self._looked = float("-inf")
        left = {task.shard for task in tasks}
        while left:
            self._fit()
            self._assign()
            self._listen()
            self._end_silent()
            left -= self._done
            if not left or time.monotonic() - self._polled >= _POLL_S:
                self._polled = time.monotonic()
                self.on_poll(self)

    def close(self) -> None:
        """End the workers, whatever they are at."""
        for worker in list(self._pool):
            self._remove(worker)

    @property
    def ready_workers(self) -> int:
        """Workers that are through with their start."""
        return sum(worker.starting is None for worker in self._pool)

    @property
    def so_far(self) -> Sign:
        """Of the shards that are done and of those in work; a shard that two are at counts once, their times twice."""
        furthest: dict[int, Sign] = {}
        for worker in self._pool:
            if worker.task and worker.task.shard not in self._done:
                shard, sign = worker.task.shard, worker.last
                if shard not in furthest or furthest[shard].tally.tried < sign.tally.tried:
                    furthest[shard] = sign
        total = self._finished
        for sign in furthest.values():
            total = total.plus(sign)
        for worker in self._pool:
            if worker.task and furthest.get(worker.task.shard) is not worker.last:
                total = total.plus(worker.last.times())
        return total

    def _fit(self) -> None:
        """Start workers where there is room and work, end those that nothing is left for; nodes may come and go."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_S:
            self._looked = now
            self._room = self.room()
        idle = [worker for worker in self._pool if worker.task is None]
        in_work = len(self._pool) - len(idle)
        for worker in idle[max(in_work, len(self._queue)) :]:  # as many as may take over what is slow
            self._remove(worker)
        while len(self._pool) < min(self._room, in_work + len(self._queue)) and now >= self._start_after:
            actor = self.start()
            self._pool.append(_Worker(actor, actor.ready.remote(), heard=now))
            self.most_workers = max(self.most_workers, len(self._pool))

    def _assign(self) -> None:
        idle = [worker for worker in self._pool if worker.starting is None and worker.task is None]
        for worker, task in zip(idle, self._next_tasks(len(idle)), strict=False):
            worker.task, worker.last = task, _NOTHING
            worker.since = worker.heard = time.monotonic()
            worker.signs = worker.actor.extract.options(num_returns="streaming").remote(task)

    def _next_tasks(self, count: int) -> list[ShardTask]:
        """What waits; once nothing does, the slowest in work, where it takes far longer than others did."""
        if self._queue or not count or not self._took_s:
            return [self._queue.popleft() for _ in range(min(count, len(self._queue)))]
        late = time.monotonic() - max(_SLOW_S, _SLOW * statistics.median(self._took_s))
        in_work = Counter(worker.task.shard for worker in self._pool if worker.task)
        slow = [w for w in self._pool if w.task and w.since < late and in_work[w.task.shard] == 1]
        return [w.task for w in sorted(slow, key=lambda w: w.since)[:count] if w.task]

    def _listen(self) -> None:
        """Hear every sign that is there; waits for the first."""
        waitables = {id(w.waitable): w for w in self._pool if w.waitable is not None}
        if not waitables:
            time.sleep(_POLL_S)
            return
        handles = [worker.waitable for worker in waitables.values()]
        ready, _ = ray.wait(handles, num_returns=1, timeout=_POLL_S)
        if ready:
            ready, _ = ray.wait(handles, num_returns=len(handles), timeout=0)
        for waitable in ready:
            worker = waitables[id(waitable)]
            if worker in self._pool:  # not ended meanwhile, because another was faster
                self._hear(worker)

    def _hear(self, worker: _Worker) -> None:
        worker.heard = time.monotonic()
        try:
            if worker.starting is not None:
                worker.node = ray.get(worker.starting)
                worker.starting = None
                self._lost[_STARTS] = 0
            else:
                sign: Any = ray.get(next(worker.signs))
                worker.last = sign
        except RayTaskError as error:  # before StopIteration, which an error of a worker's may be as well
            cause = error.cause
            if isinstance(cause, VlmDistError) and not isinstance(cause, _NODES_OWN):
                raise cause from None
            self._bury(worker, cause)  # the node's own trouble, perhaps: a broken GPU, a full disk
        except RayError as error:  # it died, or Ray killed it because its node was out of memory
            self._bury(worker, error)
        except StopIteration:
            self._finish(worker)

    def _finish(self, worker: _Worker) -> None:
        task, worker.task, worker.signs = worker.task, None, None
        assert task is not None
        if task.shard in self._done:
            return
        self._done.add(task.shard)
        self.shards_done += 1
        self._took_s.append(time.monotonic() - worker.since)
        self._finished = self._finished.plus(worker.last)
        for other in [w for w in self._pool if w.task and w.task.shard == task.shard]:
            self._remove(other)

    def _bury(self, worker: _Worker, error: BaseException) -> None:
        """A worker is gone: its shard is given out again, unless another is at it."""
        self.deaths += 1
        self._remove(worker)
        task = worker.task
        if task and all(other.task is not task for other in self._pool):
            self._queue.appendleft(task)
        if worker.node in _lost_nodes():
            return
        shard = task.shard if task else _STARTS
        if task and worker.last.tally.tried > self._furthest.get(shard, 0):
            self._furthest[shard], self._lost[shard] = worker.last.tally.tried, 0
            return
        # Neither its node's fault nor a step further: it may be that nobody can do this.
        self._lost[shard] += 1
        self._start_after = time.monotonic() + min(_PAUSE_S, 2.0 ** (self._lost[shard] - 1))
        if self._lost[shard] < _DEATHS or (task is None and self._pool):
            return  # where some do not start, others may yet, or do the work
        where = f"shard {shard}: its worker" if task else "workers"
        raise ExtractionError(f"{where} died {self._lost[shard]} times without coming any further: {error}")

    def _remove(self, worker: _Worker) -> None:
        """End a worker. What it did counts no more, the time that it took does."""
        self._pool.remove(worker)
        if worker.task:
            self._finished = self._finished.plus(worker.last.times())
        with suppress(Exception):
            ray.kill(worker.actor)

    def _end_silent(self) -> None:
        """Kill workers that give no sign; their end is heard as any other's."""
        for worker in self._pool:
            if worker.task and time.monotonic() - worker.heard > _SILENCE_S:
                ray.kill(worker.actor)
                worker.heard = time.monotonic()


def _lost_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
