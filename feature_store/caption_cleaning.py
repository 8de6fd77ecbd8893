"""A video's captions as a file has them → those that can be used: text, times, no repeats (captions → tokens)."""

import math
from collections import Counter
from random import Random

from feature_store.caption_files import RawCaptions
from feature_store.dedup import Caption, deduplicate_reference, deduplicate_words
from feature_store.records import clean_text
from vlm_dist.errors import StoreError

_U32 = 2**32 - 1
_FOREVER_S = 1e300


def clean_captions(raw: RawCaptions, rule: str, counts: Counter[str]) -> list[Caption]:
    """The usable captions of a video in milliseconds, by start; adds what was dropped to `counts`."""
    captions: list[Caption] = []
    for start_s, end_s, text in zip(raw.starts, raw.ends, raw.texts, strict=True):
        start, end = _milliseconds(raw.video_id, start_s), _milliseconds(raw.video_id, end_s)
        line = str(clean_text(text)).replace("\n", " ").strip() if isinstance(text, str) else ""
        if not line:
            counts["no_text"] += 1
        elif start is None or end is None or max(start, 0) >= end:
            counts["bad_times"] += 1
        else:
            counts["clipped"] += start < 0
            # No video is as long as what a column can say: the rest goes where it is cut at the end of its own.
            captions.append(Caption(min(max(start, 0), _U32 - 1), min(end, _U32), line))
    captions.sort(key=lambda caption: caption.start)
    repeats = 0
    if rule == "words":
        captions, repeats = deduplicate_words(captions)
    elif rule == "reference":
        captions, repeats = deduplicate_reference(captions, Random(raw.video_id))
    counts["duplicates"] += repeats
    kept = [caption for caption in captions if caption.start < caption.end]
    counts["bad_times"] += len(captions) - len(kept)
    return sorted(kept, key=lambda caption: caption.start)  # what is left of a repeat starts later than it did


def _milliseconds(video_id: str, value: object) -> int | None:
    """A time of a caption file in whole milliseconds, a very late one for infinity; None for null and NaN."""
    try:
        seconds = math.nan if value is None or value == "" else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise StoreError(f"captions of video {video_id}: {value!r:.60} is not a time in seconds") from None
    return None if math.isnan(seconds) else round(max(-_FOREVER_S, min(seconds, _FOREVER_S)) * 1000)
