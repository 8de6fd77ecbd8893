"""The synthetic corpus of the benchmark: features as the extractor gives them, ids, captions; and a store of it.

Lengths and features follow the store facts (section 4): 60 to 700 seconds, 512 wide, neighbouring seconds alike,
signed, L2-normalised float16. On disk it is one flat file of all rows and the first row of each video.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from store_bench.files import write_synced

WIDTH = 512
LATENT = 64
SHORTEST, LONGEST = 60, 700
SECONDS_PER_CAPTION = 3.5
WORDS_PER_CAPTION = 8
VOCABULARY = 3000
_BLOCK = 50  # videos made at once


@dataclass(frozen=True)
class Corpus:
    """V videos side by side in one mapped array."""

    ptr: np.ndarray  # (V+1,) int64, first row of each video
    rows: np.ndarray  # (R, 512) float16

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """Map what `make_corpus` wrote."""
        return cls(np.load(folder / "ptr.npy"), np.memmap(folder / "flat.f16", "<f2", "r").reshape(-1, WIDTH))

    def __len__(self) -> int:
        return len(self.ptr) - 1

    def __getitem__(self, video: int) -> np.ndarray:
        return self.rows[self.ptr[video] : self.ptr[video + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[video] for video in range(len(self)))


def video_id(video: int) -> str:
    """As long as a YouTube id; in the order of the numbers."""
    return f"v{video:010d}"


def make_corpus(folder: Path, videos: int, seed: int = 0) -> Corpus:
    """Write flat file and offsets, durably (so that the cold part can drop them from the page cache)."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lengths = rng.integers(SHORTEST, LONGEST + 1, videos)
    mixing = rng.standard_normal((LATENT, WIDTH), np.float32)
    blocks = (_features(rng, lengths[k : k + _BLOCK], mixing) for k in range(0, videos, _BLOCK))
    write_synced(folder / "flat.f16", blocks)
    np.save(folder / "ptr.npy", np.concatenate([[0], np.cumsum(lengths)]))
    return Corpus.open(folder)


def _features(rng: np.random.Generator, lengths: np.ndarray, mixing: np.ndarray) -> np.ndarray:
    """(sum of lengths, 512) float16: an AR(1) walk of 64 factors around a part of the video's own, and noise."""
    latent = np.empty((lengths.max(), len(lengths), LATENT), np.float32)
    steps = rng.standard_normal(latent.shape, np.float32)
    latent[0] = steps[0]
    for second in range(1, len(latent)):
        latent[second] = 0.9 * latent[second - 1] + 0.4359 * steps[second]
    parts = []
    for video, seconds in enumerate(lengths):
        own = 4 * rng.standard_normal(WIDTH, np.float32)
        noise = rng.standard_normal((seconds, WIDTH), np.float32)
        rows = latent[:seconds, video] @ mixing + own + noise
        parts.append((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("<f2"))
    return np.concatenate(parts)


def write_caption_file(file: Path, corpus: Corpus, seed: int = 0) -> None:
    """A JSONL caption file: a caption of some 8 words every 3.5 seconds."""
    rng = np.random.default_rng(seed)
    letters = rng.integers(ord("a"), ord("z") + 1, (VOCABULARY, 6)).astype(np.uint8)
    words = [bytes(row[: 3 + number % 4]).decode() for number, row in enumerate(letters)]
    with file.open("w") as out:
        for video in range(len(corpus)):
            seconds = int(corpus.ptr[video + 1] - corpus.ptr[video])
            starts = np.arange(0, seconds - SECONDS_PER_CAPTION, SECONDS_PER_CAPTION)
            lengths = rng.integers(WORDS_PER_CAPTION - 4, WORDS_PER_CAPTION + 5, len(starts))
            drawn = [words[k] for k in rng.integers(VOCABULARY, size=lengths.sum())]
            ends = np.cumsum(lengths)
            line = {
                "video_id": video_id(video),
                "start": starts.tolist(),
                "end": (starts + SECONDS_PER_CAPTION - 0.1).tolist(),
                "text": [" ".join(drawn[end - n : end]) for n, end in zip(lengths, ends, strict=True)],
            }
            out.write(json.dumps(line) + "\n")


def write_store(root: Path, corpus: Corpus) -> None:
    """Our store of the corpus, made as an extraction makes it: planned, staged, committed, finalised."""
    from feature_store.layout import create_store
    from feature_store.plan import PlannedVideo, plan_videos
    from feature_store.records import VideoRecord
    from feature_store.snapshot import finalise
    from feature_store.writer import ShardAttempt

    create_store(root, provenance())
    videos = [PlannedVideo(video_id(video), "") for video in range(len(corpus))]
    while tasks := plan_videos(root, videos, workers=1):
        for task in tasks:
            with ShardAttempt(root, task.shard) as attempt:
                for video in task.videos:
                    attempt.add(VideoRecord(video_id=video.video_id), corpus[int(video.video_id[1:])])
                attempt.commit()
    finalise(root)


def provenance():
    """Of an extractor that does not exist."""
    from feature_store.records import Provenance

    return Provenance(weights_sha256="0" * 64, weights="random seed 0", random_seed=0, feature_dim=WIDTH)
