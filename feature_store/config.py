"""How videos become features and captions become tokens: the settings of extraction, store and captions."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_CHUNK = 8
_GPU_CHUNK = 16  # passing a chunk on takes a millisecond of Python, which all videos of a worker share
_GPU_BATCH = 64

# scheme:/rest of the address of a store or a file; one slash is what a Path of the command line leaves of two
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(.*)")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _even(value: int) -> int:
    if value % 2:
        raise ValueError(f"must be even, because S3D takes frames and pixels in pairs; give {value - 1} or {value + 1}")
    return value


Even = Annotated[int, AfterValidator(_even)]


class DecodeConfig(_Frozen):
    """How a video file becomes seconds of frames (reference/VLM recipe: 30 fps, short side 224, centre crop)."""

    fps: Even = Field(default=30, ge=2, le=120, description="Frames per second that the decoder hands on; even.")
    size: Even = Field(
        default=224, ge=32, description="Short side after scaling, and side of the centre crop, in pixels; even."
    )
    min_coverage: float = Field(
        default=0.95, ge=0.0, le=1.0,
        description="Share of the claimed seconds that must decode; below it a video is recorded as truncated.",
    )  # fmt: skip
    rotate: bool = Field(
        default=True,
        description="Turn the picture as its display matrix says; false keeps the stored one, as the reference does.",
    )
    timeout_s: float = Field(
        default=600.0, gt=0,
        description="Seconds of decoding, beyond four for each second of video, after which a video is given up.",
    )  # fmt: skip


class ExtractConfig(_Frozen):
    """How a corpus is extracted: one L2-normalised token per second of video."""

    decode: DecodeConfig = DecodeConfig()
    layer: Literal["video_embedding", "mixed_5c"] = Field(
        default="video_embedding", description="S3D output that is stored: 512-d video_embedding or 1024-d mixed_5c."
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Number format in which S3D works; the store says which."
    )
    normalise: bool = Field(
        default=True, description="L2-normalise each token (the reference's extraction script does)."
    )
    weights: str = Field(default="", description="S3D weights file (s3d_howto100m.pth).")
    batch_seconds: int = Field(
        default=0, ge=0,
        description="Most seconds of video in one S3D forward pass; 0 takes 8 on CPUs and 64 on GPUs.",
    )  # fmt: skip
    compile: bool = Field(
        default=True, description="Let torch.compile fuse S3D on GPUs; a worker then starts half a minute later."
    )
    workers: int = Field(
        default=0, ge=0,
        description="Ray workers; 0 takes one for every CPU or GPU of the cluster, and follows it as nodes join.",
    )  # fmt: skip
    gpus_per_worker: float = Field(default=0.0, ge=0, description="GPUs of one worker; 0 extracts on CPUs.")
    decoders: int = Field(
        default=0, ge=0,
        description="Decoding processes of one worker; 0 takes 2 on CPUs, and with a GPU its share of the node's CPUs.",
    )  # fmt: skip
    wait_for_nodes: bool = Field(
        default=False, description="Workers that do not fit yet wait for nodes to join (clusters that grow)."
    )
    deterministic: bool = Field(
        default=False,
        description="The same bits whatever the cluster: no joint batches of videos, one thread a worker.",
    )

    @property
    def batch(self) -> int:
        """Most clips in one forward pass."""
        return self.batch_seconds or (_GPU_BATCH if self.gpus_per_worker > 0 else _CHUNK)

    @property
    def chunk(self) -> int:
        """Most seconds of video that pass from decoding to the encoder at a time; on GPUs they join to batches."""
        return min(self.batch, _GPU_CHUNK) if self.gpus_per_worker > 0 else self.batch


class ImportConfig(_Frozen):
    """What becomes of features that others made, and what a new store says of their origin."""

    extractor: str = Field(default="imported", description="Name of what made the features.")
    normalise: bool = Field(default=False, description="L2-normalise each row.")
    rows_per_shard: int = Field(default=0, ge=0, description="Rows of a shard of a new store; see StoreConfig.")


class StoreConfig(_Frozen):
    """Layout of a new store (fixed when the store is created), and how stores are read."""

    rows_per_shard: int = Field(
        default=0, ge=0, description="Rows of one shard; 0 takes the most that stay within 64 MiB."
    )
    check: Literal["off", "sampled", "always"] = Field(
        default="sampled", description="How often a reader checks the crc32c of the videos that it reads."
    )
    mapped: bool = Field(
        default=False, description="Map shards into memory: quicker where the store fits into the page cache."
    )
    cache_gib: float = Field(
        default=0.0, ge=0,
        description="GiB of whole shards of an s3:// store that a node keeps; 0 reads each video by one request.",
    )  # fmt: skip


class CaptionConfig(_Frozen):
    """How captions become token rows (cleaned, de-duplicated, WordPiece)."""

    tokenizer: str = Field(
        default="",
        description="Hugging Face name, folder with a WordPiece vocabulary, or wordpiece:N to train one of N pieces; "
        "empty takes the store's own, which is bert-base-uncased where it has none yet.",
    )
    deduplicate: Literal["words", "reference", "off"] = Field(
        default="words",
        description="Repeated text of rolling captions: whole words, the reference's character rule, or kept.",
    )
    max_chars: int = Field(default=96, ge=1, description="A caption is cut to this many characters before tokenising.")
    max_tokens: int = Field(default=32, ge=1, description="A caption is cut to this many tokens.")
