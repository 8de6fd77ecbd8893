"""Events of a training run -> where its wall-clock time went: useful updates, and what was lost (after the loop)."""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Goodput:
    """What one command's time was spent on."""

    wall_s: float
    updates: int
    """That were made and kept."""
    update_s: float
    """Median of one, without validation and checkpoints."""
    restarts: int
    made_again: int
    """Updates that a restart took back."""
    skipped: int
    data_wait: float
    """Share of the updates' time in which the next batch was not there."""
    padding: float
    """Share of places that hold nothing; they are not computed."""

    @property
    def share(self) -> float:
        """Of the wall-clock time, from the first sign of the ranks on, that went into updates that were kept."""
        return min(1.0, self.updates * self.update_s / self.wall_s) if self.wall_s else 0.0

    def line(self) -> str:
        """For people."""
        lost = f"{self.restarts} restart{'s' * (self.restarts != 1)} ({self.made_again} updates made again)"
        return (
            f"goodput {self.share:.0%}: {self.updates} updates of {self.update_s:.3g} s in {self.wall_s:.0f} s; "
            f"{lost}, {self.skipped} skipped, {self.data_wait:.1%} waiting for data; "
            f"{self.padding:.0%} of places were padding"
        )


class GoodputLedger:
    """Adds up the events that `run_training` hands on.

    Args:
        places: of a clip, padding included; 0 where clips have no fixed number.
    """

    def __init__(self, places: int = 0) -> None:
        self._places = places
        self._began: float | None = None
        self._first = self._last = 0
        self._attempts = self._again = 0
        self._starting = True
        self._reports: list[dict[str, float]] = []

    def take(self, kind: str, payload: Any) -> None:
        """One event."""
        if kind == "plan":
            self._began = self._began or time.monotonic()
            self._attempts += 1
            self._starting = True
        elif kind == "resumed":
            self._go_on_from(payload["step"])
        elif kind == "step":
            if self._starting:  # without a checkpoint
                self._go_on_from(0)
            self._last = payload.step
            self._reports.append(payload.values)

    def _go_on_from(self, step: int) -> None:
        self._starting = False
        if self._reports:
            self._again += self._last - step
            self._first = min(self._first, step)
        else:
            self._first = step
        self._last = step

    def total(self) -> Goodput | None:
        """None where nothing was reported."""
        if self._began is None or not self._reports:
            return None

        def of(name: str) -> list[float]:
            return [values[name] for values in self._reports if name in values]

        clips, tokens = of("train/clips_per_s"), of("train/tokens_per_s")
        padding = 1 - sum(tokens) / (self._places * sum(clips)) if self._places and tokens and sum(clips) else 0.0
        return Goodput(
            wall_s=time.monotonic() - self._began,
            updates=self._last - self._first,
            update_s=median(of("train/update_s")),
            restarts=self._attempts - 1,
            made_again=self._again,
            skipped=int(max(of("train/skipped_steps"), default=0)),
            data_wait=median(of("train/data_wait_frac")),
            padding=padding,
        )
