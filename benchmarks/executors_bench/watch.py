"""Peak memory while an executor runs: of Ray's object store, and of all processes together."""

import threading
from typing import Self

import psutil
import ray
from ray._private.internal_api import node_stats

_EVERY_S = 0.2


class Watch:
    """Looks five times a second, from a thread.

    Attributes:
        store: Most bytes in the object store.
        memory: Most bytes of this process and all its descendants, what they share counted once (PSS).
        largest: Most bytes of one process of its own (USS).
        cpu: CPU seconds of each process when it was last seen.
    """

    def __init__(self) -> None:
        self.store = self.memory = self.largest = 0
        self.cpu: dict[int, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()
        self._add_up()

    def _look(self) -> None:
        node, turn = ray.nodes()[0], 0
        place = node["NodeManagerAddress"], node["NodeManagerPort"]
        while not self._over.wait(_EVERY_S):
            stats = node_stats(*place, include_memory_info=False).store_stats
            self.store = max(self.store, stats.object_store_bytes_used)
            turn += 1
            if turn % 5 == 0:  # reading every process's map takes long
                self._add_up()

    def _add_up(self) -> None:
        total, me = 0, psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                full, times = process.memory_full_info(), process.cpu_times()
            except psutil.Error:  # it has ended
                continue
            self.cpu[process.pid] = times.user + times.system
            total += full.pss
            self.largest = max(self.largest, full.uss)
        self.memory = max(self.memory, total)
