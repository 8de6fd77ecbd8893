"""Masks: the reference's shares, and what must hold for any clip."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vlm_dist.data.corpus import IDS, keys_for
from vlm_dist.data.batch import IGNORE, ClipBatch
from vlm_dist.data.config import MaskConfig
from vlm_dist.data.masks import mask_batch


def clips(words: list[int], seconds: list[int], t: int = 20, v: int = 12) -> ClipBatch:
    """Unmasked clips of the given lengths; every word is 200."""
    n, s = torch.tensor(words)[:, None], torch.tensor(seconds)[:, None]
    places = torch.arange(t)
    text = torch.where((places > 1) & (places < n + 2), 200, 0)
    text = torch.where((places == 1) | (places == n + 2), IDS.sep, text)
    text[:, 0] = IDS.cls
    video_mask = torch.arange(v) < s
    return ClipBatch(
        video=torch.randn(len(words), v, 3) * video_mask[..., None],
        video_mask=video_mask,
        video_labels=torch.zeros_like(video_mask),
        text=text,
        text_mask=places < n + 3,
        text_labels=torch.full_like(text, IGNORE),
    )


def kinds(before: ClipBatch, after: ClipBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips whose whole text, and whose whole video, is masked."""
    words = before.text_mask.sum(1) - 3
    return (after.text_labels != IGNORE).sum(1) == words, after.video_labels.sum(1) == before.video_mask.sum(1)


@pytest.fixture(scope="module")
def many() -> tuple[ClipBatch, ClipBatch]:
    before = clips([17] * 20_000, [12] * 20_000)
    return before, mask_batch(before, keys_for(np.zeros(20_000), 4), MaskConfig(), IDS)


def test_shares_of_the_reference(many, shared):
    expected = json.loads((shared / "golden" / "sampling_stats.json").read_text())
    before, after = many
    text, video = kinds(before, after)
    mixed = ~text & ~video
    # Standard errors of the reference's 4,000 clips are 0.008 for the kinds.
    assert mixed.float().mean().item() == pytest.approx(expected["kind_share"]["mixed"], abs=0.025)
    assert text.float().mean().item() == pytest.approx(expected["kind_share"]["text"], abs=0.025)
    assert video.float().mean().item() == pytest.approx(expected["kind_share"]["video"], abs=0.025)
    chosen = after.text_labels != IGNORE
    assert chosen[mixed].sum().item() / (17 * mixed.sum().item()) == pytest.approx(
        expected["mixed_text_rate"], abs=0.01
    )
    assert after.video_labels[mixed].float().mean().item() == pytest.approx(expected["mixed_video_rate"], abs=0.01)
    masked = after.text == IDS.mask
    for which, name in [(mixed, "mixed_mask_token_share"), (text, "whole_text_mask_token_share")]:
        share = masked[which].sum().item() / chosen[which].sum().item()
        assert share == pytest.approx(expected[name], abs=0.02)


def test_eighty_ten_ten_and_shares_by_themselves(many):
    before, after = many
    text, video = kinds(before, after)
    assert text.float().mean().item() == pytest.approx(0.25, abs=0.012)
    assert video.float().mean().item() == pytest.approx(0.25, abs=0.012)
    assert not (text & video).any()
    chosen = after.text_labels != IGNORE
    count = chosen.sum().item()
    kept = (chosen & (after.text == before.text)).sum().item() / count
    masked = (chosen & (after.text == IDS.mask)).sum().item() / count
    assert masked == pytest.approx(0.8 + 0.1 / IDS.vocab_size, abs=0.006)
    assert kept == pytest.approx(0.1 + 0.1 / IDS.vocab_size, abs=0.005)
    random = after.text[chosen & (after.text != before.text) & (after.text != IDS.mask)]
    assert (random.min().item(), random.max().item()) == (0, IDS.vocab_size - 1)
    assert len(random.unique()) == IDS.vocab_size - 2
    # The whole-modality clips leave the other modality alone.
    assert not after.video_labels[text].any()
    assert not chosen[video].any()


def test_the_papers_whole_text_mask_hides_every_word(many):
    before, code = many
    paper = mask_batch(before, keys_for(np.zeros(20_000), 4), MaskConfig(whole_text="paper"), IDS)
    text, _ = kinds(before, code)
    words = before.text == 200
    assert (paper.text[text][words[text]] == IDS.mask).all()
    assert paper.text[~text].equal(code.text[~text])
    assert paper.text_labels.equal(code.text_labels)
    assert not (code.text[text][words[text]] == IDS.mask).all()


lengths = st.lists(st.tuples(st.integers(0, 17), st.integers(0, 12)), min_size=1, max_size=30)
share = st.sampled_from([0.0, 0.15, 1.0])


@settings(max_examples=60, deadline=None)
@given(
    lengths=lengths, mmm=share, mfm=share, mlm=share, whole=st.sampled_from(["code", "paper"]), seed=st.integers(0, 99)
)
def test_only_words_and_seconds_are_masked(lengths, mmm, mfm, mlm, whole, seed):
    before = clips([n for n, _ in lengths], [s for _, s in lengths])
    cfg = MaskConfig(mmm_probability=mmm, mfm_probability=mfm, mlm_probability=mlm, whole_text=whole)
    keys = keys_for(np.zeros(len(lengths)), seed)
    after = mask_batch(before, keys, cfg, IDS)
    chosen = after.text_labels != IGNORE
    words = before.text == 200
    assert not (chosen & ~words).any()
    assert not (after.video_labels & ~before.video_mask).any()
    assert after.text[~chosen].equal(before.text[~chosen])
    assert after.text_labels[chosen].equal(before.text[chosen])
    assert after.video.equal(before.video)
    for i, (n, s) in enumerate(lengths):
        text, video = int(chosen[i].sum()), int(after.video_labels[i].sum())
        if mmm == 1:
            assert (text, video) in {(n, 0), (0, s)}
        elif mmm == 0 and mfm != 0.15 and mlm != 0.15:
            assert (text, video) == (n * int(mlm), s * int(mfm))
    again = mask_batch(before, keys, cfg, IDS)
    assert all(getattr(again, name).equal(tensor) for name, tensor in vars(after).items())


def test_masks_do_not_depend_on_padding_or_neighbours():
    before = clips([5, 17, 9, 3], [1, 12, 4, 0])
    keys = keys_for(np.zeros(4), 8)
    after = mask_batch(before, keys, MaskConfig(), IDS)
    alone = mask_batch(before[2:3].trim(), keys[2:3], MaskConfig(), IDS)
    assert alone.text.equal(after.text[2:3, : alone.text.shape[1]])
    assert alone.video_labels.equal(after.video_labels[2:3, : alone.video.shape[1]])
