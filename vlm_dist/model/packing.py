"""Real places alone pass through the encoder's layers, one behind the other (inside the model).

Attention needs the clips apart: it goes stretch by stretch, a stretch being places that see each other and nothing else
(a clip; its three parts where modalities are isolated). On CPUs that is a call for each stretch, on GPUs one call of
FlashAttention for all of them; there, where that kernel can't be used, attention alone sees padded rows and a mask.
What lies before the layers (embeddings, the video MLP) still goes over all places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlm_dist.model.attention_masks import Attention, attention_mask, real_places, stretches

PACKED = "vlm_packed"
"""Name of this form of attention among those that transformers knows."""
_FLASH = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Packing:
    """Which places of B sequences of length L are real, and who may attend to whom.

    BERT's layers hand it on where they expect a mask.

    Attributes:
        kind: See `attention_mask`.
        video_mask: (B, V) bool.
        text_mask: (B, T) bool.
        places: (N,) int64, the real ones of the B·L places.
        bounds: (stretches + 1,) int32, where each stretch begins, and the end of the last one; some may be empty.
    """

    kind: Attention
    video_mask: Tensor
    text_mask: Tensor
    places: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, kind: Attention, video_mask: Tensor, text_mask: Tensor, places: Tensor | None = None) -> Self:
        """With the places if they are known: to find them is to wait for all that a GPU was given before."""
        if places is None:
            places = real_places(video_mask, text_mask).flatten().nonzero()[:, 0]
        ends = stretches(kind, video_mask, text_mask).cumsum(0, dtype=torch.int32)
        return cls(kind, video_mask, text_mask, places, torch.nn.functional.pad(ends, (1, 0)))

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        return len(self.video_mask), self.video_mask.shape[1] + self.text_mask.shape[1]

    @cached_property
    def lengths(self) -> list[int]:
        """Of the stretches, in the order of the places; none is empty."""
        return [length for length in self.bounds.diff().tolist() if length]

    @cached_property
    def inner_masks(self) -> list[Tensor | None]:
        """(n, n) bool for each stretch: who sees whom in it; None where all see all."""
        if self.kind != "captioning":
            return [None] * len(self.lengths)
        places = torch.arange(max(self.lengths))
        words = self.text_mask[:, 2:].sum(1).tolist()
        return [
            places[:n] <= places[:n, None].clamp(min=n - after - 1)
            for n, after in zip(self.lengths, words, strict=True)
        ]

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, L, L) bool, for attention over padded rows."""
        return attention_mask(self.kind, self.video_mask, self.text_mask)

    def pack(self, padded: Tensor) -> Tensor:
        """(B, L, ...) → (N, ...)."""
        return padded.flatten(0, 1).index_select(0, self.places)

    def unpack(self, packed: Tensor) -> Tensor:
        """(N, ...) → (B, L, ...), zero where a place is not real."""
        b, length = self.shape
        padded = packed.new_zeros(b * length, *packed.shape[1:]).index_copy_(0, self.places, packed)
        return padded.view(b, length, *packed.shape[1:])


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Packing | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of packed sequences: (1, H, N, D/H) each → (1, N, H, D/H); the form that transformers asks for.

    With a mask in the place of a packing, the attention of PyTorch: somebody calls the BERT inside by itself.
    """
    packing = attention_mask
    if not isinstance(packing, Packing):
        return sdpa_attention_forward(module, query, key, value, packing, dropout, scaling, **kwargs)
    parts = [part[0].transpose(0, 1) for part in (query, key, value)]  # (N, H, D/H) each
    if not query.is_cuda:
        out = _stretch_by_stretch(parts, packing, dropout, scaling)
    elif _fits_flash(parts[0], dropout, packing):
        from torch.nn.attention.varlen import varlen_attn

        longest = packing.shape[1]  # or less: a bound that is known without asking the device
        whole: Any = varlen_attn(parts[0], parts[1], parts[2], packing.bounds, packing.bounds, longest, longest)
        out = whole
    else:
        rows = (packing.unpack(part).transpose(1, 2) for part in parts)
        padded = scaled_dot_product_attention(*rows, attn_mask=packing.mask, dropout_p=dropout, scale=scaling)
        out = packing.pack(padded.transpose(1, 2))
    return out[None], None


def _fits_flash(query: Tensor, dropout: float, packing: Packing) -> bool:
    return query.dtype in _FLASH and query.shape[-1] % 8 == 0 and not dropout and packing.kind != "captioning"


def _stretch_by_stretch(parts: Sequence[Tensor], packing: Packing, dropout: float, scaling: float | None) -> Tensor:
    """Nothing is padded, and nothing masked that need not be."""
    query, key, value = (part.transpose(0, 1)[None].split(packing.lengths, dim=2) for part in parts)
    outs = [
        scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
        for q, k, v, mask in zip(query, key, value, packing.inner_masks, strict=True)
    ]
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
