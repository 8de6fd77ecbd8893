"""Clips of a batch: a run of captions around a random one, and the seconds of video beside it (reference facts 3.3).

Everything is drawn and gathered for the whole batch at once. Times are integer milliseconds, video rows are seconds.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vlm_dist.data.batch import IGNORE, ClipBatch, SpecialIds
from vlm_dist.data.config import ClipConfig
from vlm_dist.data.rng import ClipKeys, Stream
from vlm_dist.model.config import ModelConfig

Ints = NDArray[np.int64]


class CaptionIndex(Protocol):
    """The part of `feature_store.index.StoreIndex` that clips need: captions of all videos, in flat arrays."""

    @property
    def n_rows(self) -> NDArray[np.integer]: ...
    @property
    def clip_ptr(self) -> NDArray[np.integer]: ...
    @property
    def tok_ptr(self) -> NDArray[np.integer]: ...
    @property
    def clip_ntok(self) -> NDArray[np.integer]: ...
    @property
    def clip_start_ms(self) -> NDArray[np.integer]: ...
    @property
    def clip_end_ms(self) -> NDArray[np.integer]: ...
    @property
    def tokens(self) -> NDArray[np.integer]: ...


class ClipSource(Protocol):
    """The part of `feature_store.reader.FeatureReader` that clips need."""

    @property
    def index(self) -> CaptionIndex: ...
    def read_many(self, videos: NDArray[np.int64]) -> list[NDArray[np.float16]]: ...


@dataclass(frozen=True)
class Captions:
    """The captions of a batch's videos side by side, and each clip's own; all int64.

    begin, end            (B,) captions of the clip's video, numbered within this table; the end is exclusive
    number                (c,) number of a caption in the store
    start_ms, end_ms      (c,) times
    token, token_end      (c,) its range in the store's tokens; captions of a video follow each other there
    """

    begin: Ints
    end: Ints
    number: Ints
    start_ms: Ints
    end_ms: Ints
    token: Ints
    token_end: Ints


@dataclass(frozen=True)
class Spans:
    """B clips as ranges over the whole store, (B,) int64 each; ends are exclusive.

    first, last        captions
    token, token_end   tokens of those captions, not cut
    row, row_end       feature rows of the video, at most max_video_len
    """

    first: Ints
    last: Ints
    token: Ints
    token_end: Ints
    row: Ints
    row_end: Ints


def gather_captions(index: CaptionIndex, videos: Ints) -> Captions:
    """Read the captions of the given videos, (B,); every one must have some (`splits` sees to it)."""
    unique, which = np.unique(videos, return_inverse=True)
    begin = _at(index.clip_ptr, unique)
    counts = _at(index.clip_ptr, unique + 1) - begin
    assert (counts > 0).all(), "a video without captions has no clips"
    ptr = np.concatenate([[0], counts.cumsum()])
    number = np.arange(ptr[-1]) + np.repeat(begin - ptr[:-1], counts)
    length = _at(index.clip_ntok, number)
    # The store has one token offset for a video; the captions' own follow from their lengths.
    token_end = length.cumsum()
    before = (token_end - length)[ptr[:-1]]
    token_end += np.repeat(_at(index.tok_ptr, unique) - before, counts)
    return Captions(
        begin=ptr[which],
        end=ptr[which + 1],
        number=number,
        start_ms=_at(index.clip_start_ms, number),
        end_ms=_at(index.clip_end_ms, number),
        token=token_end - length,
        token_end=token_end,
    )


def sample_spans(index: CaptionIndex, keys: ClipKeys, cfg: ClipConfig, max_video_len: int) -> Spans:
    """Draw one span for each key: a uniform centre caption and a uniform wanted length, then growth."""
    captions = gather_captions(index, keys.video)
    centre = captions.begin + (keys.uniform(Stream.CENTRE) * (captions.end - captions.begin)).astype(np.int64)
    choices = cfg.max_text_tokens - cfg.min_text_tokens + 1
    wanted = cfg.min_text_tokens + (keys.uniform(Stream.LENGTH) * choices).astype(np.int64)
    first, last = grow(captions, keys, centre, wanted, cfg.max_span_s)
    row, row_end = video_rows(
        captions.start_ms[first], captions.end_ms[last - 1], _at(index.n_rows, keys.video), max_video_len
    )
    return Spans(
        first=captions.number[first],
        last=captions.number[last - 1] + 1,
        token=captions.token[first],
        token_end=captions.token_end[last - 1],
        row=row,
        row_end=row_end,
    )


def grow(captions: Captions, keys: ClipKeys, centre: Ints, wanted: Ints, max_span_s: float) -> tuple[Ints, Ints]:
    """Add whole captions on a random side until a clip has its wanted tokens, its longest span, or no neighbour.

    Each step tosses a fair coin: right if it says so and there is a right neighbour, else left if there is one, else
    right.

    Returns:
        First caption and end (exclusive) of each clip, (B,) int64, numbered within the table.
    """
    first, last = centre.copy(), centre + 1
    growing = np.arange(len(keys))
    step = 0
    while True:
        lo, hi = first[growing], last[growing]
        tokens = captions.token_end[hi - 1] - captions.token[lo]
        span = captions.end_ms[hi - 1] - captions.start_ms[lo]
        left, right = lo > captions.begin[growing], hi < captions.end[growing]
        more = (tokens < wanted[growing]) & (span < max_span_s * 1000) & (left | right)
        growing, left, right = growing[more], left[more], right[more]
        if len(growing) == 0:
            return first, last
        coin = keys[growing].uniform(Stream.GROWTH, step) > 0.5
        to_right = right & (coin | ~left)
        last[growing] += to_right
        first[growing] -= ~to_right
        step += 1


def video_rows(start_ms: Ints, end_ms: Ints, n_rows: Ints, max_video_len: int) -> tuple[Ints, Ints]:
    """Seconds that a time span touches: floor(start)..ceil(end), inside the video, the first max_video_len of them."""
    row = np.minimum(start_ms // 1000, n_rows)
    row_end = np.minimum(-(-end_ms // 1000), n_rows)
    return row, np.minimum(np.maximum(row_end, row), row + max_video_len)


def load_clips(
    reader: ClipSource, keys: ClipKeys, cfg: ClipConfig, model_cfg: ModelConfig, ids: SpecialIds
) -> ClipBatch:
    """Draw the clips of `keys` and read their features and tokens; nothing is masked yet.

    Returns:
        V = max_video_len and T = max_len - max_video_len places, features float16 as stored.
    """
    spans = sample_spans(reader.index, keys, cfg, model_cfg.max_video_len)
    text, text_mask = layout_text(reader.index.tokens, spans.token, spans.token_end, model_cfg, ids)
    video, video_mask = _gather_video(reader, keys.video, spans, model_cfg.max_video_len)
    return ClipBatch(
        video=torch.from_numpy(video),
        video_mask=torch.from_numpy(video_mask),
        video_labels=torch.zeros(video_mask.shape, dtype=torch.bool),
        text=torch.from_numpy(text),
        text_mask=torch.from_numpy(text_mask),
        text_labels=torch.full(text.shape, IGNORE),
    )


def layout_text(
    tokens: NDArray[np.integer], begin: Ints, end: Ints, model_cfg: ModelConfig, ids: SpecialIds
) -> tuple[Ints, NDArray[np.bool_]]:
    """Lay out token ranges as [CLS] [SEP] w1..wn [SEP] [PAD].., cut at the text budget (reference facts 1.1).

    Args:
        tokens: flat ids of all captions.
        begin: (B,) first token of each clip.
        end: (B,) its end, exclusive.
        model_cfg: gives the budget and T.
        ids: special tokens.

    Returns:
        (B, T) ids and (B, T) bool mask.
    """
    budget = model_cfg.max_text_len
    length = np.minimum(end - begin, budget)
    places = np.arange(budget)
    inside = places < length[:, None]
    text = np.full((len(begin), budget + 3), ids.pad, np.int64)
    text[:, 0], text[:, 1] = ids.cls, ids.sep
    text[:, 2:-1][inside] = tokens[(begin[:, None] + places)[inside]]
    text[np.arange(len(begin)), length + 2] = ids.sep
    return text, np.arange(budget + 3) < length[:, None] + 3


def _gather_video(
    reader: ClipSource, videos: Ints, spans: Spans, max_video_len: int
) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
    """(B, V, F) features and (B, V) mask; every video is read once, however many clips it has."""
    unique, which = np.unique(videos, return_inverse=True)
    features = reader.read_many(unique)
    base = np.cumsum([0, *(len(part) for part in features)])[which]
    places = np.arange(max_video_len)
    mask = places < (spans.row_end - spans.row)[:, None]
    out = np.zeros((*mask.shape, features[0].shape[1]), features[0].dtype)
    out[mask] = np.concatenate(features)[((base + spans.row)[:, None] + places)[mask]]
    return out, mask


def _at(values: NDArray[np.integer], where: Ints) -> Ints:
    # Unsigned columns of the store would wrap around in differences.
    return values[where].astype(np.int64)
