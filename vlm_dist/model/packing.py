"""Real places alone pass through the encoder's layers, one behind the other (inside the model).

Only attention needs the sequences apart, and it is 2 % of a layer's arithmetic at 96 places: it alone sees padded rows.
What lies before the layers (embeddings, the video MLP) still goes over all places.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED = "vlm_packed"
"""Name of this form of attention among those that transformers knows."""


class Packing(NamedTuple):
    """Which places of B sequences of length L are real, and who may attend to whom.

    BERT's layers hand it on where they expect a mask, so that the padded rows exist inside of attention only.
    """

    places: Tensor
    """(N,) int64, of the B·L places."""
    mask: Tensor
    """(B, 1, L, L) bool, as `attention_mask` makes it."""

    @classmethod
    def of(cls, real: Tensor, mask: Tensor) -> "Packing":
        """From (B, L) bool, real places."""
        return cls(real.flatten().nonzero()[:, 0], mask)

    def pack(self, padded: Tensor) -> Tensor:
        """(B, L, ...) → (N, ...)."""
        return padded.flatten(0, 1).index_select(0, self.places)

    def unpack(self, packed: Tensor) -> Tensor:
        """(N, ...) → (B, L, ...), zero where a place is not real."""
        b, length = self.mask.shape[0], self.mask.shape[-1]
        padded = packed.new_zeros(b * length, *packed.shape[1:]).index_copy(0, self.places, packed)
        return padded.view(b, length, *packed.shape[1:])


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Packing,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of packed sequences: (1, H, N, D/H) each → (1, N, H, D/H); the form that transformers asks for."""
    rows = (attention_mask.unpack(part[0].transpose(0, 1)).transpose(1, 2) for part in (query, key, value))
    out = scaled_dot_product_attention(*rows, attn_mask=attention_mask.mask, dropout_p=dropout, scale=scaling)
    return attention_mask.pack(out.transpose(1, 2))[None], None


AttentionInterface.register(PACKED, packed_attention)
