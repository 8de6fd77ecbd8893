"""Features and word pieces of task items as padded tensors (… clips → batches of an end task → model …)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch

from feature_store.reader import FeatureReader
from feature_store.tokenizer import Tokenizer
from vlm_dist.data.batch import SpecialIds


@dataclass(frozen=True)
class TaskBatch:
    """What every end task gives the encoder; tasks add their targets in a subclass.

    Attributes:
        video: (B, V, F) float16 features, zero where `video_mask` is false.
        video_mask: (B, V) bool, true at seconds of video.
        text: (B, T) int64, `[CLS] [SEP] w1 … wn [SEP] [PAD]…`; the model puts the video behind [CLS].
        text_mask: (B, T) bool.
    """

    video: torch.Tensor
    video_mask: torch.Tensor
    text: torch.Tensor
    text_mask: torch.Tensor

    def __len__(self) -> int:
        return self.video.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch on another device."""
        return replace(
            self, **{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)}
        )


def gather_windows(
    reader: FeatureReader, videos: np.ndarray, first: np.ndarray, last: np.ndarray, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads rows first:last of each video, at most `width` of them, each video once.

    Args:
        reader: The feature store.
        videos: (B,) store numbers of the videos; repeats are cheap.
        first: (B,) first row of each window.
        last: (B,) one past its last row.
        width: Video places V.

    Returns:
        Features (B, V', F) float16, zero-padded, and their mask (B, V') bool, V' <= V the longest window (at least 1):
        the model numbers places the same way whatever the width is.
    """
    distinct, which = np.unique(videos, return_inverse=True)
    rows = reader.read_many(distinct)
    length = np.minimum(last - first, width)
    features = np.zeros((len(videos), int(length.max(initial=1)), reader.meta.feature_dim), np.float16)
    for place, (video, lo, n) in enumerate(zip(which, first, length, strict=True)):
        features[place, :n] = rows[video][lo : lo + n]
    mask = np.arange(features.shape[1])[None, :] < length[:, None]
    return torch.from_numpy(features), torch.from_numpy(mask)


def frame_text(
    special: SpecialIds, tokens: np.ndarray, offsets: np.ndarray, items: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of some items as the model's text tensor, padded to the longest of them.

    Args:
        special: Ids of [CLS], [SEP] and [PAD].
        tokens: (N,) word pieces of all items, one after the other.
        offsets: (items + 1,) where each item's pieces begin.
        items: (B,) the items that are wanted.

    Returns:
        Ids (B, T) int64 and mask (B, T) bool, T = longest text + 3.
    """
    lengths = offsets[items + 1] - offsets[items]
    text = np.full((len(items), int(lengths.max(initial=0)) + 3), special.pad, np.int64)
    text[:, 0], text[:, 1] = special.cls, special.sep
    for row, (item, length) in enumerate(zip(items, lengths, strict=True)):
        text[row, 2 : 2 + length] = tokens[offsets[item] : offsets[item] + length]
        text[row, 2 + length] = special.sep
    mask = np.arange(text.shape[1])[None, :] < (lengths + 3)[:, None]
    return torch.from_numpy(text), torch.from_numpy(mask)


def no_text(special: SpecialIds, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's dummy text for video-only passes: `[CLS] [SEP] [PAD] [SEP]` with mask 0 1 0 1 (facts 4.3)."""
    text = torch.tensor([special.cls, special.sep, special.pad, special.sep]).repeat(count, 1)
    return text, torch.tensor([False, True, False, True]).repeat(count, 1)


def pack_texts(tokenizer: Tokenizer, texts: Sequence[str], limit: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Word pieces of texts, each cut at `limit` pieces.

    Returns:
        Pieces (N,) int32 one text after the other, offsets (texts + 1,), and how many texts were cut.
    """
    encoded = tokenizer.encode_many(texts)
    lengths = np.array([len(pieces) for pieces in encoded], np.int64)
    kept = [piece for pieces in encoded for piece in pieces[:limit]]
    offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, limit))])
    return np.array(kept, np.int32), offsets, int((lengths > limit).sum())
