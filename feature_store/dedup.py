"""Rolling captions → each word once (captions → tokens).

Speech recognition shows captions that roll: the end of one is said again at the start of the next. Both rules walk in
order and compare each caption with the last one kept.
"""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple


class Caption(NamedTuple):
    """One caption; times in any one unit."""

    start: float
    end: float
    text: str


def deduplicate_words(captions: Sequence[Caption]) -> tuple[list[Caption], int]:
    """Cuts the longest run of whole words that ends one caption and begins the next off the latter.

    Captions of two, three or more rows that roll by one come out a row at a time, because each is compared with all
    that the one before showed, also with the rows that were cut off that one.

    Args:
        captions: by start; none without a word.

    Returns:
        The captions that are left, and how many were cut or dropped.
    """
    kept: list[Caption] = []
    shown: list[str] = []  # words of the caption before, whole
    repeats = 0
    for caption in captions:
        current = caption.text.split()
        overlap = _overlap(shown, current)
        if not overlap:
            kept.append(caption)
            shown = current
            continue
        repeats += 1
        last, rest = kept[-1], " ".join(current[overlap:])
        if not rest:
            kept[-1] = last._replace(end=max(last.end, caption.end))
            continue
        if overlap == len(shown):  # the caption before has grown
            kept[-1] = last._replace(end=max(last.end, caption.end), text=f"{last.text} {rest}")
        else:
            kept[-1] = last = last._replace(end=max(last.end, caption.start))
            start = last.end if last.end < caption.end else caption.start  # what is left keeps some time of its own
            kept.append(Caption(start, caption.end, rest))
        shown = current
    return kept, repeats


def deduplicate_reference(captions: Sequence[Caption], coin: Random) -> tuple[list[Caption], int]:
    """The reference implementation's rule, for comparison with it: shortest run of characters, a coin decides the side.

    One shared letter counts, so that "take the", "eggs" may become "take the", "ggs" (reference facts 3.2).

    Returns:
        The captions that are left, and how many were cut or dropped.
    """
    kept: list[Caption] = []
    repeats = 0
    for caption in captions:
        start, end, text = caption
        last = kept[-1] if kept else None
        size = next((k for k in range(1, len(text) + 1) if last and last.text.endswith(text[:k])), 0)
        if last is None:
            kept.append(caption)
        elif last.text.endswith(text):
            kept[-1] = last._replace(end=max(last.end, end))
        elif text.startswith(last.text):
            kept[-1] = Caption(min(last.start, start), max(last.end, end), text)
        elif not size:
            kept.append(caption)
            continue
        elif coin.random() > 0.5:
            kept[-1] = last = last._replace(end=max(last.end, start))
            if rest := text[size:].strip():
                kept.append(Caption(last.end, max(end, last.end), rest))
        else:
            rest = last.text[:-size].strip()
            kept[-1:] = [last._replace(end=min(last.end, start), text=rest)] if rest else []
            kept.append(caption)
        repeats += last is not None
    return kept, repeats


def _overlap(last: list[str], current: list[str]) -> int:
    """Length of the longest run of words that ends `last` and begins `current`."""
    for start in range(max(0, len(last) - len(current)), len(last)):
        if last[start] == current[0] and last[start:] == current[: len(last) - start]:
            return len(last) - start
    return 0
