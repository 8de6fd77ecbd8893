"""The retrieval losses: the right video for a text and the right text for a video, in one batch (facts 4.1)."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def text_to_video(pooled_text: Tensor, pooled_video: Tensor) -> Tensor:
    """Softmax over the batch's videos for each text, summed over the texts; scores are raw dot products.

    Args:
        pooled_text: (B, D), row i belongs to video i.
        pooled_video: (B, D). Other texts of the same video are negatives like all others.
    """
    return _contrast(pooled_text, pooled_video)


def video_to_text(pooled_text: Tensor, pooled_video: Tensor) -> Tensor:
    """Softmax over the batch's texts for each video, summed over the videos; arguments as in `text_to_video`."""
    return _contrast(pooled_video, pooled_text)


def _contrast(queries: Tensor, keys: Tensor) -> Tensor:
    scores = queries @ keys.T
    # Half-precision scores would lose the differences that the softmax is about.
    scores = scores if scores.dtype == torch.float64 else scores.float()
    labels = torch.arange(len(queries), device=queries.device)
    return cross_entropy(scores, labels, reduction="sum")
