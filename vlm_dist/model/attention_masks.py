"""Who may attend to whom: the one place that builds the encoder's attention masks (reference facts 1.4).

All masks are boolean, True where attention is allowed, with one axis for the heads, as PyTorch's own attention takes
them. BERT of transformers 5 would take 0/1 floats, and booleans with "eager", silently wrongly. Where nothing but real
places is computed (packing.py), the lengths of `stretches` say the same.
"""

from typing import Literal

import torch
from torch import Tensor

Attention = Literal["full", "isolated", "captioning"]


def real_places(video_mask: Tensor, text_mask: Tensor) -> Tensor:
    """(B, L) bool, the places of [CLS] video [SEP] text that are not padding; see `attention_mask`."""
    return torch.cat([text_mask[:, :1], video_mask, text_mask[:, 1:]], dim=1)


def attention_mask(kind: Attention, video_mask: Tensor, text_mask: Tensor) -> Tensor:
    """Build the mask of B sequences [CLS] video [SEP] text.

    Args:
        kind: "full" lets all real places see each other (pre-training); "isolated" splits [CLS], video with its [SEP],
            and text with its [SEP] into three parts that do not see each other (end tasks with two towers);
            "captioning" lets [CLS], video and [SEP] see each other, and a place of the text these and the text up to
            itself (reference facts 4.5).
        video_mask: (B, V) bool, real video places.
        text_mask: (B, T) bool, real places of the text tensor, whose first two are [CLS] and the video's [SEP].

    Returns:
        (B, 1, L, L) bool with L = 1 + V + T - 1, rows are queries and columns are keys. A row that nothing is allowed
        to sees itself, so that no softmax is empty; only places of an empty part are such rows, and nothing reads them.
    """
    b, v = video_mask.shape
    keys = real_places(video_mask, text_mask)
    length = keys.shape[1]
    if kind == "full":
        allowed = keys[:, None, :].expand(b, length, length)
    elif kind == "captioning":
        places = torch.arange(length, device=keys.device)
        allowed = keys[:, None, :] & (places <= places[:, None].clamp(min=v + 1))
    else:
        # Part numbers: 0 is [CLS], 1 is the video and its [SEP], 2 is the text. Padding belongs to its own modality.
        part = torch.full((length,), 2, device=keys.device)
        part[0] = 0
        part[1 : v + 2] = 1
        allowed = keys[:, None, :] & (part[:, None] == part[None, :])
    empty = ~allowed.any(dim=-1, keepdim=True)
    itself = torch.eye(length, dtype=torch.bool, device=keys.device)
    return (allowed | (empty & itself))[:, None]


def stretches(kind: Attention, video_mask: Tensor, text_mask: Tensor) -> Tensor:
    """Lengths of what attends to itself alone, when real places lie one behind the other: int64, some may be 0.

    A clip is one stretch (B,); in the isolated form it is three (3·B,): [CLS], video with its [SEP], text.
    Arguments as of `attention_mask`.
    """
    of_video, of_text = video_mask.sum(1), text_mask.sum(1)
    if kind != "isolated":
        return of_video + of_text
    cls, sep = text_mask[:, 0].long(), text_mask[:, 1].long()
    return torch.stack([cls, of_video + sep, of_text - cls - sep], dim=1).flatten()
