"""One thing that is wrong with a store (under inspection and verify)."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["metadata", "plan", "commit", "shard", "chunk", "video", "index", "captions", "stray"]


class Problem(BaseModel):
    """One thing that is wrong."""

    model_config = ConfigDict(frozen=True)

    kind: Kind
    where: str = Field(description="The file, and shard, chunk or video.")
    message: str
