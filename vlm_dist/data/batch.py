"""One batch of clips as tensors: what clips and masks make, and what model and loss take."""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Protocol, Self

import torch
from torch import Tensor

from vlm_dist.model.attention_masks import real_places

IGNORE = -100  # label of a text place that is not predicted


class _Tokenizer(Protocol):
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int

    @property
    def vocab_size(self) -> int: ...


@dataclass(frozen=True)
class SpecialIds:
    """Token ids with a meaning of their own, and the number of ids in all."""

    pad: int
    cls: int
    sep: int
    mask: int
    vocab_size: int

    @classmethod
    def of(cls, tokenizer: _Tokenizer) -> Self:
        """Take the ids of a `feature_store.tokenizer.Tokenizer`."""
        return cls(tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.vocab_size)


@dataclass(frozen=True)
class Places:
    """Where things lie in a batch, as int64 numbers of places behind one another: `tensor.flatten(0, 1)[places]`."""

    real: Tensor
    """Of the B·L places of [CLS] video [SEP] text, those that are not padding."""
    masked_text: Tensor
    """Of the B·T text places."""
    masked_video: Tensor
    """Of the B·V video places."""
    visible_video: Tensor
    """Of the B·V video places, real and not masked."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on another device."""
        return type(self)(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))


@dataclass(frozen=True)
class ClipBatch:
    """B clips with V video places and T text places (reference facts 1.1).

    video         (B, V, F) features, one per second, not yet masked; padding is zero
    video_mask    (B, V) bool, True at real seconds (always the first of a row)
    video_labels  (B, V) bool, True at masked seconds, which the model must find again
    text          (B, T) int64, [CLS] [SEP] w1..wn [SEP] [PAD].., after masking; the first [SEP] is the video's
    text_mask     (B, T) bool, True at the first n + 3 places
    text_labels   (B, T) int64, the true id at masked places, IGNORE elsewhere
    """

    video: Tensor
    video_mask: Tensor
    video_labels: Tensor
    text: Tensor
    text_mask: Tensor
    text_labels: Tensor

    def __len__(self) -> int:
        return self.video.shape[0]

    def __getitem__(self, clips: slice) -> Self:
        """The given clips, as views."""
        return type(self)(*(getattr(self, field.name)[clips] for field in fields(self)))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch on another device, with its places: found there, each would wait for all work before it."""
        moved = type(self)(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))
        vars(moved)["places"] = self.places.to(device, non_blocking)
        return moved

    def trim(self) -> Self:
        """Drop the places that are padding in every clip; the model gives the same result without them."""
        # At least one video place stays, so that no tensor of the model is empty.
        v = max(1, int(self.video_mask.sum(1).max())) if len(self) else 1
        t = int(self.text_mask.sum(1).max()) if len(self) else self.text.shape[1]
        return replace(
            self,
            video=self.video[:, :v],
            video_mask=self.video_mask[:, :v],
            video_labels=self.video_labels[:, :v],
            text=self.text[:, :t],
            text_mask=self.text_mask[:, :t],
            text_labels=self.text_labels[:, :t],
        )

    @cached_property
    def places(self) -> Places:
        """Where real, masked and visible tokens lie."""
        real = real_places(self.video_mask, self.text_mask)
        masks = real, self.text_labels != IGNORE, self.video_labels, self.video_mask & ~self.video_labels
        return Places(*(mask.flatten().nonzero()[:, 0] for mask in masks))

    @property
    def num_masked_text(self) -> int:
        """Masked text places of the batch."""
        return len(self.places.masked_text)

    @property
    def num_masked_video(self) -> int:
        """Masked video places of the batch."""
        return len(self.places.masked_video)

    def visible_video(self) -> Tensor:
        """(N, F) raw features of all real, unmasked seconds: this batch's share of the negatives V' (Eq. 5)."""
        return self.video.flatten(0, 1).index_select(0, self.places.visible_video)
