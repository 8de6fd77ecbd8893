"""Ray Data: a pool of decoding actors, then a pool of encoding ones, blocks of frames streaming between them
(videos → features).

A row is a second of video, so that batches are full across videos. Rows of one video end up apart and in any order,
and its verdict (broken or not) is known at its end only: a row more per video brings verdict and count, and the driver
joins what belongs together.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import ray.data

from executors_bench.job import Encoder, Job, chunks, keep, refuse
from feature_store.decode import DecodeError

END = -1
ATTEMPTS = 2


class Decode:
    """A video → its seconds, and a last row with the verdict."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields rows; a block goes on its way as soon as it has `target_max_block_size` bytes."""
        known = {"video": row["video"], "count": 0, "reason": ""}
        second = 0
        try:
            for part in chunks(self.job, row["path"]):
                for frames in part:
                    yield {**known, "second": second, "frames": frames}
                    second += 1
            verdict = {**known, "count": second}
        except DecodeError as error:
            verdict = {**known, "count": -1, "reason": error.reason}
        nothing = np.zeros((self.job.fps, self.job.size, self.job.size, 3), np.uint8)
        yield {**verdict, "second": END, "frames": nothing}


class Encode:
    """A batch of seconds → their rows of features."""

    def __init__(self, job: Job) -> None:
        self.encode = Encoder(job)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Encodes what is not a verdict."""
        frames, real = batch.pop("frames"), batch["second"] != END
        rows = np.zeros((len(real), 512), np.float16)
        if real.any():
            rows[real] = self.encode(frames[real])
        return {**batch, "row": rows}


def run(job: Job) -> None:
    """Stream the corpus through both pools, and join the rows of each video."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = job.batch_seconds * job.fps * job.size * job.size * 3
    context.max_errored_blocks = -1  # else the first video that takes its decoder down twice ends the run
    items = [{"video": video, "path": path} for video, path in job.videos]
    settings: dict[str, Any] = {"fn_constructor_args": (job,), "num_cpus": 2 / (job.decoders + job.encoders)}
    rows = (
        ray.data.from_items(items, override_num_blocks=len(items))
        # Without a limit of attempts Ray Data tries for ever; a task that waits at a dying actor loses one as well.
        .flat_map(Decode, compute=_pool(job.decoders, job.balanced, 1), max_task_retries=ATTEMPTS - 1, **settings)
        .map_batches(Encode, compute=_pool(job.encoders, job.balanced), batch_size=job.batch_seconds, **settings)
    )
    parts: dict[str, dict[int, np.ndarray]] = {video: {} for video, _ in job.videos}
    counts: dict[str, int] = {}
    for row in rows.iter_rows():
        video = row["video"]
        if row["second"] != END:
            parts[video][row["second"]] = row["row"]
        else:
            counts[video] = row["count"]
            if row["reason"]:
                refuse(job, video, row["reason"])
        if len(parts[video]) == counts.get(video):
            keep(job, video, [np.stack([parts[video][k] for k in range(counts[video])])])
            del parts[video]
    for video in parts.keys() - counts.keys():
        refuse(job, video, "decoder_crash")


def _pool(most: int, balanced: bool, in_flight: int | None = None) -> ray.data.ActorPoolStrategy:
    if balanced:
        return ray.data.ActorPoolStrategy(min_size=1, max_size=most, max_tasks_in_flight_per_actor=in_flight)
    return ray.data.ActorPoolStrategy(size=most, max_tasks_in_flight_per_actor=in_flight)
