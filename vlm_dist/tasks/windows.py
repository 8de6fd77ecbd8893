"""Long videos → overlapping windows → logits of each second again (videos → windows → model → segmentation)."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch


@dataclass(frozen=True)
class Windows:
    """Windows over videos: `video` (W,) into the task's videos and `start` (W,) seconds; a video's come one by one."""

    video: np.ndarray
    start: np.ndarray

    @classmethod
    def over(cls, videos: np.ndarray, seconds: np.ndarray, width: int, step: int) -> Self:
        """Starts 0, step, … up to the first window that reaches the video's end (the last one may be short).

        Args:
            videos: (N,) numbers of the videos.
            seconds: (N,) their lengths, at least 1.
            width: Seconds of a window.
            step: Seconds between starts; at most `width`, or seconds would be left out.
        """
        assert step <= width, f"windows of {width} s every {step} s leave gaps"
        counts = 1 + np.maximum(0, -(-(seconds - width) // step))
        offsets = np.cumsum(counts) - counts
        return cls(np.repeat(videos, counts), (np.arange(counts.sum()) - np.repeat(offsets, counts)) * step)


class MergedLogits:
    """Logits of overlapping windows of one video, averaged for each second."""

    def __init__(self, seconds: int, num_classes: int, device: torch.device) -> None:
        self._sum = torch.zeros(seconds, num_classes, device=device)
        self._count = torch.zeros(seconds, 1, device=device)

    def add(self, logits: torch.Tensor, start: int) -> None:
        """Adds a window's logits (V, classes) from second `start` on; places beyond the video's end are padding."""
        end = min(start + len(logits), len(self._sum))
        self._sum[start:end] += logits[: end - start]
        self._count[start:end] += 1

    def mean(self) -> torch.Tensor:
        """(seconds, classes)."""
        return self._sum / self._count
