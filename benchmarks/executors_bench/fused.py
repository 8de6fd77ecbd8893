"""One Ray actor decodes and encodes, a video after another, as `vlm-dist extract` does (videos → features).

No overlap and nothing to balance: both cores do both. The driver is as short as it can be, without attempts and limits.
"""

from collections import deque
from typing import Any

import ray

from executors_bench.job import Encoder, Job, chunks, keep, refuse
from feature_store.decode import DecodeError


class Worker:
    """Holds the network."""

    def __init__(self, job: Job) -> None:
        self.job, self.encode = job, Encoder(job)

    def extract(self, video: str, path: str) -> None:
        """One video, to its file."""
        try:
            keep(self.job, video, [self.encode(part) for part in chunks(self.job, path)])
        except DecodeError as error:
            refuse(self.job, video, error.reason)


def run(job: Job) -> None:
    """Hand each idle actor the next video."""
    made: Any = ray.remote(num_cpus=1)(Worker)
    workers: list[Any] = [made.remote(job) for _ in range(job.decoders + job.encoders)]
    waiting = deque(job.videos)
    running = {worker.extract.remote(*waiting.popleft()): worker for worker in workers if waiting}
    while running:
        (ready,), _ = ray.wait(list(running))
        worker = running.pop(ready)
        ray.get(ready)
        if waiting:
            running[worker.extract.remote(*waiting.popleft())] = worker
