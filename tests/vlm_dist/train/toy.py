"""A job of a few milliseconds a step: regression on rows that depend on the step alone."""

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm_dist.errors import TaskDataError
from vlm_dist.train import distributed
from vlm_dist.train.config import OptimConfig, TrainConfig
from vlm_dist.train.engine import Engine
from vlm_dist.train.loop import Objective

ROWS = 8


@dataclass(frozen=True)
class ToyJob:
    """`kill_at`: rank 1 kills itself before this step, once. `fail_at`: every rank raises a user's error there.
    `hang_at`: rank 1 does nothing any more there, once."""

    out: str
    train: TrainConfig
    steps: int = 20
    kill_at: int = -1
    fail_at: int = -1
    hang_at: int = -1
    pause_s: float = 0.0
    about: dict[str, str] = field(default_factory=dict[str, str])
    deadline: float | None = None

    def build(self, device: torch.device) -> "ToyObjective":
        return ToyObjective(self)


class ToyObjective(Objective):
    def __init__(self, job: ToyJob) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.GELU(), nn.Linear(8, 1))
        self.job = job
        self.optim = OptimConfig(lr=1e-2, warmup_steps=2)
        self.total_steps = job.steps
        self.accumulation = 1
        self.validate_every = 10

    def micro_batches(self, step: int) -> list[Any]:
        if step == self.job.fail_at:
            raise TaskDataError(f"row 7 of step {step} is not a number")
        marker = Path(self.job.out) / "killed"
        if step == self.job.kill_at and distributed.rank() == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.job.hang_at and distributed.rank() == 1 and not marker.exists():
            marker.touch()
            time.sleep(3600)
        time.sleep(self.job.pause_s)
        rows = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(step))
        return [rows.chunk(distributed.world_size())[distributed.rank()]]

    def prepare(self, micros: list[Any], engine: Engine) -> tuple[list[Any], Any]:
        return [m.to(engine.device) for m in micros], None

    def loss(self, engine: Engine, micro: Any, shared: Any) -> tuple[Tensor, dict[str, Tensor]]:
        error = (engine(micro).squeeze(1) - micro.sum(1)).pow(2).sum()
        return error / ROWS * engine.scale, {"squares": error, "clips": torch.tensor(float(len(micro)))}

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["squares"] / sums["clips"]}

    def validate(self, engine: Engine, step: int) -> dict[str, float]:
        with torch.no_grad():
            rows = torch.randn(32, 4, generator=torch.Generator().manual_seed(10**6))
            error = (engine.module(rows).squeeze(1) - rows.sum(1)).pow(2).mean()
        return {"validation/loss": float(error)}

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / "model.safetensors")
