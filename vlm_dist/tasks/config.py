"""Where each end task's annotations lie in a workspace, and how they are read (reference facts 4)."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TaskDataConfig(BaseModel):
    """Annotations and features of one end task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = Field(default="", description="Annotation file.")
    store: str = Field(default="", description="Feature store of the task's videos; empty takes the workspace's store.")
    unique_captions: bool = Field(
        default=False, description="Retrieval: rank only the first clip of each distinct caption in held-out and test."
    )
    ties: Literal["average", "pessimistic", "reference"] = Field(
        default="average",
        description="Retrieval: equal scores; average over their orders, or every tied place counted as the code does.",
    )
    train_step: int = Field(
        default=8, ge=1, description="Segmentation: seconds between training windows, at most a window (paper: 16)."
    )
    test_step: int = Field(
        default=16, ge=1, description="Segmentation: seconds between windows at test, at most a window."
    )
