"""vlm-dist: from videos to features, from features to one model for video and text, and from it to compared runs."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm_dist.model.checkpoint import LoadedVLM

__version__ = "0.1.0"


def load(path: str | Path) -> "LoadedVLM":
    """Load an exported model with its tokenizer, ready for inference (see `vlm_dist.model.checkpoint.load`)."""
    from vlm_dist.model.checkpoint import load as load_folder  # torch is imported only when a model is wanted

    return load_folder(path)
