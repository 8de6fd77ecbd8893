"""Which tokens of a clip the model must find again: MFM-MLM and masked modality (paper 3.2, 3.3; reference facts 2)."""

import numpy as np
import torch
from torch import Tensor

from vlm_dist.data.batch import IGNORE, ClipBatch, SpecialIds
from vlm_dist.data.config import MaskConfig
from vlm_dist.data.rng import ClipKeys, Stream

_MASKED = 0.8  # share of chosen text tokens that become [MASK]
_REPLACED = 0.9  # up to here a random id; the rest stays as it is


def mask_batch(batch: ClipBatch, keys: ClipKeys, cfg: MaskConfig, ids: SpecialIds) -> ClipBatch:
    """Choose the masked places of every clip and put [MASK], random or true ids at those of the text.

    With mmm_probability, all of one modality is masked and the other is left alone, half of the time each. Otherwise
    every real second is chosen with mfm_probability and every word piece with mlm_probability, independently.
    Video features stay as they are: the model zeroes the chosen ones, and the loss needs them.

    Args:
        batch: unmasked clips.
        keys: of the same clips; they alone decide every draw.
        cfg: probabilities, and whether whole-text masking replaces every token by [MASK] ("paper") or 80 % ("code").
        ids: special tokens and vocabulary size; random ids come from the whole vocabulary, as in the reference.

    Returns:
        The batch with text, text_labels and video_labels set.
    """
    assert len(batch) == len(keys), "one key for each clip"
    v, t = np.arange(batch.video.shape[1]), np.arange(batch.text.shape[1])
    whole = keys.uniform(Stream.MASK_KIND) < cfg.mmm_probability
    whole_text = whole & (keys.uniform(Stream.MASK_WHICH) > 0.5)
    whole_video = whole & ~whole_text

    video_p = np.where(whole, np.where(whole_video, 1.0, 0.0), cfg.mfm_probability)
    text_p = np.where(whole, np.where(whole_text, 1.0, 0.0), cfg.mlm_probability)
    video_labels = _tensor(keys.uniform(Stream.MASK_VIDEO, v) < video_p[:, None], batch.video) & batch.video_mask

    # The first two places and the last real one are [CLS] and the two [SEP]; what is left is words.
    words = batch.text_mask.clone()
    words[:, :2] = False
    words.scatter_(1, batch.text_mask.sum(1, keepdim=True) - 1, False)
    chosen = _tensor(keys.uniform(Stream.MASK_TEXT, t) < text_p[:, None], batch.text) & words

    action = keys.uniform(Stream.MASK_ACTION, t)
    if cfg.whole_text == "paper":
        action[whole_text] = 0.0
    draw = (keys.uniform(Stream.MASK_TOKEN, t) * ids.vocab_size).astype(np.int64)
    text = torch.where(chosen & _tensor(action < _REPLACED, batch.text), _tensor(draw, batch.text), batch.text)
    text = torch.where(chosen & _tensor(action < _MASKED, batch.text), ids.mask, text)
    return ClipBatch(
        video=batch.video,
        video_mask=batch.video_mask,
        video_labels=video_labels,
        text=text,
        text_mask=batch.text_mask,
        text_labels=torch.where(chosen, batch.text, IGNORE),
    )


def _tensor(values: np.ndarray, beside: Tensor) -> Tensor:
    return torch.from_numpy(values).to(beside.device)
