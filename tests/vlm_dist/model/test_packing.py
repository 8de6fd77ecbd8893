"""Packed execution: what the padded form of BERT gives, states and gradients, and no place of padding computed."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import BertModel
from transformers.models.bert.modeling_bert import BertSelfAttention

from tests.vlm_dist.model.golden import encode, random_batch, tiny_model
from vlm_dist.model.attention_masks import Attention, attention_mask, real_places
from vlm_dist.model.packing import Packing, packed_attention
from vlm_dist.model.vlm import VLM, bert_config

BATCH = random_batch(12, seed=5)
ATTENTIONS: list[Attention] = ["full", "isolated", "captioning"]
REAL = real_places(BATCH.video_mask, BATCH.text_mask)


def padded(model: VLM, attention: Attention) -> torch.Tensor:
    """The same weights in transformers' own way: all places through all layers."""
    config = bert_config(model.config)
    config._attn_implementation = "sdpa"
    plain = BertModel(config, add_pooling_layer=False)
    plain.load_state_dict(model.bert.state_dict())
    video = BATCH.video.masked_fill(BATCH.video_labels[..., None], 0)
    mask = attention_mask(attention, BATCH.video_mask, BATCH.text_mask)
    plain.to(model.word_table.dtype).train(model.training)
    model.bert = plain
    return plain.encoder(model.embed(video, BATCH.text), attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_states_and_gradients_are_those_of_the_padded_form(attention: Attention) -> None:
    weights = torch.randn(int(REAL.sum()), 48)
    gradients, states = [], []
    for form in (lambda model: encode(model, BATCH, attention), lambda model: padded(model, attention)):
        model = tiny_model()
        hidden = form(model)[REAL]
        (hidden * weights).sum().backward()
        states.append(hidden.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*states, atol=1e-5, rtol=0)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        rounding = 1e-5 * max(1.0, float(gradient.abs().max()))  # of the key biases it is nearly 0
        torch.testing.assert_close(gradient, gradients[1][name], atol=rounding, rtol=0, msg=name)


def test_layers_see_real_places_only_and_padding_comes_out_as_zero() -> None:
    model = tiny_model()
    seen: list[torch.Size] = []
    for layer in model.bert.encoder.layer:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    hidden = encode(model, BATCH)
    assert seen == [(1, int(REAL.sum()), 48)] * 3
    assert not REAL.all()
    assert not hidden[~REAL].any()
    assert hidden[REAL].any(1).all()


def test_packing_and_back() -> None:
    packing = Packing.of("full", BATCH.video_mask, BATCH.text_mask)
    values = torch.randn(*REAL.shape, 3, 2)
    assert torch.equal(packing.pack(values), values[REAL])
    assert torch.equal(packing.unpack(values[REAL]), values * REAL[..., None, None])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_low_precision_and_an_empty_modality_stay_finite(attention: Attention) -> None:
    """The first clip has no video; the others lose their words."""
    assert not BATCH.video_mask[0].any()
    text_mask = BATCH.text_mask & (torch.arange(BATCH.text_mask.shape[1]) < 2)
    model = tiny_model().to(torch.bfloat16)
    hidden = encode(model, replace(BATCH, text_mask=text_mask), attention)
    hidden.float().square().sum().backward()
    assert torch.isfinite(hidden).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    exact = encode(tiny_model(), replace(BATCH, text_mask=text_mask), attention)
    assert (hidden.float() - exact).abs().max() < 0.1


def test_dropout_is_on_in_training_only() -> None:
    model = tiny_model(dropout=0.5)
    assert torch.equal(encode(model, BATCH), encode(model, BATCH))
    model.train()
    assert not torch.equal(encode(model, BATCH), encode(model, BATCH))
    only_attention = tiny_model(dropout=0.5)
    for module in only_attention.modules():
        module.train(isinstance(module, BertSelfAttention))
    assert not torch.equal(encode(only_attention, BATCH), encode(only_attention, BATCH))


LENGTHS = st.tuples(st.integers(0, 8), st.integers(0, 13), st.booleans(), st.booleans())


@given(st.lists(LENGTHS, min_size=1, max_size=6), st.sampled_from(ATTENTIONS))
@settings(max_examples=60, deadline=None)
def test_any_lengths(lengths: list[tuple[int, int, bool, bool]], attention: Attention) -> None:
    """Clips without video, without words, without [CLS] or the video's [SEP], or full: as padded rows and a mask."""
    video_mask = torch.stack([torch.arange(8) < seconds for seconds, *_ in lengths])
    text_mask = torch.stack([torch.arange(16) < words + 3 for _, words, *_ in lengths])
    text_mask[:, 0] = torch.tensor([cls for *_, cls, _ in lengths])
    text_mask[:, 1] = torch.tensor([sep for *_, sep in lengths])
    real = real_places(video_mask, text_mask)
    mask = attention_mask(attention, video_mask, text_mask)
    query, key, value = torch.randn(3, *real.shape, 2, 4)
    rows = (part.transpose(1, 2) for part in (query, key, value))
    expected = scaled_dot_product_attention(*rows, attn_mask=mask).transpose(1, 2)[real]
    packing = Packing.of(attention, video_mask, text_mask)
    packed = [packing.pack(part).transpose(0, 1)[None] for part in (query, key, value)]
    found, _ = packed_attention(torch.nn.Module(), *packed, packing)
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=0)
    assert sum(packing.lengths) == int(packing.bounds[-1]) == int(real.sum())


def test_the_bert_inside_can_be_called_as_such() -> None:
    """As transformers' own, with ids and a mask of places."""
    model = tiny_model()
    ids, real = BATCH.text, BATCH.text_mask
    config = bert_config(model.config)
    config._attn_implementation = "sdpa"
    plain = BertModel(config, add_pooling_layer=False).eval()
    plain.load_state_dict(model.bert.state_dict())
    found, expected = (bert(ids, attention_mask=real.long()).last_hidden_state for bert in (model.bert, plain))
    assert torch.equal(found[real], expected[real])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("heads", [{}, {"hidden_size": 64, "num_heads": 2}])
def test_kernels_of_gpus_give_the_same(attention: Attention, dtype: torch.dtype, heads: dict[str, int]) -> None:
    """In half precision without dropout one call of FlashAttention where it takes such heads, else padded rows."""
    exact = encode(tiny_model(**heads), BATCH, attention)
    model, batch = tiny_model(**heads).to("cuda", dtype), BATCH.to("cuda")
    hidden = encode(model, batch, attention)
    assert (hidden.float().cpu() - exact).abs().max() < 0.1
    padded_rows = encode(tiny_model(**heads).cuda(), batch, attention)
    torch.testing.assert_close(padded_rows.cpu(), exact, atol=1e-4, rtol=0)
    hidden.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
