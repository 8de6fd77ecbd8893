"""The encoder: parity with the reference, parameters of the paper-size model, layout, padding."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.vlm_dist.model.golden import Golden, encode, random_batch, tiny_model
from vlm_dist.data.batch import IGNORE, ClipBatch
from vlm_dist.model.attention_masks import attention_mask, real_places
from vlm_dist.model.config import ModelConfig
from vlm_dist.model.vlm import VLM


@pytest.mark.parametrize("name", ["pretrain_mtm", "pretrain_mfmmlm"])
def test_hidden_states_of_all_layers_match_the_reference(shared, name):
    golden = Golden(shared, name)
    model, batch = golden.model().eval(), golden.batch()
    seen: list[torch.Tensor] = []
    model.bert.embeddings.register_forward_hook(lambda module, args, out: seen.append(out))
    for layer in model.bert.encoder.layer:
        layer.register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        last = encode(model, batch)
        words = model.project_video(batch.video.masked_fill(batch.video_labels[..., None], 0))
    assert len(seen) == 4
    real = real_places(batch.video_mask, batch.text_mask)
    for number, hidden in enumerate([seen[0][real], *(packed[0] for packed in seen[1:]), last[real]]):
        torch.testing.assert_close(hidden, golden[f"out/h{min(number, 3)}"][real], atol=1e-5, rtol=0)
    assert not last[~real].any()
    torch.testing.assert_close(words, golden["out/vtokens"], atol=1e-5, rtol=0)


def test_isolated_mask_and_pooling_match_the_reference(shared):
    golden = Golden(shared, "ft_joint")
    model, batch = golden.model().eval(), golden.batch()
    mask = attention_mask("isolated", batch.video_mask, batch.text_mask)
    assert torch.equal(mask[:, 0], golden["out/iso_mask"])
    with torch.no_grad():
        video, text = model.pool(encode(model, batch, "isolated"), batch.video_mask, batch.text_mask)
    for run in ("train", "test"):
        torch.testing.assert_close(video, golden[f"out/{run}/pooled_video"], atol=1e-5, rtol=0)
        torch.testing.assert_close(text, golden[f"out/{run}/pooled_text"], atol=1e-5, rtol=0)


def test_captioning_mask_scores_and_loss_match_the_reference(shared):
    golden = Golden(shared, "ft_nlg")
    model, batch = golden.model().eval(), golden.batch()
    real = real_places(batch.video_mask, batch.text_mask)
    mask = attention_mask("captioning", batch.video_mask, batch.text_mask)[:, 0]
    assert torch.equal(mask[real], golden["in/attention_mask"][real])
    labels = batch.text_labels
    with torch.no_grad():
        at_text = model.split(encode(model, batch, "captioning"), batch.video.shape[1])[1][labels != IGNORE]
        scores = model.head(at_text) @ model.word_table.T + model.word_bias
    torch.testing.assert_close(scores, golden["out/logits"], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(cross_entropy(scores, labels[labels != IGNORE]), golden["out/loss"], atol=1e-5, rtol=0)


def test_paper_size_model_has_the_papers_parameters_but_for_the_two_unused_parts():
    with torch.device("meta"):
        model = VLM(ModelConfig(vocab_size=30522, feature_dim=512))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    reference, pooler, segment_table = 111_257_088, 590_592, 196_608
    assert count == {"bert": 109_482_240 - pooler, "video_mlp": 986_112, "head": 592_128}
    assert sum(count.values()) == reference - pooler - segment_table
    names = [name for name, _ in model.named_parameters()]
    assert not any("pooler" in name or "seg_embeddings" in name or name == "word_bias" for name in names)


def test_fresh_weights_have_berts_initialisation():
    model = VLM(ModelConfig(vocab_size=2000, feature_dim=128, hidden_size=256, num_heads=4, num_layers=1))
    for name, weight in model.named_parameters():
        if "LayerNorm" in name:
            assert torch.equal(weight, torch.full_like(weight, float(name.endswith("weight")))), name
        elif name.endswith("bias"):
            assert not weight.any(), name
        else:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name


def test_positions_and_types_do_not_depend_on_the_places_of_a_batch():
    """Text stands at max_video_len + 2 on, whatever V and T are (reference facts 1.1)."""
    model = tiny_model()
    tables = model.bert.embeddings
    torch.nn.init.zeros_(tables.word_embeddings.weight)
    torch.nn.init.zeros_(model.video_mlp.linear2.weight)
    tables.LayerNorm = torch.nn.Identity()
    out = model.embed(torch.randn(1, 1, 16), torch.tensor([[2, 3, 7, 3]]))[0]
    expected = [(0, 0), (1, 0), (9, 0), (10, 1), (11, 1)]  # [CLS], 1 video place, its [SEP], word, [SEP]
    rows = torch.stack(
        [tables.position_embeddings.weight[p] + tables.token_type_embeddings.weight[t] for p, t in expected]
    )
    torch.testing.assert_close(out, rows)


@pytest.mark.parametrize("attention", ["full", "isolated"])
def test_trimming_padding_changes_nothing(attention):
    model = tiny_model().double()
    # Short clips, so that trimming really cuts both modalities.
    batch = random_batch(12, seed=3)
    batch = replace(batch, video_mask=batch.video_mask & (torch.arange(8) < 5), video=batch.video.double())
    batch = replace(batch, video_labels=batch.video_labels & batch.video_mask)
    short = batch[:6].trim()
    assert short.video.shape[1] < 8
    with torch.no_grad():
        whole, cut = encode(model, batch[:6], attention), encode(model, short, attention)
    v, t = short.video.shape[1], short.text.shape[1]
    video, text = model.split(whole, 8)
    cut_video, cut_text = model.split(cut, v)
    of_video, of_text = short.video_mask, short.text_mask
    torch.testing.assert_close(cut_video[of_video], video[:, :v][of_video], atol=1e-12, rtol=0)
    torch.testing.assert_close(cut_text[of_text], text[:, :t][of_text], atol=1e-12, rtol=0)
    for one, other in zip(
        model.pool(whole, batch[:6].video_mask, batch[:6].text_mask),
        model.pool(cut, of_video, of_text), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_masked_features_are_zeroed_before_the_video_mlp():
    model, batch = tiny_model(), random_batch(8)
    other = replace(batch, video=torch.where(batch.video_labels[..., None], torch.randn_like(batch.video), batch.video))
    zeroed = replace(batch, video=batch.video * ~batch.video_labels[..., None], video_labels=batch.video_labels & False)
    with torch.no_grad():
        assert torch.equal(encode(model, batch), encode(model, other))
        assert torch.equal(encode(model, batch), encode(model, zeroed))


def test_too_many_places_are_refused():
    model, batch = tiny_model(), random_batch(2, video=9)
    with pytest.raises(AssertionError, match="video places"):
        encode(model, batch)


def test_batch_slices_and_counts():
    batch = random_batch(5)
    assert len(batch[1:4]) == 3
    assert isinstance(batch[1:4], ClipBatch)
    assert batch.num_masked_video == int(batch.video_labels.sum())
    assert batch.num_masked_text == int((batch.text_labels >= 0).sum())
    visible = batch.visible_video()
    assert visible.shape == (int(batch.video_mask.sum()) - batch.num_masked_video, 16)
    assert visible.any(1).all()
