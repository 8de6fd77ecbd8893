"""Encoder and loss as one module: the same numbers with what is found ahead of time, and with what is compiled."""

import copy

import pytest
import torch
from torch import Tensor

from tests.vlm_dist.model.golden import encode, random_batch, tiny_model
from vlm_dist.data.batch import ClipBatch
from vlm_dist.losses.nce import LossSums, masked_token_loss
from vlm_dist.model.vlm import VLM
from vlm_dist.train.config import TrainConfig
from vlm_dist.train.negatives import MicroBatch, Pool
from vlm_dist.train.pretrain import PretrainModule

WIDE = {"hidden_size": 64, "num_heads": 2, "intermediate_size": 128}
"""FlashAttention takes heads of 8, 16, .. units."""
BATCHES = [random_batch(40, seed=1), random_batch(25, seed=2), random_batch(7, seed=3)]


def run(vlm: VLM, batch: ClipBatch, device: str, **settings: object) -> tuple[LossSums, Tensor, list[Tensor]]:
    """Sums, loss, and all gradients, on the CPU."""
    cfg = TrainConfig.model_validate({"nce_chunk": 16, **settings})
    module = PretrainModule(copy.deepcopy(vlm), cfg, torch.device(device)).to(device)
    moved = batch.to(device)
    videos = torch.arange(len(batch), device=device)
    visible = videos.repeat_interleave((batch.video_mask & ~batch.video_labels).sum(1).to(device))
    sums = module(MicroBatch(moved, videos, torch.empty(0)), Pool(moved.visible_video(), visible))
    loss = sums.loss(cfg.loss, batch.num_masked_text, batch.num_masked_video)
    loss.backward()
    return sums, loss.detach().cpu(), [p.grad.float().cpu() for p in module.parameters() if p.grad is not None]


def test_places_found_ahead_of_time_change_nothing() -> None:
    vlm, batch = tiny_model(), BATCHES[0]
    sums, loss, _ = run(vlm, batch, "cpu")
    plain = masked_token_loss(vlm, encode(vlm, batch), batch, batch.visible_video())
    assert torch.equal(loss, plain.loss("joint", batch.num_masked_text, batch.num_masked_video).detach())
    assert (int(sums.num_text), int(sums.num_video)) == (batch.num_masked_text, batch.num_masked_video)


def test_a_batch_takes_its_places_along() -> None:
    batch = BATCHES[0]
    moved = batch.to("meta")
    assert moved.places.real.is_meta
    assert len(moved.places.real) == int(batch.video_mask.sum() + batch.text_mask.sum())
    assert moved.num_masked_video == int(batch.video_labels.sum())


def test_nothing_is_compiled_on_cpus() -> None:
    module = PretrainModule(tiny_model(), TrainConfig(), torch.device("cpu"))
    assert not module.compiled
    assert all(layer._compiled_call_impl is None for layer in module.vlm.bert.encoder.layer)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"loss": "mfm-mlm"}, {"nce_other_videos": True}, {"recompute": "cheap"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_compiled_gives_the_same(settings: dict[str, object], dtype: torch.dtype) -> None:
    vlm = tiny_model(**WIDE).to(dtype)
    for batch in BATCHES:
        exact_sums, exact, exact_gradients = run(vlm.float(), batch, "cpu", **settings)
        sums, loss, gradients = run(vlm.to(dtype), batch, "cuda", **settings)
        near = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(loss, exact, rtol=near, atol=0)
        assert int(sums.num_video) == int(exact_sums.num_video)
        for found, expected in zip(gradients, exact_gradients, strict=True):
            assert (found - expected).norm() <= 5 * near * expected.norm() + near
