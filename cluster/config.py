"""Where work runs: the Ray cluster and the MLflow tracking server."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ClusterConfig(BaseModel):
    """Empty addresses mean: this machine's own, started and stopped by the command that needs it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ray_address: str = Field(
        default="", description="Address of a running Ray cluster (host:port or ray://); empty starts a local one."
    )
    ray_auth: Literal["disabled", "token"] = Field(
        default="disabled", description="How Ray's own processes prove who they are; token reads ~/.ray/auth_token."
    )
    tracking_uri: str = Field(
        default="", description="http(s):// address of an MLflow server; empty uses the workspace's own."
    )
    num_cpus: int = Field(default=0, ge=0, description="CPUs that a local Ray may use; 0 takes all.")
