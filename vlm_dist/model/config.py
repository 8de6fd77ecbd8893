"""The shape of the one encoder for video and text (paper section 3.1; defaults are BERT-base and the reference's)."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ModelConfig(BaseModel):
    """VLM's encoder: BERT, a video MLP in front of it, one prediction head for both modalities behind it.

    The BERT sizes are used by `init = scratch`; another init takes them from the checkpoint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_size: int = Field(default=768, ge=1, description="Width D of the hidden states.")
    num_layers: int = Field(default=12, ge=1, description="Transformer layers.")
    num_heads: int = Field(default=12, ge=1, description="Attention heads H.")
    intermediate_size: int = Field(default=3072, ge=1, description="Width of the feed-forward layers.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Dropout of hidden states and attention weights.")
    activation: Literal["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "swish"] = Field(
        default="gelu", description="Activation of BERT's feed-forward layers and head, by BERT's name."
    )
    layer_norm_eps: float = Field(default=1e-12, gt=0, description="Epsilon of BERT's LayerNorm.")
    max_positions: int = Field(default=512, ge=8, description="Rows of the position table.")
    vocab_size: int = Field(default=0, ge=0, description="Word pieces; 0 takes the store's tokenizer.")
    feature_dim: int = Field(default=0, ge=0, description="Width F of a video feature; 0 takes the store's.")
    max_video_len: int = Field(default=32, ge=1, description="Video places V of a clip (one per second).")
    max_len: int = Field(default=96, ge=8, description="All places of a clip: [CLS] video [SEP] text [SEP].")
    head: Literal["code", "paper"] = Field(
        default="code",
        description="Head: BERT's transform (dense, GELU, LayerNorm) as the code, or one linear layer (Eq. 4).",
    )

    decoder_bias: bool = Field(
        default=False,
        description="Bias of the word scores; the reference's MFM-MLM baseline and captioning keep BERT's.",
    )

    @property
    def max_text_len(self) -> int:
        """Text tokens that fit beside the video: max_len - max_video_len - 3 (61 at the reference's sizes)."""
        return self.max_len - self.max_video_len - 3

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_text_len < 1:
            raise ValueError(
                f"max_len {self.max_len} leaves no text token beside {self.max_video_len} video places and 3 special"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.max_len > self.max_positions:
            raise ValueError(f"max_len {self.max_len} is above max_positions {self.max_positions}")
        return self
