"""Random numbers of clips and masks: pure functions of integer keys, the same for any world size, loader and order.

Counter-based (splitmix64's finaliser over a chain of keys), so that any number can be drawn at any time without state.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Self

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


class Stream(IntEnum):
    """What a draw is for; draws of different streams are independent. The numbers are part of the replay promise."""

    ORDER = 0
    CENTRE = 1
    LENGTH = 2
    GROWTH = 3
    MASK_KIND = 4
    MASK_WHICH = 5
    MASK_VIDEO = 6
    MASK_TEXT = 7
    MASK_ACTION = 8
    MASK_TOKEN = 9
    POOL = 10


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit integers so that neighbours share nothing (splitmix64's finaliser)."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def absorb(state: NDArray[np.uint64], key: NDArray[np.integer] | int) -> NDArray[np.uint64]:
    """Take one more integer key into a state; shapes broadcast."""
    # An array in any case: NumPy warns of the wanted overflow in scalars.
    word = key.astype(np.uint64) if isinstance(key, np.ndarray) else np.array([key & _MASK], np.uint64)
    return mix((state ^ mix(word + np.uint64(_GOLDEN))) + np.uint64(_GOLDEN))


def start(seed: int) -> NDArray[np.uint64]:
    """The state of a seed, shape (1,)."""
    return absorb(np.zeros(1, np.uint64), seed)


def to_uniform(state: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The top 53 bits of a state as a number in [0, 1)."""
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class ClipKeys:
    """What decides B clips and their masks, whoever loads them.

    video     (B,) int64, row of the video in the store
    seed      of the run
    epoch     (B,) int64
    position  (B,) int64, number of the video's visit, counted over the whole run
    clip      (B,) int64, number of the clip within the visit
    """

    video: NDArray[np.int64]
    seed: int
    epoch: NDArray[np.int64]
    position: NDArray[np.int64]
    clip: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, clips: slice | NDArray[np.int64]) -> Self:
        """The keys of some of the clips."""
        return type(self)(self.video[clips], self.seed, self.epoch[clips], self.position[clips], self.clip[clips])

    def uniform(self, stream: Stream, counters: NDArray[np.integer] | int = 0) -> NDArray[np.float64]:
        """Draws in [0, 1): (B,) for one counter, (B, n) for n counters."""
        state = absorb(absorb(absorb(start(self.seed), self.epoch), self.position), self.clip)
        state = absorb(state, int(stream))
        if isinstance(counters, np.ndarray):
            return to_uniform(absorb(state[:, None], counters[None, :]))
        return to_uniform(absorb(state, counters))
