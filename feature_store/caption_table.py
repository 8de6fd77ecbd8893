"""Captions and their tokens as columns, ragged over videos (captions → index)."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np

from feature_store.arrays import ArrayInfo, ColumnWriter, open_column, write_column
from feature_store.files import crc32c

CLIP_COLUMNS = ("clip_start_ms", "clip_end_ms", "clip_ntok", "clip_ntext")
SPOKEN = ("clip_ptr", "text_ptr", "clip_start_ms", "clip_end_ms", "clip_ntext", "text")  # what is not of tokens
COLUMNS = ("clip_ptr", "tok_ptr", "text_ptr", *CLIP_COLUMNS, "tokens", "text", "caption_crc32c")


@dataclass(frozen=True, slots=True)
class VideoCaptions:
    """The C captions of one video."""

    start_ms: np.ndarray  # (C,) u32
    end_ms: np.ndarray  # (C,) u32
    ntok: np.ndarray  # (C,) u16, tokens of each caption
    ntext: np.ndarray  # (C,) u32, UTF-8 bytes of each caption
    tokens: np.ndarray  # (sum of ntok,) u16 or u32
    text: np.ndarray  # (sum of ntext,) u8

    def within(self, limit_ms: int) -> Self:
        """Captions that start before `limit_ms`, cut off there; the same object where nothing changes."""
        if not len(self.end_ms) or int(self.end_ms.max()) <= limit_ms:
            return self
        keep = self.start_ms < limit_ms
        return type(self)(
            self.start_ms[keep],
            np.minimum(self.end_ms, np.uint32(limit_ms))[keep],
            self.ntok[keep],
            self.ntext[keep],
            self.tokens[np.repeat(keep, self.ntok)],
            self.text[np.repeat(keep, self.ntext)],
        )

    def texts(self) -> list[str]:
        """The captions as strings."""
        raw, ends = self.text.tobytes(), np.cumsum(self.ntext, dtype=np.int64).tolist()
        return [raw[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]

    def crc32c(self) -> int:
        """Checksum over all of it; 0 for no captions."""
        crc = 0
        for column in (self.start_ms, self.end_ms, self.ntok, self.ntext, self.tokens, self.text):
            crc = crc32c(np.ascontiguousarray(column), crc)
        return crc


@dataclass(frozen=True, slots=True)
class CaptionTable:
    """Captions of V videos in columns (memory-mapped); which videos they are, its owner knows."""

    clip_ptr: np.ndarray  # (V+1,) i64 into the clip columns
    tok_ptr: np.ndarray  # (V+1,) i64 into tokens
    text_ptr: np.ndarray  # (V+1,) i64 into text
    clip_start_ms: np.ndarray  # (C,) u32
    clip_end_ms: np.ndarray  # (C,) u32
    clip_ntok: np.ndarray  # (C,) u16
    clip_ntext: np.ndarray  # (C,) u32
    tokens: np.ndarray  # (T,) u16 or u32
    text: np.ndarray  # UTF-8 bytes
    caption_crc32c: np.ndarray  # (V,) u32

    @classmethod
    def open(cls, folder: Path, arrays: dict[str, ArrayInfo]) -> Self:
        """Memory-maps the columns that `TableWriter` wrote."""
        return cls(*(open_column(folder, name, arrays[name]) for name in COLUMNS))

    def spoken(self, number: int) -> VideoCaptions:
        """Times and text of one video's captions, without tokens."""
        clips = slice(int(self.clip_ptr[number]), int(self.clip_ptr[number + 1]))
        text = slice(int(self.text_ptr[number]), int(self.text_ptr[number + 1]))
        ntok = np.zeros(clips.stop - clips.start, np.uint16)
        return VideoCaptions(
            self.clip_start_ms[clips], self.clip_end_ms[clips], ntok, self.clip_ntext[clips], self.tokens[:0],
            self.text[text],
        )  # fmt: skip

    def video(self, number: int) -> VideoCaptions:
        """Captions of one video; views, no copies."""
        clips = slice(int(self.clip_ptr[number]), int(self.clip_ptr[number + 1]))
        tokens = slice(int(self.tok_ptr[number]), int(self.tok_ptr[number + 1]))
        text = slice(int(self.text_ptr[number]), int(self.text_ptr[number + 1]))
        return VideoCaptions(
            self.clip_start_ms[clips],
            self.clip_end_ms[clips],
            self.clip_ntok[clips],
            self.clip_ntext[clips],
            self.tokens[tokens],
            self.text[text],
        )


class TableWriter:
    """Writes a caption table video by video."""

    def __init__(self, folder: Path, token_dtype: str) -> None:
        self._folder = folder
        dtypes = {"clip_ntok": "uint16", "tokens": token_dtype, "text": "uint8"}
        self._columns = {n: ColumnWriter(folder, n, dtypes.get(n, "uint32")) for n in (*CLIP_COLUMNS, "tokens", "text")}
        self._ptr: dict[str, list[int]] = {"clip_ptr": [0], "tok_ptr": [0], "text_ptr": [0]}
        self._crc: list[int] = []

    def append(self, captions: VideoCaptions | None) -> None:
        """Adds the next video; None has no captions."""
        clips, tokens, text = (pointers[-1] for pointers in self._ptr.values())
        crc = 0
        if captions is not None and len(captions.start_ms):
            values = (captions.start_ms, captions.end_ms, captions.ntok, captions.ntext, captions.tokens, captions.text)
            for column, part in zip(self._columns.values(), values, strict=True):
                column.append(part)
            clips, tokens, text = clips + len(captions.start_ms), tokens + len(values[4]), text + len(values[5])
            crc = captions.crc32c()
        for pointers, end in zip(self._ptr.values(), (clips, tokens, text), strict=True):
            pointers.append(end)
        self._crc.append(crc)

    def finish(self) -> dict[str, ArrayInfo]:
        """Closes all columns durably and says what was written."""
        arrays = {name: column.finish() for name, column in self._columns.items()}
        for name, pointers in self._ptr.items():
            arrays[name] = write_column(self._folder, name, np.array(pointers, np.int64))
        arrays["caption_crc32c"] = write_column(self._folder, "caption_crc32c", np.array(self._crc, np.uint32))
        return arrays


def pack_ids(ids: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Ids as (UTF-8 bytes, (V+1,) i64 offsets)."""
    listed = list(ids)
    lengths = np.fromiter(map(len, listed), np.int64, len(listed))
    return np.frombuffer(b"".join(listed), np.uint8), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def unpack_ids(raw: np.ndarray, ptr: np.ndarray) -> list[bytes]:
    """What `pack_ids` packed."""
    data, ends = raw.tobytes(), ptr.tolist()
    return [data[start:end] for start, end in pairwise(ends)]
