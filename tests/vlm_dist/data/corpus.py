"""A small corpus in memory with the columns of a store's index, for tests of sampling that need no files."""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from vlm_dist.data.batch import SpecialIds
from vlm_dist.data.rng import ClipKeys

IDS = SpecialIds(pad=0, cls=101, sep=102, mask=103, vocab_size=400)


@dataclass
class Corpus:
    """Captions and features of V videos; serves as both index and reader."""

    n_rows: np.ndarray
    clip_ptr: np.ndarray
    clip_ntok: np.ndarray
    clip_start_ms: np.ndarray
    clip_end_ms: np.ndarray
    tokens: np.ndarray
    ids: list[str] = field(default_factory=list)
    width: int = 4

    @property
    def caption_ptr(self) -> np.ndarray:
        """(C + 1,) token offsets of the captions."""
        return np.r_[0, self.clip_ntok.astype(np.int64).cumsum()]

    @property
    def tok_ptr(self) -> np.ndarray:
        return self.caption_ptr[self.clip_ptr.astype(np.int64)]

    @property
    def index(self) -> "Corpus":
        return self

    @property
    def num_videos(self) -> int:
        return len(self.n_rows)

    @property
    def status(self) -> np.ndarray:
        return np.zeros(len(self.n_rows), np.uint8)

    def id_list(self) -> list[bytes]:
        return [name.encode() for name in self.ids]

    def find_many(self, video_ids: list[str], /) -> np.ndarray:
        return np.array([self.ids.index(one) if one in self.ids else -1 for one in video_ids], np.int64)

    def feature(self, video: int) -> np.ndarray:
        """Row r of a video says (video, r, 1, 1)."""
        rows = np.arange(self.n_rows[video])
        return np.stack([np.full_like(rows, video), rows, rows * 0 + 1, rows * 0 + 1], 1).astype(np.float16)

    def read_many(self, videos: np.ndarray) -> list[np.ndarray]:
        return [self.feature(int(video)) for video in videos]


def random_corpus(videos: int = 40, seed: int = 0, most_captions: int = 60) -> Corpus:
    """Captions of 1..15 tokens, 0.3..6 s each, with gaps and overlaps; some videos end before their captions do."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, most_captions, videos)
    clips = int(counts.sum())
    length = rng.integers(300, 6000, clips)
    start = np.zeros(clips, np.int64)
    clip_ptr = np.r_[0, counts.cumsum()]
    for begin, end in pairwise(clip_ptr):
        start[begin:end] = np.maximum.accumulate(length[begin:end].cumsum() - length[begin:end]) * 9 // 10
    words = rng.integers(1, 16, clips)
    last = np.maximum.reduceat(start + length, clip_ptr[:-1]) // 1000
    return Corpus(
        n_rows=np.maximum(1, last - rng.integers(-2, 8, videos)).astype(np.uint32),
        clip_ptr=clip_ptr.astype(np.uint64),
        clip_ntok=words.astype(np.uint16),
        clip_start_ms=start.astype(np.uint32),
        clip_end_ms=(start + length).astype(np.uint32),
        tokens=rng.integers(104, 400, int(words.sum())).astype(np.uint16),
        ids=[f"video{i}" for i in range(videos)],
    )


def keys_for(videos: np.ndarray, seed: int = 0) -> ClipKeys:
    """Keys of one clip for each given video, at visits 0, 1, 2, ..."""
    position = np.arange(len(videos), dtype=np.int64)
    return ClipKeys(np.asarray(videos, np.int64), seed, position * 0, position, position * 0)
