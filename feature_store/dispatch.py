"""Shards → workers on a Ray cluster: who does which, until all are committed (under the extraction).

A shard's commit counts once whoever makes it, so a shard may be given out again at any time: when its worker died, when
it has gone silent, or, once no other work is left, when it takes far longer than the others (a slow node). A worker is
given its next shard as soon as all videos of those it has are begun, so that its decoders need not wait for the last.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from feature_store.decode_pool import NoDecoderError
from feature_store.losses import DEATHS, Losses
from feature_store.plan import ShardTask
from feature_store.tally import Sign, Tally, Work
from vlm_dist.errors import ExtractionError, StoreUnreachableError, VlmDistError

# Of one worker: its last videos may be long, and with 156 decoders two shards (of 168 videos) leave half of them idle,
# four an eighth, eight 4 %. Few decoders never come to so many, because each shard in work has a video in work.
SHARDS_AT_ONCE = 8
_POLL_S = 0.5
_LOOK_S = 5.0  # between looks at the cluster's size
_SILENCE_S = 300.0  # a worker gives a sign every few seconds; committing to a slow place may take a while
_START_S = 1800.0  # once it has its place: torch from a slow disk, compiling and recording graphs take minutes
_PAUSE_S = 60.0  # at most, before the next worker is started
_NODES_OWN = (NoDecoderError, StoreUnreachableError)  # another node may do better
_SLOW = 2.0  # times the median: a shard is then given out a second time, if there is nothing else to do
_SLOW_S = 30.0  # but not for less
_IDLE = Work()
_NOTHING = Sign(Tally())


@dataclass(eq=False)
class _Attempt:
    """A worker at a shard."""

    task: ShardTask
    signs: Any
    """The stream of its signs."""
    since: float
    heard: float
    careful: bool
    """Its videos are in work one at a time."""
    last: Sign = _NOTHING


@dataclass(eq=False)
class _Worker:
    """An actor: waiting for its place, starting, idle, or at some shards."""

    actor: Any
    starting: Any
    """Reference to what tells its node, then to what says that it is ready; None once it is."""
    node: str = ""
    placed: float = 0.0
    attempts: list[_Attempt] = field(default_factory=list[_Attempt])
    work: Work = _IDLE

    @property
    def takes_more(self) -> bool:
        """Whether nothing waits any more of the shards that it is at."""
        begun = all(attempt.last.all_begun and not attempt.careful for attempt in self.attempts)
        return 0 < len(self.attempts) < SHARDS_AT_ONCE and begun


@dataclass
class Dispatch:
    """Gives tasks to workers and follows them.

    Args:
        start: Makes an actor with methods `node()`, which gives its node at once, `ready()`, and a streaming
            `extract(task, careful, given_up)` of Signs; it must run SHARDS_AT_ONCE of them at once.
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
    _finished: Tally = field(default=Tally(), init=False)
    _gone: Work = field(default=_IDLE, init=False)
    """Of workers that are not there any more."""
    _pool: list[_Worker] = field(default_factory=list[_Worker], init=False)
    _queue: deque[ShardTask] = field(default_factory=deque[ShardTask], init=False)
    _done: set[int] = field(default_factory=set[int], init=False)
    _took_s: list[float] = field(default_factory=list[float], init=False)
    _losses: Losses = field(default_factory=Losses, init=False)
    _start_deaths: int = field(default=0, init=False)
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
    def tally(self) -> Tally:
        """Of the shards that are done and of those in work; a shard that two are at counts once."""
        furthest: dict[int, Tally] = {}
        for _, attempt in self._attempts():
            shard, tally = attempt.task.shard, attempt.last.tally
            if shard not in self._done and (shard not in furthest or furthest[shard].tried < tally.tried):
                furthest[shard] = tally
        total = self._finished
        for tally in furthest.values():
            total = total.plus(tally)
        return total

    @property
    def work(self) -> Work:
        """Of all workers, also of those that died and of those that were at the same shard."""
        total = self._gone
        for worker in self._pool:
            total = total.plus(worker.work)
        return total

    def _attempts(self) -> Iterator[tuple[_Worker, _Attempt]]:
        for worker in self._pool:
            for attempt in worker.attempts:
                yield worker, attempt

    def _fit(self) -> None:
        """Start workers where there is room and work, end those that nothing is left for; nodes may come and go."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_S:
            self._looked = now
            self._room = self.room()
        idle = [worker for worker in self._pool if not worker.attempts]
        in_work = len(self._pool) - len(idle)
        for worker in idle[max(in_work, len(self._queue)) :]:  # as many as may take over what is slow
            self._remove(worker)
        while len(self._pool) < min(self._room, in_work + len(self._queue)) and now >= self._start_after:
            actor = self.start()
            self._pool.append(_Worker(actor, actor.node.remote()))
            self.most_workers = max(self.most_workers, len(self._pool))

    def _assign(self) -> None:
        idle = [worker for worker in self._pool if worker.starting is None and not worker.attempts]
        for worker, task in zip(idle, self._next_tasks(len(idle)), strict=False):
            self._give(worker, task)
        for worker in self._pool:
            # A shard whose videos are to be in work one at a time waits for a worker of its own.
            if self._queue and worker.takes_more and not self._losses.careful(self._queue[0].shard):
                self._give(worker, self._queue.popleft())

    def _give(self, worker: _Worker, task: ShardTask) -> None:
        now, careful = time.monotonic(), self._losses.careful(task.shard)
        # One at a time: each sign that a video begins is here before the video does.
        held = {"_generator_backpressure_num_objects": 1} if careful else {}
        extract = worker.actor.extract.options(num_returns="streaming", **held)
        signs = extract.remote(task, careful, self._losses.given_up(task.shard))
        worker.attempts.append(_Attempt(task, signs, now, now, careful))

    def _next_tasks(self, count: int) -> list[ShardTask]:
        """What waits; once nothing does, the slowest in work, where it takes far longer than others did."""
        if self._queue or not count or not self._took_s:
            return [self._queue.popleft() for _ in range(min(count, len(self._queue)))]
        late = time.monotonic() - max(_SLOW_S, _SLOW * statistics.median(self._took_s))
        attempts = [attempt for _, attempt in self._attempts()]
        in_work = Counter(attempt.task.shard for attempt in attempts)
        slow = [attempt for attempt in attempts if attempt.since < late and in_work[attempt.task.shard] == 1]
        return [attempt.task for attempt in sorted(slow, key=lambda attempt: attempt.since)[:count]]

    def _listen(self) -> None:
        """Hear every sign that is there; waits for the first."""
        heard: dict[int, tuple[_Worker, _Attempt | None]] = {}
        handles: list[Any] = []
        for worker in self._pool:
            if worker.starting is not None:
                handles.append(worker.starting)
                heard[id(worker.starting)] = worker, None
            for attempt in worker.attempts:
                handles.append(attempt.signs)
                heard[id(attempt.signs)] = worker, attempt
        if not handles:
            time.sleep(_POLL_S)
            return
        ready, _ = ray.wait(handles, num_returns=1, timeout=_POLL_S)
        if ready:
            ready, _ = ray.wait(handles, num_returns=len(handles), timeout=0)
        for handle in ready:
            worker, attempt = heard[id(handle)]
            if worker in self._pool:  # not ended meanwhile, because another was faster, or with another of its shards
                self._hear(worker, attempt)

    def _hear(self, worker: _Worker, attempt: _Attempt | None) -> None:
        try:
            if attempt is None:
                self._come_on(worker, ray.get(worker.starting))
                return
            attempt.heard = time.monotonic()
            sign: Any = ray.get(next(attempt.signs))
            attempt.last = sign
            worker.work = max(worker.work, sign.work)  # two shards' signs may come in another order than they were made
        except RayTaskError as error:  # before StopIteration, which an error of a worker's may be as well
            cause = error.cause
            if isinstance(cause, VlmDistError) and not isinstance(cause, _NODES_OWN):
                raise cause from None
            self._bury(worker, cause)  # the node's own trouble, perhaps: a broken GPU, a full disk
        except RayError as error:  # it died, or Ray killed it because its node was out of memory
            self._bury(worker, error)
        except StopIteration:
            assert attempt is not None
            self._finish(worker, attempt)

    def _come_on(self, worker: _Worker, told: Any) -> None:
        """A worker has its place, or is ready."""
        if not worker.node:
            worker.node, worker.placed = told, time.monotonic()
            worker.starting = worker.actor.ready.remote()
        else:
            worker.starting = None
            self._start_deaths = 0

    def _finish(self, worker: _Worker, attempt: _Attempt) -> None:
        shard = attempt.task.shard
        worker.attempts.remove(attempt)
        if shard in self._done:
            return
        self._done.add(shard)
        self.shards_done += 1
        self._took_s.append(time.monotonic() - attempt.since)
        self._finished = self._finished.plus(attempt.last.tally)
        for other in [other for other, its in self._attempts() if its.task.shard == shard]:
            self._remove(other)

    def _bury(self, worker: _Worker, error: BaseException | str) -> None:
        """A worker is gone: its shards are given out again, unless others are at them."""
        self.deaths += 1
        self._remove(worker)
        if worker.node in _lost_nodes():
            return
        # Where it is not the node's fault, and brought nothing, it may be that nobody can do this.
        in_vain = 0
        for attempt in worker.attempts:
            alone = "" if isinstance(error, _NODES_OWN) else attempt.last.alone
            in_vain = max(in_vain, self._losses.count(attempt.task, attempt.last.tally.tried, alone, error))
        if not worker.attempts:
            self._start_deaths += 1
            in_vain = self._start_deaths
            if in_vain >= DEATHS and not self._pool:  # where some do not start, others may yet, or do the work
                raise ExtractionError(
                    f"workers died {in_vain} times without coming any further than their start: {error}"
                )
        if in_vain:
            self._start_after = time.monotonic() + min(_PAUSE_S, 2.0 ** (in_vain - 1))

    def _remove(self, worker: _Worker) -> None:
        """End a worker. What it was at is given out again, unless that is done or another is at it."""
        self._pool.remove(worker)
        self._gone = self._gone.plus(worker.work)
        elsewhere = self._done.union(attempt.task.shard for _, attempt in self._attempts())
        lost = [attempt.task for attempt in worker.attempts if attempt.task.shard not in elsewhere]
        self._queue.extendleft(reversed(lost))
        with suppress(Exception):
            ray.kill(worker.actor)

    def _end_silent(self) -> None:
        """Replace workers that give no sign, or whose start does not end."""
        now = time.monotonic()
        for worker in list(self._pool):
            if worker.starting is not None:
                if worker.node and now - worker.placed > _START_S:
                    self._bury(worker, f"a worker that was not ready after {_START_S:g} s was ended")
            elif any(now - attempt.heard > _SILENCE_S for attempt in worker.attempts):
                self._bury(worker, f"a worker that gave no sign for {_SILENCE_S:g} s was ended")


def _lost_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
