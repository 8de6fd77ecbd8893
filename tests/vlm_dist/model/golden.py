"""The reference's recorded numbers under this project's names."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlm_dist.data.batch import IGNORE, ClipBatch
from vlm_dist.model.config import ModelConfig
from vlm_dist.model.vlm import VLM

SIZES = {
    "hidden_size": 48, "num_layers": 3, "num_heads": 4, "intermediate_size": 96, "dropout": 0.0,
    "vocab_size": 400, "feature_dim": 512, "max_video_len": 8, "max_len": 24,
}  # fmt: skip
UNUSED = ("decoder.weight", "decoder.bias", "pooler", "position_ids", "seg_embeddings")


def own_name(key: str) -> str:
    """A reference parameter's name in `VLM`."""
    key = key.removeprefix("mm_encoder.").replace("videomlp", "video_mlp")
    return key.replace("cls.predictions.transform", "head").replace("cls.predictions.bias", "word_bias")


class Golden:
    """One file of golden/: arrays by prefix, and the model and batch that it describes."""

    def __init__(self, shared: Path, name: str) -> None:
        with np.load(shared / "golden" / f"{name}.npz") as arrays:
            numbers = {key: arrays[key] for key in arrays.files if arrays[key].dtype.kind != "U"}
            self.arrays = {key: torch.from_numpy(array) for key, array in numbers.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def gradients(self) -> dict[str, Tensor]:
        """Expected gradients by this project's parameter names."""
        return {own_name(key[2:]): value for key, value in self.arrays.items() if key.startswith("g/")}

    def model(self) -> VLM:
        """A VLM with the file's weights; a head that the file lacks stays as initialised."""
        bias = "w/mm_encoder.cls.predictions.bias" in self.arrays
        model = VLM(ModelConfig.model_validate({**SIZES, "decoder_bias": bias}))
        weights = {own_name(key[2:]): value for key, value in self.arrays.items() if key.startswith("w/")}
        kept = {key: value for key, value in weights.items() if not any(part in key for part in UNUSED)}
        missing, surplus = model.load_state_dict(kept, strict=False)
        assert not surplus
        assert all(key.startswith("head.") for key in missing)
        return model

    def batch(self) -> ClipBatch:
        """The file's inputs; nothing is masked where it has no labels."""
        video_mask, text = self["in/vmasks"], self["in/caps"]
        return ClipBatch(
            video=self["in/vfeats"],
            video_mask=video_mask,
            video_labels=self.arrays.get("in/video_label", torch.zeros_like(video_mask)),
            text=text,
            text_mask=self["in/cmasks"],
            text_labels=self.arrays.get("in/text_label", torch.full_like(text, IGNORE)),
        )


def tiny_model(seed: int = 0, **fields: object) -> VLM:
    """A small model with random weights, without dropout."""
    torch.manual_seed(seed)
    sizes = {**SIZES, "vocab_size": 60, "feature_dim": 16, **fields}
    return VLM(ModelConfig.model_validate(sizes)).eval()


def random_batch(clips: int, seed: int = 0, *, vocab: int = 60, width: int = 16, video: int = 8) -> ClipBatch:
    """Clips with random lengths (video 0..V, text 1..13) and random masks; the first clip has no video."""
    rng = torch.Generator().manual_seed(seed)
    seconds = torch.randint(0, video + 1, (clips,), generator=rng)
    seconds[0] = 0
    words = torch.randint(1, 14, (clips,), generator=rng)
    video_mask = torch.arange(video) < seconds[:, None]
    places = torch.arange(16)
    text_mask = places < words[:, None] + 3
    text = torch.randint(5, vocab, (clips, 16), generator=rng)
    text[:, 0], text[:, 1] = 2, 3
    text[torch.arange(clips), words + 2] = 3
    text[~text_mask] = 0
    is_word = text_mask & (places > 1) & (places < words[:, None] + 2)
    chosen = is_word & (torch.rand(clips, 16, generator=rng) < 0.4)
    return ClipBatch(
        video=torch.randn(clips, video, width, generator=rng) * video_mask[..., None],
        video_mask=video_mask,
        video_labels=video_mask & (torch.rand(clips, video, generator=rng) < 0.4),
        text=torch.where(chosen, 4, text),
        text_mask=text_mask,
        text_labels=torch.where(chosen, text, IGNORE),
    )


def encode(model: VLM, batch: ClipBatch, attention: str = "full") -> Tensor:
    """Hidden states of a masked batch."""
    return model.encode(
        batch.video, batch.video_mask, batch.text, batch.text_mask, attention, video_labels=batch.video_labels
    )  # fmt: skip
