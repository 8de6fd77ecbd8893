"""feature_store.s3d: the numbers of the reference, the names of the public checkpoint, and the parts one by one."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from feature_store.s3d import FEATURE_DIM, S3D, PaddedMaxPool, space_to_depth
from tests.feature_store.store_tools import golden_s3d


@pytest.fixture(scope="module")
def golden(shared: Path) -> S3D:
    return golden_s3d(shared)


@pytest.mark.parametrize("clip", ["small", "odd16", "full"])
def test_matches_the_reference(shared: Path, golden: S3D, clip: str) -> None:
    numbers = np.load(shared / "golden" / "s3d_io.npz")
    frames = torch.from_numpy(numbers[f"clip_{clip}"]).float() / 255
    with torch.inference_mode():
        embedding = golden(frames).numpy()
        mixed_5c = golden(frames, "mixed_5c").numpy()
    assert np.abs(embedding - numbers[f"emb_{clip}"]).max() < 5e-5
    assert np.abs(mixed_5c - numbers[f"mixed_5c_{clip}"]).max() < 2e-4


@pytest.mark.gpu
@pytest.mark.parametrize("clip", ["small", "odd16", "full"])
def test_matches_the_reference_on_cuda(shared: Path, golden: S3D, clip: str) -> None:
    numbers = np.load(shared / "golden" / "s3d_io.npz")
    frames = torch.from_numpy(numbers[f"clip_{clip}"]).cuda().float() / 255
    with torch.inference_mode():
        embedding = copy.deepcopy(golden).cuda()(frames).cpu().numpy()
    assert np.abs(embedding - numbers[f"emb_{clip}"]).max() < 5e-5


def test_runs_in_whole_float32_and_leaves_the_settings_as_they_were() -> None:
    def settings() -> tuple[bool, str]:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    model, seen = S3D(), []
    model.conv1.register_forward_hook(lambda *args: seen.append(settings()))
    before = settings()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        model(torch.rand(1, 3, 2, 32, 32))
        assert settings() == (True, "high")
    finally:
        torch.set_float32_matmul_precision(before[1])
        torch.backends.cudnn.allow_tf32 = before[0]
    assert seen == [(False, "highest")]


def test_names_and_shapes_of_the_public_checkpoint(shared: Path) -> None:
    public = json.loads((shared / "golden" / "s3d_keys.json").read_text())
    ours = {key: list(value.shape) for key, value in S3D().state_dict().items()}
    assert ours == {key: shape for key, shape in public.items() if not key.startswith("text_module.")}


def test_size() -> None:
    model = S3D()
    assert len(model.state_dict()) == 537 - 5  # the text module has five tensors
    assert round(sum(value.numel() for value in model.parameters()) / 1e6, 2) == 9.67


def naive_space_to_depth(frames: Tensor) -> Tensor:
    b, c, t, h, w = frames.shape
    out = torch.empty(b, 8 * c, t // 2, h // 2, w // 2)
    for dt in range(2):
        for dh in range(2):
            for dw in range(2):
                for channel in range(c):
                    place = ((dt * 2 + dh) * 2 + dw) * c + channel
                    out[:, place] = frames[:, channel, dt::2, dh::2, dw::2]
    return out


def test_space_to_depth_order() -> None:
    frames = torch.rand(2, 3, 4, 6, 8)
    assert torch.equal(space_to_depth(frames), naive_space_to_depth(frames))


@pytest.mark.parametrize(
    ("kernel", "stride", "shape", "expected"),
    [
        ((1, 3, 3), (1, 2, 2), (15, 112, 112), (15, 56, 56)),
        ((3, 3, 3), (2, 2, 2), (15, 28, 28), (8, 14, 14)),
        ((2, 2, 2), (2, 2, 2), (8, 14, 14), (4, 7, 7)),
        ((2, 2, 2), (2, 2, 2), (3, 5, 5), (2, 3, 3)),
    ],
)
def test_pooling_shapes(
    kernel: tuple[int, int, int], stride: tuple[int, int, int], shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert PaddedMaxPool(kernel, stride)(torch.rand(1, 2, *shape)).shape == (1, 2, *expected)


@pytest.mark.parametrize(("t", "size"), [(16, 64), (30, 32), (2, 32)])
def test_output_shapes(t: int, size: int) -> None:
    frames = torch.rand(2, 3, t, size, size)
    with torch.inference_mode():
        assert S3D()(frames).shape == (2, FEATURE_DIM["video_embedding"]) == (2, 512)
        assert S3D()(frames, "mixed_5c").shape == (2, FEATURE_DIM["mixed_5c"]) == (2, 1024)


def test_clips_of_a_batch_do_not_touch_each_other() -> None:
    model, frames = S3D(), torch.rand(3, 3, 16, 48, 48)
    with torch.inference_mode():
        together = model(frames)
        alone = torch.cat([model(frames[k : k + 1]) for k in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)
