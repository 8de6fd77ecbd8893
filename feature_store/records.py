"""What is known of a video beside its features (videos → features): its record, and the extractor's provenance."""

import hashlib
import json
from functools import cached_property
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Status = Literal["ok", "failed", "overflow"]
Reason = Literal[
    "",
    "missing",
    "empty_file",
    "not_a_video",
    "no_video_stream",
    "zero_seconds",
    "truncated",
    "corrupt",
    "timeout",
    "duplicate",
    "too_long",
    "decoder_crash",
    "worker_crash",
    "bad_shape",
    "bad_dtype",
    "not_finite",
    "all_zero",
    "not_normalised",
    "error",
]


def clean_text(text: object) -> object:
    """Replaces what UTF-8 cannot say (half of a surrogate pair, an undecodable byte of a file name) by `?`."""
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else text


Text = Annotated[str, BeforeValidator(clean_text)]


class VideoRecord(BaseModel):
    """One video's line in a commit record: where its rows are, or why it has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    video_id: Text = Field(description="Any UTF-8 string; unique in a store.")
    path: Text = Field(default="", description="The file it came from, as it was given.")
    status: Status = Field(default="ok", description="overflow: did not fit its shard, planned again in a later one.")
    reason: Reason = Field(default="", description="Short code of a failure, for tables.")
    message: Text = Field(default="", description="The failure in words.")
    n_rows: int = Field(default=0, ge=0, description="Rows of features: seconds of video.")
    row: int = Field(default=0, ge=0, description="First row, counted within the shard.")
    crc32c: int = Field(default=0, ge=0, description="CRC-32C of the video's n_rows x F float16 bytes.")
    decoded_s: float = Field(default=0.0, ge=0, description="Seconds of video that decoded.")
    claimed_s: float = Field(default=0.0, ge=0, description="Seconds that the container claims.")
    seconds: float = Field(default=0.0, ge=0, description="Time spent on the video, in seconds.")
    attempts: int = Field(default=1, ge=1, description="How often it was tried in this shard's attempt.")


class Provenance(BaseModel):
    """What made the features of a store; stores of different provenance are never mixed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    extractor: str = Field(default="s3d", description="Name of the encoder.")
    weights_sha256: str = Field(description="SHA-256 of the weights.")
    weights: str = Field(description="Name of the weights file, or `random seed N`.")
    random_seed: int | None = Field(default=None, description="Seed of random weights; None for trained ones.")
    calibration: str = Field(default="", description="What random weights were calibrated on.")
    layer: str = Field(default="video_embedding", description="Encoder output that is stored.")
    precision: str = Field(default="float32", description="Number format in which the encoder worked.")
    fps: float = Field(default=30.0, gt=0, description="Frames per second handed to the encoder.")
    window: int = Field(default=30, ge=1, description="Frames of one feature row.")
    size: int = Field(default=224, ge=1, description="Side of the square frames, in pixels.")
    normalised: bool = Field(True, description="Whether rows are L2-normalised.")
    decoder: str = Field(default="", description="Decoder and its version.")
    feature_dim: int = Field(default=512, ge=1, description="Width F of a feature row.")

    @cached_property
    def digest(self) -> str:
        """Short name of this provenance in commit records; fields that a later version adds do not change it."""
        told = json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]
