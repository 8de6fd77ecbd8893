"""One file of recorded numbers: its arrays, and the model and inputs that it describes."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_dist.data.batch import IGNORE, ClipBatch
from vlm_dist.model.config import ModelConfig
from vlm_dist.model.foreign import ForeignWeights, read_json, read_reference
from vlm_dist.model.vlm import VLM

_BIAS = "w/mm_encoder.cls.predictions.bias"


class Golden:
    """Arrays by the recording's names: `w/` weights, `in/` inputs, `out/` outputs, `g/` gradients by weight."""

    def __init__(self, file: Path) -> None:
        self.folder = file.parent
        with np.load(file) as arrays:
            self.arrays = {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def named(self, prefix: str) -> dict[str, Tensor]:
        """The arrays behind a prefix, without it."""
        return {key.removeprefix(prefix): value for key, value in self.arrays.items() if key.startswith(prefix)}

    def model(self) -> VLM:
        """A VLM with the file's weights and sizes (attention heads as in bert_tiny/config.json)."""
        weights = _own_names(self.named("w/"))
        # A window's inputs have a further first dimension; text takes T places, of which three are special.
        sizes: dict[str, Any] = {
            "num_heads": read_json(self.folder / "bert_tiny" / "config.json")["num_attention_heads"],
            "max_video_len": self["in/vmasks"].shape[-1],
            "max_len": self["in/vmasks"].shape[-1] + self["in/caps"].shape[-1],
            "dropout": 0.0,
            "decoder_bias": _BIAS in self.arrays,
            **weights.sizes,
        }
        model = VLM(ModelConfig(**sizes))
        found = model.load_state_dict(weights.tensors, strict=False)
        missing = [key for key in found.missing_keys if not key.startswith("head.")]
        surplus = [key for key in found.unexpected_keys if not key.startswith("classifier.")]
        if missing or surplus:
            raise SystemExit(f"{self.folder}: weights that are missing: {missing}; that have no place: {surplus}")
        return model

    def gradients(self) -> dict[str, Tensor]:
        """Recorded gradients by this project's names."""
        return _own_names(self.named("g/")).tensors

    def batch(self) -> ClipBatch:
        """The inputs of pre-training; nothing is masked where there are no labels."""
        video_mask, text = self["in/vmasks"], self["in/caps"]
        return ClipBatch(
            video=self["in/vfeats"],
            video_mask=video_mask,
            video_labels=self.arrays.get("in/video_label", torch.zeros_like(video_mask)),
            text=text,
            text_mask=self["in/cmasks"],
            text_labels=self.arrays.get("in/text_label", torch.full_like(text, IGNORE)),
        )


def _own_names(tensors: dict[str, Tensor]) -> ForeignWeights:
    """Through the public import of reference checkpoints, which reads files."""
    with TemporaryDirectory(prefix="parity-") as folder:
        file = Path(folder) / "reference.pt"
        torch.save(tensors, file)
        return read_reference(file)
