"""Weights of the video encoder (frames → features): the public HowTo100M file, or random ones fitted to the corpus."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from feature_store.s3d import S3D
from feature_store.s3d_fused import FusedS3D
from vlm_dist.errors import ExtractionError

NO_RANDOM_LAYER = "random weights are made for video_embedding: mixed_5c of them is alike for all videos"
NO_WEIGHTS = (
    "no S3D weights: give --weights s3d_howto100m.pth, the file of the GitHub project antoine77340/S3D_HowTo100M"
    " (its original hosts are dead since 2024; issue 14 there points at a copy). To try everything without it, give"
    " --random-weights SEED: features that tell clips apart, but know nothing of the world"
)
_SHOWN = 5  # differences that an error names before it says how many more there are
_FEW_CLIPS = 8


def load_s3d(path: Path | str) -> tuple[S3D, str]:
    """Load S3D from the public checkpoint (537 tensors; its text module is dropped) or from a store's own safetensors.

    Returns:
        The model in eval mode, and the file's sha256.

    Raises:
        ExtractionError: no such file, not a state dict, or (these are named) keys or shapes that are not S3D's, or
            values that are not finite.
    """
    path = Path(path)
    sha256 = file_sha256(path)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises anything on what is no checkpoint
        raise ExtractionError(f"{path}: not a file of PyTorch weights ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise ExtractionError(f"{path}: holds a {type(state).__name__}, and S3D's weights are a plain dict of tensors")
    state = {key: value for key, value in state.items() if not str(key).startswith("text_module.")}
    model = S3D()
    _check_state(path, state, model.state_dict())
    if damaged := [key for key, value in state.items() if not value.isfinite().all()]:
        raise ExtractionError(f"{path}: damaged weights: {_some(damaged)} hold values that are not finite; get it anew")
    model.load_state_dict(state)
    return model, sha256


def _check_state(path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    shapes = {key: tuple(getattr(value, "shape", ())) for key, value in state.items()}
    problems = [f"{key} is missing" for key in expected if key not in shapes]
    problems += [f"{key} is not part of S3D" for key in shapes if key not in expected]
    problems += [
        f"{key} has shape {shapes[key]} and needs {tuple(value.shape)}"
        for key, value in expected.items()
        if key in shapes and shapes[key] != tuple(value.shape)
    ]
    if problems:
        raise ExtractionError(f"{path}: not S3D's weights: {_some(problems)}. {NO_WEIGHTS}")


def _some(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more


def file_sha256(path: Path) -> str:
    """sha256 of a weights file's bytes, in hex; ExtractionError if there is no such file."""
    if not path.is_file():
        raise ExtractionError(f"{path}: no such weights file; {NO_WEIGHTS}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def random_s3d(seed: int, clips: np.ndarray) -> S3D:
    """S3D with seeded random weights whose embeddings differ from clip to clip.

    PyTorch's default initialisation gives every clip the same embedding. Kaiming-normal convolutions keep what tells
    clips apart, but in deviations of 1e-4 around a large mean; so each dimension is centred and scaled on `clips`, and
    that is folded into `fc`. mixed_5c, before `fc`, stays as alike as before.

    Args:
        seed: Decides every weight together with `clips`.
        clips: Calibration sample, uint8 (n, T, H, W, 3), n >= 1, from `encode.calibration_clips`.
    """
    assert len(clips) > 0, "calibration needs at least one clip"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = S3D()
        for module in model.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    if len(clips) < _FEW_CLIPS:  # too few to tell a deviation from: add their negatives and mirrored time
        clips = np.concatenate([clips, 255 - clips, clips[:, ::-1, ::-1], 255 - clips[:, :, :, ::-1]])
    with torch.inference_mode():
        encoder = FusedS3D(model)
        out = torch.cat([encoder(part) for part in torch.from_numpy(clips).split(8)]).double()
    mean, std = out.mean(dim=0), out.std(dim=0)
    std = std.clamp_min(1e-3 * float(std.mean())).clamp_min(1e-12)
    with torch.no_grad():
        model.fc.weight.copy_(model.fc.weight.double() / std[:, None])
        model.fc.bias.copy_((model.fc.bias.double() - mean) / std)
    return model
