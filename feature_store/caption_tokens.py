"""Caption text → word pieces, a few thousand captions at a time (captions → tokens)."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from feature_store.caption_table import CaptionTable, TableWriter, VideoCaptions
from feature_store.config import CaptionConfig
from feature_store.tokenizer import Tokenizer

BATCH = 4096

Table = tuple[Sequence[bytes], CaptionTable]  # ids of the videos, and their captions


class Texts:
    """All captions of some tables as strings, as often as one likes."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = tables

    def __iter__(self) -> Iterator[str]:
        for _, captions in iter_videos(self.tables):
            yield from captions.texts()


def iter_videos(tables: Sequence[Table]) -> Iterator[tuple[bytes, VideoCaptions]]:
    """Every video, also one without captions (any more); of one in several tables the first counts."""
    seen: set[bytes] = set()
    for ids, table in tables:
        yield from ((key, table.video(number)) for number, key in enumerate(ids) if key not in seen)
        seen.update(ids)


def tokenise(
    folder: Path, tables: Sequence[Table], tokenizer: Tokenizer, dtype: str, cfg: CaptionConfig
) -> tuple[Table, int, int]:
    """Tokenises tables into one; also how many captions gave no token and were dropped, and how many were cut."""
    writer = TableWriter(folder, dtype)
    ids: list[bytes] = []
    dropped = cut = 0
    for group in _groups(iter_videos(tables)):
        texts = [text[: cfg.max_chars] for _, _, lines in group for text in lines]
        encoded = iter(tokenizer.encode_many(texts))
        for key, captions, lines in group:
            whole = [next(encoded) for _ in lines]
            made = with_tokens(captions, [found[: cfg.max_tokens] for found in whole], dtype)
            dropped += len(captions.start_ms) - len(made.start_ms)
            cut += sum(
                len(line) > cfg.max_chars or len(found) > cfg.max_tokens
                for line, found in zip(lines, whole, strict=True)
            )
            writer.append(made)
            ids.append(key)
    arrays = writer.finish()
    return (ids, CaptionTable.open(folder, arrays)), dropped, cut


def with_tokens(captions: VideoCaptions, pieces: Sequence[Sequence[int]], dtype: str) -> VideoCaptions:
    """The same captions with these tokens each; those without any are dropped."""
    ntok = np.fromiter(map(len, pieces), np.uint16, len(pieces))
    keep = ntok > 0
    return VideoCaptions(
        captions.start_ms[keep],
        captions.end_ms[keep],
        ntok[keep],
        captions.ntext[keep],
        np.fromiter(chain.from_iterable(pieces), np.dtype(dtype)),
        captions.text[np.repeat(keep, captions.ntext)],
    )


def _groups(
    videos: Iterator[tuple[bytes, VideoCaptions]],
) -> Iterator[list[tuple[bytes, VideoCaptions, list[str]]]]:
    """Videos together until there is enough to tokenise in parallel."""
    group: list[tuple[bytes, VideoCaptions, list[str]]] = []
    size = 0
    for key, captions in videos:
        group.append((key, captions, captions.texts()))
        size += 1 + len(captions.ntext)
        if size >= BATCH:
            yield group
            group, size = [], 0
    if group:
        yield group
