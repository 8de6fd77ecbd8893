"""What the next snapshot is to hold: its videos, its captions, what is said of videos by id (see snapshot.py)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from feature_store.caption_table import CaptionTable


@dataclass(frozen=True)
class VideoColumns:
    """The videos with features, sorted by id, and the count of the others by reason."""

    ids: list[bytes]
    shard: np.ndarray
    row: np.ndarray
    n_rows: np.ndarray
    crc32c: np.ndarray
    failed: dict[str, int]

    def same(self, other: "VideoColumns") -> bool:
        """Whether nothing changed."""
        columns = ((self.shard, other.shard), (self.row, other.row), (self.n_rows, other.n_rows))
        return (
            self.failed == other.failed
            and self.ids == other.ids
            and all(np.array_equal(a, b) for a, b in (*columns, (self.crc32c, other.crc32c)))
        )

    def without(self, ids: Collection[bytes]) -> Self:
        """The videos that are not among these."""
        if not ids:
            return self
        gone = set(ids)
        keep = np.fromiter((video_id not in gone for video_id in self.ids), np.bool_, len(self.ids))
        columns = (self.shard, self.row, self.n_rows, self.crc32c)
        return type(self)(
            [video_id for video_id, kept in zip(self.ids, keep, strict=True) if kept],
            *(column[keep] for column in columns),
            failed=self.failed,
        )


@dataclass(frozen=True)
class Captions:
    """All captions that a snapshot is to hold: tables with the ids of their videos, and how they were made."""

    tables: Sequence[tuple[Sequence[bytes], CaptionTable]] = ()  # of an id in several tables the first counts
    tokenizer: Path | None = None
    token_dtype: str = "uint16"
    details: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Marks:
    """What is said of videos by id: which are deleted, and which make a named split."""

    deleted: Sequence[bytes] = ()
    splits: Mapping[str, Sequence[bytes]] = field(default_factory=dict[str, Sequence[bytes]])


@dataclass(frozen=True)
class Draft:
    """All that a snapshot is to hold."""

    videos: VideoColumns
    captions: Captions
    marks: Marks
