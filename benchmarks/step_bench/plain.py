"""A pre-training step as the reference makes it: all 96 places padded, eager attention, all scores at once."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import BertModel

from vlm_dist.data.batch import IGNORE, ClipBatch
from vlm_dist.model.attention_masks import attention_mask
from vlm_dist.model.vlm import VLM, bert_config


class PlainStep(nn.Module):
    """The loss of one batch (Eq. 8, 9) with the weights of a VLM; negatives are the batch's own visible seconds."""

    def __init__(self, model: VLM) -> None:
        super().__init__()
        config = bert_config(model.config)
        config._attn_implementation = "eager"
        encoder = BertModel(config, add_pooling_layer=False)
        encoder.load_state_dict(model.bert.state_dict())
        model.bert = encoder.to(model.word_table.dtype)
        self.model = model

    def forward(self, batch: ClipBatch) -> Tensor:
        """Mean over the masked tokens."""
        model, batch = self.model, _whole(batch, self.model)
        video = batch.video.masked_fill(batch.video_labels[..., None], 0)
        seen = attention_mask("full", batch.video_mask, batch.text_mask)
        dtype = model.word_table.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        hidden = model.bert.encoder(model.embed(video, batch.text), attention_mask=mask).last_hidden_state
        at_video, at_text = model.split(hidden, batch.video.shape[1])
        is_text = batch.text_labels != IGNORE
        text, video_rows = model.head(at_text[is_text]), model.head(at_video[batch.video_labels])
        keys = model.project_video(batch.visible_video())
        own = model.project_video(batch.video[batch.video_labels])
        words = model.word_table
        positive = (video_rows * own).sum(1, keepdim=True)
        text_scores = torch.cat([text @ words.T, text @ keys.T], 1)
        video_scores = torch.cat([positive, video_rows @ keys.T, video_rows @ words.T], 1)
        loss = cross_entropy(text_scores.float(), batch.text_labels[is_text], reduction="sum")
        first = torch.zeros(len(video_rows), dtype=torch.int64, device=words.device)
        loss = loss + cross_entropy(video_scores.float(), first, reduction="sum")
        return loss / (len(text) + len(video_rows))


def _whole(batch: ClipBatch, model: VLM) -> ClipBatch:
    """Padded to the model's places, whatever the batch needs."""
    v = model.config.max_video_len - batch.video.shape[1]
    t = model.config.max_len - model.config.max_video_len - batch.text.shape[1]
    return ClipBatch(
        video=pad(batch.video, (0, 0, 0, v)),
        video_mask=pad(batch.video_mask, (0, v)),
        video_labels=pad(batch.video_labels, (0, v)),
        text=pad(batch.text, (0, t)),
        text_mask=pad(batch.text_mask, (0, t)),
        text_labels=pad(batch.text_labels, (0, t), value=IGNORE),
    )
