"""The count of a step's arithmetic, against what PyTorch counts while it computes."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.vlm_dist.model.golden import encode, random_batch, tiny_model
from vlm_dist.data.batch import ClipBatch
from vlm_dist.losses.nce import masked_token_loss
from vlm_dist.model.flops import Work, forward_flops, step_flops


def full(clips: int) -> ClipBatch:
    """Clips of one length without padding, since PyTorch counts padding as well."""
    batch = random_batch(clips, seed=2)
    text = torch.randint(5, 60, batch.text.shape)
    return ClipBatch(
        video=batch.video,
        video_mask=torch.ones_like(batch.video_mask),
        video_labels=batch.video_labels,
        text=text,
        text_mask=torch.ones_like(batch.text_mask),
        text_labels=batch.text_labels,
    )


def test_equals_what_is_computed() -> None:
    model, batch = tiny_model(), full(6)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        masked_token_loss(model, encode(model, batch), batch, batch.visible_video())
    assert forward_flops(model.config, Work.of(batch)) == counter.get_total_flops()


def test_padding_asks_for_nothing() -> None:
    batch = random_batch(9, seed=4)
    trimmed = batch.trim()
    assert Work.of(batch) == Work.of(trimmed)
    assert Work.of(batch).tokens == int(batch.video_mask.sum() + batch.text_mask.sum())


def test_bert_base_by_hand() -> None:
    """85 M weights in the layers, two FLOPs each and token forwards, three times that with the backward pass."""
    model = tiny_model(hidden_size=768, num_layers=12, num_heads=12, intermediate_size=3072)
    one = Work(tokens=1, pairs=0, seconds=0, masked_text=0, masked_video=0, pool=0)
    assert step_flops(model.config, one) == 6 * 12 * (4 * 768**2 + 2 * 768 * 3072)
    negatives = Work(tokens=0, pairs=0, seconds=0, masked_text=10, masked_video=0, pool=100)
    words = 10 * 768 * (60 + 100)
    assert step_flops(model.config, negatives) == 6 * (words + 10 * 768**2 + 100 * (16 * 768 + 768**2))
