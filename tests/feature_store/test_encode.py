"""feature_store.encode: one function from a file to tokens."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from feature_store.config import DecodeConfig, ExtractConfig
from feature_store.decode import DecodeError, SecondsReader
from feature_store.encode import calibration_clips
from feature_store.s3d import S3D
from feature_store.weights import random_s3d
from tests.feature_store.store_tools import features_of
from vlm_dist.errors import ExtractionError

SMALL = ExtractConfig(decode=DecodeConfig(fps=16, size=64), batch_seconds=4)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> Path:
    return make_video(tmp_path_factory.mktemp("video") / "a.mp4", 9.5, width=80)


@pytest.fixture(scope="module")
def model(video: Path) -> S3D:
    return random_s3d(0, calibration_clips([video], SMALL.decode))


def by_hand(video: Path, model: S3D) -> np.ndarray:
    """All seconds at once, straight from the recipe: divide by 255, channels first, embed, normalise."""
    seconds = np.stack(list(SecondsReader(video, SMALL.decode)))
    with torch.inference_mode():
        out = model(torch.from_numpy(seconds.transpose(0, 4, 1, 2, 3).astype(np.float32) / 255)).numpy()
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def test_a_row_for_every_second(video: Path, model: S3D) -> None:
    got = features_of(video, model, SMALL)
    assert got.features.shape == (10, 512)
    assert got.features.dtype == np.float16
    assert got.decoded_s == pytest.approx(9.5)
    assert got.claimed_s == pytest.approx(9.5)
    assert got.seconds > 0
    assert np.abs(got.features.astype(np.float32) - by_hand(video, model)).max() < 2e-3
    assert np.linalg.norm(got.features.astype(np.float64), axis=1) == pytest.approx(np.ones(10), abs=2e-3)


def test_batches_do_not_matter(video: Path, model: S3D) -> None:
    one = features_of(video, model, SMALL.model_copy(update={"batch_seconds": 1})).features
    many = features_of(video, model, SMALL.model_copy(update={"batch_seconds": 64})).features
    assert np.abs(one.astype(np.float32) - many.astype(np.float32)).max() < 2e-3


def test_layer_and_normalisation(video: Path, model: S3D) -> None:
    mixed = features_of(video, model, SMALL.model_copy(update={"layer": "mixed_5c", "normalise": False}))
    plain = features_of(video, model, SMALL.model_copy(update={"normalise": False})).features.astype(np.float64)
    assert mixed.features.shape == (10, 1024)
    through_fc = model.fc(torch.from_numpy(mixed.features.astype(np.float32))).detach().numpy()
    # float16 of mixed_5c is coarse beside the calibrated fc, so only the directions are compared.
    cosine = np.sum(through_fc * plain, axis=1) / np.linalg.norm(through_fc, axis=1) / np.linalg.norm(plain, axis=1)
    assert cosine.min() > 0.99
    assert np.linalg.norm(plain, axis=1).max() > 2


def test_broken_file_keeps_its_reason(broken_videos: dict[str, Path], model: S3D) -> None:
    for reason, path in broken_videos.items():
        with pytest.raises(DecodeError) as caught:
            features_of(path, model, SMALL)
        assert caught.value.reason == reason


def test_damaged_weights_are_no_features(video: Path, model: S3D) -> None:
    damaged = S3D()
    damaged.load_state_dict({**model.state_dict(), "fc.bias": torch.full((512,), float("nan"))})
    with pytest.raises(ExtractionError, match="not finite"):
        features_of(video, damaged, SMALL)


def test_calibration_does_not_depend_on_the_order(tmp_path: Path, make_video: Callable[..., Path]) -> None:
    paths = [make_video(tmp_path / f"{seed}.mp4", 2.0, seed=seed) for seed in range(4)]
    (tmp_path / "text.mp4").write_text("no video")
    first = calibration_clips([*paths, tmp_path / "text.mp4"], SMALL.decode)
    assert np.array_equal(first, calibration_clips([tmp_path / "text.mp4", *reversed(paths)], SMALL.decode))
    assert len(first) == 4
    long_name = tmp_path / f"{'a' * 300}.mp4"
    assert np.array_equal(first, calibration_clips([long_name, *paths], SMALL.decode))


def test_calibration_says_why_no_video_can_be_read(tmp_path: Path) -> None:
    text, empty = tmp_path / "text.mp4", tmp_path / "empty.mp4"
    text.write_text("no video")
    empty.touch()
    for path, message in ((text, "no known video format"), (empty, "empty"), (tmp_path / "gone.mp4", "no such file")):
        with pytest.raises(DecodeError, match=f"{path.name}: .*{message}"):
            calibration_clips([path], SMALL.decode)
    gone = [tmp_path / f"{n}.mp4" for n in range(5)]
    with pytest.raises(ExtractionError, match=r"none of the 5 videos .*\.mp4: no such file; .*; and 2 more$"):
        calibration_clips(gone, SMALL.decode)


@pytest.mark.parametrize(("key", "value"), [("fps", 25), ("size", 225)])
def test_odd_numbers_of_frames_and_pixels_are_refused(key: str, value: int) -> None:
    """S3D takes them in pairs; every even number will do."""
    with pytest.raises(ValueError, match=f"must be even.* give {value - 1} or {value + 1}"):
        DecodeConfig.model_validate({key: value})
    for even in (2, 6, 34):
        cfg = DecodeConfig(fps=even, size=30 + even)
        assert S3D()(torch.rand(1, 3, cfg.fps, cfg.size, cfg.size)).shape == (1, 512)
