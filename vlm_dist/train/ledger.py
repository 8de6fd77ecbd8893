"""Sums of the steps -> what a run says of itself every so often: means, rates, and where the time went."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_dist.train import distributed


@dataclass(frozen=True)
class StepReport:
    """What a run says of itself every `log_every` steps: means over the steps since the last report."""

    step: int
    values: dict[str, float]


class Ledger:
    """Sums since the last report, and where the time went."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.started = time.perf_counter()
        self.waited = 0.0
        self.updates = 0

    @contextmanager
    def paused(self) -> Generator[None]:
        """Leave the block's time out of the rates: validating and saving are not training."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    def add(self, sums: dict[str, Tensor]) -> None:
        """One micro-batch's sums; they stay on its device."""
        for key, value in sums.items():
            self.sums[key] = self.sums.get(key, 0.0) + value.detach().double()

    def report(
        self,
        step: int,
        summarise: Callable[[dict[str, float]], dict[str, float]],
        device: torch.device,
        extra: dict[str, float],
    ) -> StepReport:
        """Means over ranks since the last report (a collective), then start afresh."""
        keys = sorted(self.sums)
        joined = distributed.all_sum(torch.stack([self.sums[k].reshape(()) for k in keys]).to(device))
        seconds = max(1e-9, time.perf_counter() - self.started)
        sums = dict(zip(keys, joined.tolist(), strict=True))
        values = {f"train/{k}": v for k, v in summarise(sums).items()}
        for key in ("clips", "tokens"):
            if key in sums:
                values[f"train/{key}_per_s"] = sums[key] / seconds
        values["train/data_wait_frac"] = self.waited / seconds
        values["train/update_s"] = seconds / max(1, self.updates)
        values |= {f"train/{k}": v for k, v in extra.items()}
        self._clear()
        return StepReport(step, values)
