"""Clip sampling: the reference's spans and statistics, its rules on random corpora, and what is loaded."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vlm_dist.data.corpus import IDS, Corpus, keys_for, random_corpus
from vlm_dist.data.clips import gather_captions, grow, load_clips, sample_spans, video_rows
from vlm_dist.data.config import ClipConfig
from vlm_dist.data.sampler import GlobalOrder
from vlm_dist.model.config import ModelConfig

MODEL = ModelConfig()


@pytest.fixture(scope="module")
def golden(shared):
    with np.load(shared / "golden" / "sampling.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture(scope="module")
def golden_corpus(golden) -> Corpus:
    """The one video of the reference's draws."""
    caption = golden["cap"]
    return Corpus(
        n_rows=np.array([int(golden["feat_len"])]),
        clip_ptr=np.array([0, len(caption)]),
        clip_ntok=(caption >= 0).sum(1),
        clip_start_ms=np.round(golden["start"] * 1000).astype(np.uint32),
        clip_end_ms=np.round(golden["end"] * 1000).astype(np.uint32),
        tokens=caption[caption >= 0],
    )


def test_growth_can_reach_every_span_of_the_reference_and_stays_beside_it(golden, golden_corpus):
    """Coins differ, so the reference's span must be among the few that the same centre and length can grow to."""
    for centre, wanted, (_, _, first, last) in zip(
        golden["center"], golden["sampled_len"], golden["spans"], strict=True
    ):  # fmt: skip
        tries = keys_for(np.zeros(2000), seed=int(centre))
        begin, end = grow(
            gather_captions(golden_corpus, tries.video), tries, np.full(2000, centre), np.full(2000, wanted), 256.0
        )
        found = set(zip(begin.tolist(), end.tolist(), strict=True))
        assert (first, last) in found
        # After k coins there are at most k + 1 spans, and each one stopped at its own k.
        assert len(found) <= 2 * (max(e - b for b, e in found))


def test_rows_and_text_of_the_references_spans(golden, golden_corpus):
    spans = golden["spans"]
    first, last = spans[:, 2], spans[:, 3]
    row, row_end = video_rows(
        golden_corpus.clip_start_ms[first].astype(np.int64), golden_corpus.clip_end_ms[last - 1].astype(np.int64),
        np.full(len(spans), int(golden["feat_len"])), 32,
    )  # fmt: skip
    assert np.array_equal(row, spans[:, 0])
    assert np.array_equal(row_end, spans[:, 1])
    assert np.array_equal(row_end - row, golden["vmasks"].sum(1))
    words = np.minimum(golden_corpus.caption_ptr[last] - golden_corpus.caption_ptr[first], MODEL.max_text_len)
    assert np.array_equal(words + 3, golden["cmasks"].sum(1))


def test_statistics_of_the_reference(golden_corpus, shared):
    expected = json.loads((shared / "golden" / "sampling_stats.json").read_text())
    keys = keys_for(np.zeros(40_000), seed=5)
    spans = sample_spans(golden_corpus, keys, ClipConfig(), 32)
    tokens = golden_corpus.caption_ptr[spans.last] - golden_corpus.caption_ptr[spans.first]
    text = np.minimum(tokens, 61)
    video = spans.row_end - spans.row
    # The reference's means are over 4,000 clips: a standard error of 0.26 for lengths of text, 0.11 of video.
    assert text.mean() == pytest.approx(expected["text_tokens_mean"], abs=0.9)
    assert video.mean() == pytest.approx(expected["video_tokens_mean"], abs=0.4)
    assert (spans.last - spans.first).mean() == pytest.approx(expected["captions_mean"], abs=0.15)
    assert (text.min(), text.max()) == (expected["text_tokens_min"], expected["text_tokens_max"])
    assert video.max() == pytest.approx(expected["video_tokens_max"], abs=1)
    assert video.min() == pytest.approx(expected["video_tokens_min"], abs=1)
    wanted = 8 + (keys.uniform(2) * 57).astype(np.int64)
    assert np.array_equal(np.unique(wanted), np.arange(8, 65))
    # The reference's overshoot is counted after the cut at 61 tokens; its standard error is 0.05.
    assert (text - wanted).mean() == pytest.approx(expected["overshoot_mean"], abs=0.2)


def walk(
    corpus: Corpus, video: int, centre: int, wanted: int, coins: list[float], max_span_s: float
) -> tuple[int, int]:
    """Growth as the facts say it (3.3), one clip and one caption at a time."""
    begin, end = int(corpus.clip_ptr[video]), int(corpus.clip_ptr[video + 1])
    first, last = centre, centre + 1
    for coin in coins:
        tokens = int(corpus.caption_ptr[last]) - int(corpus.caption_ptr[first])
        span = int(corpus.clip_end_ms[last - 1]) - int(corpus.clip_start_ms[first])
        if tokens >= wanted or span >= max_span_s * 1000 or (first == begin and last == end):
            break
        if (coin > 0.5 and last < end) or first == begin:
            last += 1
        else:
            first -= 1
    return first, last


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), wanted=st.integers(1, 80), span=st.sampled_from([1.0, 8.0, 256.0]))
def test_growth_is_the_facts_growth(seed, wanted, span):
    corpus = random_corpus(8, seed, most_captions=12)
    keys = keys_for(np.arange(8), seed)
    centre = corpus.clip_ptr[:-1].astype(np.int64)
    centre += (np.random.default_rng(seed).random(8) * np.diff(corpus.clip_ptr.astype(np.int64))).astype(np.int64)
    first, last = grow(gather_captions(corpus, keys.video), keys, centre, np.full(8, wanted), span)
    coins = keys.uniform(3, np.arange(90))
    for video in range(8):
        assert (first[video], last[video]) == walk(corpus, video, centre[video], wanted, coins[video], span)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), max_video_len=st.integers(1, 40), max_len=st.integers(60, 110))
def test_clips_stay_inside_video_and_budget(seed, max_video_len, max_len):
    corpus = random_corpus(12, seed)
    model = ModelConfig(max_video_len=max_video_len, max_len=max_len)
    keys = keys_for(np.random.default_rng(seed).integers(0, 12, 64), seed)
    spans = sample_spans(corpus, keys, ClipConfig(), max_video_len)
    batch = load_clips(corpus, keys, ClipConfig(), model, IDS)
    assert batch.video.shape == (64, max_video_len, 4)
    assert batch.text.shape == (64, max_len - max_video_len)
    for i, video in enumerate(keys.video):
        begin, end = int(corpus.clip_ptr[video]), int(corpus.clip_ptr[video + 1])
        assert begin <= spans.first[i] < spans.last[i] <= end
        start = corpus.clip_start_ms[spans.first[i]] / 1000
        stop = corpus.clip_end_ms[spans.last[i] - 1] / 1000
        rows = range(int(start), min(int(np.ceil(stop)), int(corpus.n_rows[video])))[:max_video_len]
        n = int(batch.video_mask[i].sum())
        assert batch.video_mask[i, :n].all()
        assert batch.video[i, :n, 1].int().tolist() == list(rows)
        assert (batch.video[i, :n, 0] == video).all()
        assert not batch.video[i, n:].any()
        tokens = corpus.tokens[int(corpus.caption_ptr[spans.first[i]]) : int(corpus.caption_ptr[spans.last[i]])]
        kept = tokens[: model.max_text_len].tolist()
        row = [IDS.cls, IDS.sep, *kept, IDS.sep]
        assert batch.text[i].tolist() == row + [IDS.pad] * (batch.text.shape[1] - len(row))
        assert int(batch.text_mask[i].sum()) == len(row)
    assert not batch.video_labels.any()
    assert (batch.text_labels == -100).all()


def test_a_clip_whose_captions_lie_behind_the_video_has_no_seconds():
    row, end = video_rows(np.array([9_500, 3_000]), np.array([12_000, 3_001]), np.array([8, 8]), 32)
    assert (row.tolist(), end.tolist()) == ([8, 3], [8, 4])


def test_batches_do_not_depend_on_how_they_are_cut():
    corpus = random_corpus()
    order = GlobalOrder(np.arange(40), seed=9, global_batch=32, clips_per_video=8)
    whole = load_clips(corpus, order.keys(4), ClipConfig(), MODEL, IDS)
    part = load_clips(corpus, order.keys(4, 13, 22), ClipConfig(), MODEL, IDS)
    for name, tensor in vars(part).items():
        assert tensor.equal(getattr(whole, name)[13:22]), name
