"""feature_store.s3d_fused: the numbers of the plain S3D and of the reference, at every shape; lower precisions."""

import copy
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from feature_store.config import DecodeConfig, ExtractConfig
from feature_store.decode import SecondsReader
from feature_store.s3d import FEATURE_DIM, S3D, Layer
from feature_store.s3d_fused import FusedS3D
from tests.feature_store.store_tools import golden_s3d


def random_model() -> S3D:
    """S3D with weights and BatchNorm statistics that all matter."""
    torch.manual_seed(0)
    model = S3D()
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm3d):
            for tensor, low, high in (
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.1, 0.1),
            ):
                assert tensor is not None
                tensor.uniform_(low, high)
    return model


@pytest.fixture(scope="module")
def model() -> S3D:
    return random_model()


def random_clips(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))


def plain(model: S3D, clips: torch.Tensor, layer: Layer) -> torch.Tensor:
    with torch.inference_mode():
        return model(clips.permute(0, 4, 1, 2, 3).float() / 255, layer)


# Sizes whose halves are even and odd at each of the five poolings, and times of one to sixteen pairs.
@pytest.mark.parametrize(
    "shape", [(2, 16, 64, 64), (1, 2, 32, 32), (2, 4, 50, 98), (1, 30, 100, 76), (1, 6, 36, 44), (1, 10, 66, 34)]
)
@pytest.mark.parametrize("layer", FEATURE_DIM)
def test_equals_the_plain_network(model: S3D, shape: tuple[int, ...], layer: Layer) -> None:
    clips = random_clips(*shape)
    expected, got = plain(model, clips, layer), FusedS3D(model, layer)(clips)
    assert got.dtype == torch.float32
    assert got.shape == (shape[0], FEATURE_DIM[layer])
    assert (got - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("clip", ["small", "odd16", "full"])
def test_matches_the_reference(shared: Path, clip: str) -> None:
    numbers = np.load(shared / "golden" / "s3d_io.npz")
    clips = torch.from_numpy(numbers[f"clip_{clip}"]).permute(0, 2, 3, 4, 1).to(torch.uint8)
    golden = golden_s3d(shared)
    embedding, mixed_5c = (FusedS3D(golden, layer)(clips).numpy() for layer in FEATURE_DIM)
    assert np.abs(embedding - numbers[f"emb_{clip}"]).max() < 5e-5
    assert np.abs(mixed_5c - numbers[f"mixed_5c_{clip}"]).max() < 2e-4


@pytest.mark.gpu
def test_matches_the_plain_network_on_cuda(model: S3D) -> None:
    clips = random_clips(2, 30, 64, 64)
    expected = plain(model, clips, "video_embedding")
    got = FusedS3D(model).cuda()(clips.cuda()).cpu()
    assert (got - expected).abs().max() < 5e-5


def test_takes_copies_of_the_weights(model: S3D) -> None:
    mine, clips = copy.deepcopy(model), random_clips(1, 4, 32, 32)
    fused = FusedS3D(mine)
    before = fused(clips)
    for parameter in mine.parameters():
        parameter.data.zero_()
    assert torch.equal(fused(clips), before)
    assert torch.equal(clips, random_clips(1, 4, 32, 32)), "the input is left as it was"


def test_clips_of_a_batch_do_not_touch_each_other(model: S3D) -> None:
    fused, clips = FusedS3D(model), random_clips(3, 16, 48, 48)
    alone = torch.cat([fused(clips[k : k + 1]) for k in range(3)])
    assert torch.allclose(fused(clips), alone, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "share"), [("bfloat16", 0.15), ("float16", 0.02)])
def test_lower_precision_errs_less_than_seconds_differ(shared: Path, precision: str, share: float) -> None:
    """Real video, the reference's weights: centred, the error is small beside what tells neighbouring seconds apart."""
    cfg = ExtractConfig(decode=DecodeConfig(size=112))
    model = golden_s3d(shared)
    files = sorted((shared / "data" / "videos").glob("*.mp4"))[:3]
    clips = [np.stack(list(islice(SecondsReader(path, cfg.decode), 4))) for path in files]
    exact = [FusedS3D(model)(torch.from_numpy(c)) for c in clips]
    low = FusedS3D(model, dtype=getattr(torch, precision))
    rounded = [low(torch.from_numpy(c)) for c in clips]
    error = torch.cat([a - b for a, b in zip(rounded, exact, strict=True)])
    bias, error = error.mean(0).norm(), (error - error.mean(0)).norm(dim=1).mean()
    steps = torch.cat([rows.diff(dim=0) for rows in exact]).norm(dim=1).mean()
    assert error < share * steps
    assert bias < 2 * share * steps
