"""VLM: one BERT encoder for video tokens and word pieces (paper 3.1, Eq. 1-4; reference facts 1)."""

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform

from vlm_dist.model.attention_masks import Attention
from vlm_dist.model.config import ModelConfig
from vlm_dist.model.packing import PACKED, Packing


def bert_config(config: ModelConfig) -> BertConfig:
    """The Hugging Face configuration of the encoder inside a VLM."""
    return BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        hidden_act=config.activation,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        max_position_embeddings=config.max_positions,
        type_vocab_size=2,
        layer_norm_eps=config.layer_norm_eps,
        initializer_range=0.02,
        attn_implementation=PACKED,  # pyright: ignore[reportCallIssue]
    )


class VideoMLP(nn.Module):
    """From a raw feature of width F to a "video word" of width D, the video's counterpart of the word table (Eq. 1).

    LayerNorm has PyTorch's eps 1e-5 here, not BERT's 1e-12. There is no dropout: the loss projects the same rows on
    every rank and relies on equal results.
    """

    def __init__(self, feature_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(feature_dim, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size)
        self.linear2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """(..., F) → (..., D)."""
        return self.linear2(self.LayerNorm(nn.functional.gelu(self.linear1(features))))


class VLM(nn.Module):
    """Encoder, video MLP and prediction head; the decoder is the word table itself, without bias unless configured.

    Attributes:
        config: sizes and variants, with vocab_size and feature_dim filled in.
        bert: Hugging Face's BertModel without pooler.
        video_mlp: raw features → video words.
        head: hidden states → predictions that are compared with video words and word pieces (Eq. 4).
        word_bias: (vocab_size,) bias of the word scores, or None (`decoder_bias`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size > 0, "vocab_size comes from the tokenizer before the model is made"
        assert config.feature_dim > 0, "feature_dim comes from the store before the model is made"
        self.config = config
        bert = bert_config(config)
        self.bert = BertModel(bert, add_pooling_layer=False)
        self.video_mlp = VideoMLP(config.feature_dim, config.hidden_size)
        self.head = (
            BertPredictionHeadTransform(bert)
            if config.head == "code"
            else nn.Linear(config.hidden_size, config.hidden_size)
        )
        self.word_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.decoder_bias else None
        for module in (self.video_mlp, self.head):
            module.apply(_init_like_bert)

    @property
    def word_table(self) -> Tensor:
        """(vocab_size, D) word embeddings, which are also the decoder."""
        return self.bert.embeddings.word_embeddings.weight

    def project_video(self, features: Tensor) -> Tensor:
        """Raw features (..., F) of any float type → video words (..., D) in the model's type."""
        return self.video_mlp(features.to(self.video_mlp.linear1.weight.dtype))

    def embed(self, video: Tensor, text: Tensor) -> Tensor:
        """Sum word or video, position and token type embeddings, then LayerNorm and dropout.

        Args:
            video: (B, V, F) features, zero where masked; V may be less than max_video_len.
            text: (B, T) ids, [CLS] [SEP] w1..wn [SEP] [PAD]..; T may be less than max_len - max_video_len.

        Returns:
            (B, 1 + V + T - 1, D) in the order [CLS] video [SEP] text. Text has the positions from max_video_len + 2 on
            whatever V is, and its places, padding too, have token type 1.
        """
        v, t = video.shape[1], text.shape[1]
        limit = self.config.max_video_len
        assert v <= limit, f"{v} video places, the model has {limit}"
        assert 2 <= t <= self.config.max_len - limit, f"{t} text places, the model has {self.config.max_len - limit}"
        words = self.bert.embeddings.word_embeddings(text)
        joined = torch.cat([words[:, :1], self.project_video(video), words[:, 1:]], dim=1)
        places = torch.arange(v + t, device=text.device)
        positions = places + (places > v) * (limit - v)
        types = (places > v + 1).long()
        return self.bert.embeddings(
            inputs_embeds=joined,
            position_ids=positions[None],
            token_type_ids=types.expand(text.shape[0], -1),
        )

    def encode(
        self,
        video: Tensor,
        video_mask: Tensor,
        text: Tensor,
        text_mask: Tensor,
        attention: Attention = "full",
        *,
        video_labels: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of the last layer, (B, 1 + V + T - 1, D): [CLS], V video places, [SEP], text; zero at padding.

        Args:
            video: (B, V, F) features, V <= max_video_len.
            video_mask: (B, V) bool, real seconds.
            text: (B, T) int64, [CLS] [SEP] w1..wn [SEP] [PAD]..
            text_mask: (B, T) bool.
            attention: "full", "isolated" or "captioning" (see `attention_masks`).
            video_labels: (B, V) bool, places whose feature is zeroed before the video MLP (reference facts 1.2).
            places: (N,) int64, the real ones of the B·L places, where they are known (`ClipBatch.places`).
        """
        if video_labels is not None:
            video = video.masked_fill(video_labels[..., None], 0)
        hidden = self.embed(video, text)
        packing = Packing.of(attention, video_mask, text_mask, places)
        packed: Tensor = self.bert.encoder(packing.pack(hidden)[None], attention_mask=packing).last_hidden_state[0]
        return packing.unpack(packed)

    @staticmethod
    def split(hidden: Tensor, video_places: int) -> tuple[Tensor, Tensor]:
        """Cut (B, 1 + V + T - 1, D) into the V video places (B, V, D) and the places of the text tensor (B, T, D)."""
        video = hidden[:, 1 : 1 + video_places]
        return video, torch.cat([hidden[:, :1], hidden[:, 1 + video_places :]], dim=1)

    def pool(self, hidden: Tensor, video_mask: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mean hidden states of each modality, not normalised (reference facts 4.1).

        Args:
            hidden: (B, 1 + V + T - 1, D) from `encode`, with the isolated mask if the two must not see each other.
            video_mask: (B, V) bool.
            text_mask: (B, T) bool.

        Returns:
            (B, D) over the real seconds and the video's [SEP], and (B, D) over the words and the last [SEP].
        """
        v = video_mask.shape[1]
        of_video = torch.cat([video_mask, text_mask[:, 1:2]], dim=1)
        return _mean(hidden[:, 1 : v + 2], of_video), _mean(hidden[:, v + 2 :], text_mask[:, 2:])


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def _init_like_bert(module: nn.Module) -> None:
    # Only linear layers differ from PyTorch's own initialisation: LayerNorm starts at 1 and 0 in both.
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
