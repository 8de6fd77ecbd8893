"""Size and density of a training corpus, beside the paper's (section 5.1.1)."""

from typing import Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from vlm_dist.errors import ConfigError


class CorpusStats(TypedDict):
    """Totals and means over videos; every key ending in _paper is the paper's figure for HowTo100M."""

    videos: int
    clips: int
    tokens: int
    hours: float
    seconds_per_video: float
    seconds_per_video_paper: float
    clips_per_video: float
    clips_per_video_paper: float
    tokens_per_video: float
    tokens_per_second: float
    tokens_per_second_paper: float


class _Index(Protocol):
    @property
    def n_rows(self) -> NDArray[np.integer]: ...
    @property
    def clip_ptr(self) -> NDArray[np.integer]: ...
    @property
    def tok_ptr(self) -> NDArray[np.integer]: ...


def corpus_stats(index: _Index, rows: NDArray[np.int64]) -> CorpusStats:
    """Count captions, tokens and seconds of the given videos.

    Args:
        index: of the store (`feature_store.index.StoreIndex`).
        rows: (n,) videos, n >= 1.
    """
    if len(rows) == 0:
        raise ConfigError("statistics need at least one video")
    clips, tokens = (
        int((ptr[rows + 1].astype(np.int64) - ptr[rows].astype(np.int64)).sum())
        for ptr in (index.clip_ptr, index.tok_ptr)
    )
    seconds = int(index.n_rows[rows].astype(np.int64).sum())
    return CorpusStats(
        videos=len(rows),
        clips=clips,
        tokens=tokens,
        hours=seconds / 3600,
        seconds_per_video=seconds / len(rows),
        seconds_per_video_paper=6.5 * 60,
        clips_per_video=clips / len(rows),
        clips_per_video_paper=110.0,
        tokens_per_video=tokens / len(rows),
        tokens_per_second=tokens / max(seconds, 1),
        tokens_per_second_paper=2.4,
    )
