"""Packed execution: what the padded form of BERT gives, states and gradients, and no place of padding computed."""

from dataclasses import replace

import pytest
import torch
from transformers import BertModel
from transformers.models.bert.modeling_bert import BertSelfAttention

from tests.vlm_dist.model.golden import encode, random_batch, tiny_model
from vlm_dist.model.attention_masks import Attention, attention_mask, real_places
from vlm_dist.model.packing import Packing
from vlm_dist.model.vlm import VLM, bert_config

BATCH = random_batch(12, seed=5)
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


@pytest.mark.parametrize("attention", ["full", "isolated"])
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
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-5, msg=name)


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
    packing = Packing.of(REAL, attention_mask("full", BATCH.video_mask, BATCH.text_mask))
    values = torch.randn(*REAL.shape, 3, 2)
    assert torch.equal(packing.pack(values), values[REAL])
    assert torch.equal(packing.unpack(values[REAL]), values * REAL[..., None, None])


@pytest.mark.parametrize("attention", ["full", "isolated"])
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
