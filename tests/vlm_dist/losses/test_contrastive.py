"""Retrieval losses: parity with the reference, and sums by hand."""

import torch

from tests.vlm_dist.model.golden import Golden, encode
from vlm_dist.losses.contrastive import text_to_video, video_to_text


def test_losses_match_the_reference(shared):
    golden = Golden(shared, "ft_joint")
    model, batch = golden.model().eval(), golden.batch()
    video, text = model.pool(encode(model, batch, "isolated"), batch.video_mask, batch.text_mask)
    t2v, v2t = text_to_video(text, video) / len(text), video_to_text(text, video) / len(text)
    torch.testing.assert_close(t2v, golden["out/loss/T2VContraLoss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(v2t, golden["out/loss/V2TContraLoss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(t2v + v2t, golden["out/loss/MMContraLoss"], atol=1e-5, rtol=0)


def test_sums_by_hand():
    text = torch.eye(3)
    video = torch.eye(3)[[0, 2, 1]] * 10
    wrong_way = torch.log(torch.tensor(2 + torch.e**10))
    torch.testing.assert_close(text_to_video(text, video), (wrong_way - 10) + 2 * wrong_way)


def test_half_precision_scores_keep_small_differences():
    text = torch.full((1, 4), 8.0, dtype=torch.float16).repeat(2, 1)
    video = torch.tensor([[8.0, 8, 8, 8], [8.0, 8, 8, 7.9]], dtype=torch.float16)
    loss = text_to_video(text, video)
    assert loss.dtype == torch.float32
    assert 0 < float(loss) < 3
