"""How clips are drawn from a video, how they are masked, and which videos train (paper sections 3.2, 3.3 and 5.1)."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClipConfig(_Frozen):
    """Clip sampling (reference facts 3.3; paper 5.2)."""

    clips_per_video: int = Field(default=32, ge=1, description="Clips drawn from one video in one visit.")
    min_text_tokens: int = Field(default=8, ge=1, description="Smallest wanted text length of a clip.")
    max_text_tokens: int = Field(default=64, ge=1, description="Largest wanted text length of a clip.")
    max_span_s: float = Field(
        default=256.0, gt=0, description="Captions are added to a clip while its span is below this."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_text_tokens > self.max_text_tokens:
            raise ValueError(f"min_text_tokens {self.min_text_tokens} is above max_text_tokens {self.max_text_tokens}")
        return self


class MaskConfig(_Frozen):
    """MFM-MLM and MMM masks (paper 3.2, 3.3; reference facts 2)."""

    mmm_probability: float = Field(
        default=0.5, ge=0, le=1, description="Share of clips with one whole modality masked."
    )
    mfm_probability: float = Field(
        default=0.15, ge=0, le=1, description="Share of video tokens masked in the other clips."
    )
    mlm_probability: float = Field(
        default=0.15, ge=0, le=1, description="Share of text tokens masked in the other clips."
    )
    whole_text: Literal["code", "paper"] = Field(
        default="code",
        description="Whole-text masking: 80/10/10 as the code does, or every token [MASK] as the paper says.",
    )


class SplitConfig(_Frozen):
    """Which videos of a store train and which are held out (paper 5.1.1, 5.1.2)."""

    validation_videos: int = Field(default=4000, ge=0, description="Videos held out for validation at full size.")
    validation_share: float = Field(
        default=0.05, ge=0, le=0.5, description="At most this share of a small corpus is held out."
    )
    only: str = Field(default="", description="Named split of the store (`store split`) that trains; empty takes all.")
    exclude: tuple[str, ...] = Field(
        default=(), description="Files with video ids that never train (lists, JSONL, COIN.json)."
    )
