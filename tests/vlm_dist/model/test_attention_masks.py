"""No leak: what must not be seen is changed, and the outputs must stay the same to the last bit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.vlm_dist.model.golden import encode, random_batch, tiny_model
from vlm_dist.data.batch import ClipBatch
from vlm_dist.model.attention_masks import attention_mask
from vlm_dist.model.vlm import VLM

TYPES = [torch.float32, torch.bfloat16]


def parts(model: VLM, batch: ClipBatch, attention: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of [CLS], of the real video places with [SEP], and of the real text places with [SEP]."""
    with torch.no_grad():
        hidden = encode(model, replace(batch, video_labels=batch.video_labels & False), attention)
    v = batch.video.shape[1]
    of_video = torch.cat([batch.video_mask, batch.text_mask[:, 1:2]], 1)
    return hidden[:, 0], hidden[:, 1 : v + 2][of_video], hidden[:, v + 2 :][batch.text_mask[:, 2:]]


def other_video(batch: ClipBatch) -> ClipBatch:
    noise = torch.randn_like(batch.video) * 5
    return replace(batch, video=torch.where(batch.video_mask[..., None], noise, batch.video))


def other_text(batch: ClipBatch) -> ClipBatch:
    words = batch.text_mask & (batch.text != 3) & (torch.arange(batch.text.shape[1]) > 1)
    return replace(batch, text=torch.where(words, (batch.text + 7) % 50 + 5, batch.text))


def other_padding(batch: ClipBatch) -> ClipBatch:
    return replace(
        batch,
        video=torch.where(batch.video_mask[..., None], batch.video, 9.0),
        text=torch.where(batch.text_mask, batch.text, 11),
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_isolated_modalities_do_not_see_each_other(dtype):
    model, batch = tiny_model().to(dtype), random_batch(6)
    cls, video, text = parts(model, batch, "isolated")
    new_cls, new_video, new_text = parts(model, other_video(batch), "isolated")
    assert torch.equal(cls, new_cls)
    assert torch.equal(text, new_text)
    assert not torch.equal(video, new_video)
    new_cls, new_video, new_text = parts(model, other_text(batch), "isolated")
    assert torch.equal(cls, new_cls)
    assert torch.equal(video, new_video)
    assert not torch.equal(text, new_text)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("attention", ["full", "isolated", "captioning"])
def test_padding_is_never_seen(attention, dtype):
    model, batch = tiny_model().to(dtype), random_batch(6)
    for before, after in zip(
        parts(model, batch, attention), parts(model, other_padding(batch), attention), strict=True
    ):  # fmt: skip
        assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", TYPES)
def test_captions_see_the_video_and_no_word_that_follows(dtype):
    model, batch = tiny_model().to(dtype), random_batch(6)
    place = torch.arange(batch.text.shape[1])
    later = replace(batch, text=torch.where(batch.text_mask & (place > 5), (batch.text + 7) % 50 + 5, batch.text))
    cls, video, text = parts(model, batch, "captioning")
    new_cls, new_video, new_text = parts(model, later, "captioning")
    before = (place[2:].expand(6, -1) <= 5)[batch.text_mask[:, 2:]]
    assert torch.equal(cls, new_cls)
    assert torch.equal(video, new_video)
    assert torch.equal(text[before], new_text[before])
    assert (text[~before] != new_text[~before]).any(1).all()
    seen = parts(model, other_video(batch), "captioning")[2]
    with_video = (batch.video_mask.any(1)[:, None] & batch.text_mask)[:, 2:][batch.text_mask[:, 2:]]
    assert (text != seen).any(1)[with_video].all()


def test_full_attention_joins_the_modalities():
    model, batch = tiny_model(), random_batch(6)
    text, new_text = parts(model, batch, "full")[2], parts(model, other_video(batch), "full")[2]
    with_video = (batch.video_mask.any(1)[:, None] & batch.text_mask)[:, 2:][batch.text_mask[:, 2:]]
    assert (text != new_text).any(1)[with_video].all()
    assert torch.equal(text[~with_video], new_text[~with_video])


def test_empty_parts_give_finite_states_and_gradients():
    """A pass over one modality alone has the other's places all masked; no softmax may be empty."""
    model, batch = tiny_model(), random_batch(3)
    batch = replace(batch, text_mask=batch.text_mask & (torch.arange(16) < 2))
    hidden = encode(model, batch, "isolated")
    hidden.sum().backward()
    assert torch.isfinite(hidden).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_mask_by_hand():
    video, text = torch.tensor([[True, False]]), torch.tensor([[True, True, True, True, False]])
    full = attention_mask("full", video, text)[0, 0].int().tolist()
    assert full == [[1, 1, 0, 1, 1, 1, 0]] * 7
    isolated = attention_mask("isolated", video, text)[0, 0].int().tolist()
    assert isolated == [
        [1, 0, 0, 0, 0, 0, 0],
        *[[0, 1, 0, 1, 0, 0, 0]] * 3,
        *[[0, 0, 0, 0, 1, 1, 0]] * 3,
    ]  # fmt: skip
    captioning = attention_mask("captioning", video, text)[0, 0].int().tolist()
    assert captioning == [*[[1, 1, 0, 1, 0, 0, 0]] * 4, [1, 1, 0, 1, 1, 0, 0], *[[1, 1, 0, 1, 1, 1, 0]] * 2]
