"""cosmos-xenna: stages whose processes a loop in the driver feeds and moves between stages (videos → features).

A stage returns a list, so the frames of a whole video lie in memory between decoding and encoding.
"""

from typing import NamedTuple

import numpy as np
from cosmos_xenna.pipelines import v1 as pipelines  # pyright: ignore[reportMissingImports]

from executors_bench.job import Encoder, Job, chunks, keep, refuse
from feature_store.decode import DecodeError


class Decoded(NamedTuple):
    """All frames of one video, or the reason why there are none."""

    video: str
    parts: list[np.ndarray]
    reason: str


class _Stage(pipelines.Stage):
    def __init__(self, job: Job) -> None:
        self.job = job

    @property
    def stage_batch_size(self) -> int:
        return 1

    @property
    def required_resources(self) -> pipelines.Resources:
        return pipelines.Resources(cpus=2 / (self.job.decoders + self.job.encoders))


class Decode(_Stage):
    """A video → its frames."""

    def process_data(self, in_data: list[list[str]]) -> list[Decoded]:
        """Decodes one video."""
        ((video, path),) = in_data
        try:
            return [Decoded(video, list(chunks(self.job, path)), "")]
        except DecodeError as error:
            return [Decoded(video, [], error.reason)]


class Encode(_Stage):
    """A video's frames → its file."""

    def setup(self, worker_metadata: pipelines.WorkerMetadata) -> None:
        """Loads the network."""
        self.encode = Encoder(self.job)

    def process_data(self, in_data: list[Decoded]) -> list[str]:
        """Encodes one video."""
        (decoded,) = in_data
        if decoded.reason:
            refuse(self.job, decoded.video, decoded.reason)
        else:
            keep(self.job, decoded.video, [self.encode(part) for part in decoded.parts])
        return [decoded.video]


def run(job: Job) -> None:
    """Stream the corpus through both stages; fewest possible finished videos wait between them."""
    decoders, encoders = (None, None) if job.balanced else (job.decoders, job.encoders)
    stages = [
        pipelines.StageSpec(Decode(job), num_workers=decoders),
        pipelines.StageSpec(Encode(job), num_workers=encoders),
    ]
    streaming = pipelines.StreamingSpecificSpec(autoscale_interval_s=5.0, max_queued_lower_bound=1)
    config = pipelines.PipelineConfig(cpu_allocation_percentage=1.0, mode_specific=streaming)
    pipelines.run_pipeline(pipelines.PipelineSpec(job.videos, stages, config))
