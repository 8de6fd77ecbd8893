"""feature_store.weights: the public file's form, errors that name what is wrong, and calibrated random weights."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from feature_store.config import DecodeConfig, ExtractConfig
from feature_store.encode import calibration_clips
from feature_store.encoder import prepare_encoder, require_same_encoder
from feature_store.s3d import S3D
from feature_store.weights import load_s3d, random_s3d
from tests.feature_store.store_tools import features_of
from vlm_dist.errors import ExtractionError, StoreError

SMALL = ExtractConfig(decode=DecodeConfig(fps=16, size=64))


@pytest.fixture(scope="module")
def public_form() -> dict[str, Tensor]:
    """A state dict as in the public file: S3D's tensors and a text module (its word table made small)."""
    torch.manual_seed(3)
    text = {
        "text_module.word_embd.weight": torch.rand(50, 300),
        "text_module.fc1.weight": torch.rand(2048, 300),
        "text_module.fc1.bias": torch.rand(2048),
        "text_module.fc2.weight": torch.rand(512, 2048),
        "text_module.fc2.bias": torch.rand(512),
    }
    return {**S3D().state_dict(), **text}


def test_loads_the_public_form(tmp_path: Path, public_form: dict[str, Tensor]) -> None:
    assert len(public_form) == 537
    path = tmp_path / "s3d_howto100m.pth"
    torch.save(public_form, path)
    model, sha256 = load_s3d(path)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not model.training
    assert all(torch.equal(value, public_form[key]) for key, value in model.state_dict().items())


def test_names_wrong_keys_and_shapes(tmp_path: Path, public_form: dict[str, Tensor]) -> None:
    path = tmp_path / "wrong.pth"
    state = {**public_form, "fc.weight": torch.zeros(10, 1024), "head.bias": torch.zeros(3)}
    del state["conv1.conv1.weight"]
    torch.save(state, path)
    with pytest.raises(ExtractionError) as caught:
        load_s3d(path)
    text = str(caught.value)
    assert "conv1.conv1.weight is missing" in text
    assert "head.bias is not part of S3D" in text
    assert "fc.weight has shape (10, 1024) and needs (512, 1024)" in text
    assert "more" not in text.split(". ")[0]


def test_damaged_values_are_named(tmp_path: Path, public_form: dict[str, Tensor]) -> None:
    for value in (float("nan"), float("inf")):
        torch.save({**public_form, "fc.bias": torch.full((512,), value)}, tmp_path / "a.pth")
        with pytest.raises(ExtractionError, match=r"damaged weights: fc\.bias"):
            load_s3d(tmp_path / "a.pth")


def test_names_only_some_of_many_differences(tmp_path: Path, public_form: dict[str, Tensor]) -> None:
    path = tmp_path / "prefixed.pth"
    torch.save({f"module.{key}": value for key, value in public_form.items()}, path)
    with pytest.raises(ExtractionError, match=r"; and \d+ more") as caught:
        load_s3d(path)
    assert str(caught.value).count("is missing") == 5


@pytest.mark.parametrize("content", [b"", b"this is no checkpoint", b"PK\x03\x04 half a zip"])
def test_files_that_are_no_weights(tmp_path: Path, content: bytes) -> None:
    for name in ("a.pth", "a.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ExtractionError, match="not a file of PyTorch weights"):
            load_s3d(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({"fc.weight": Path("x")}, tmp_path / "a.pth")
    with pytest.raises(ExtractionError, match="not a file of PyTorch weights"):
        load_s3d(tmp_path / "a.pth")


def test_a_list_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "a.pth")
    with pytest.raises(ExtractionError, match="holds a list"):
        load_s3d(tmp_path / "a.pth")


def test_absent_file_tells_where_weights_come_from(tmp_path: Path) -> None:
    with pytest.raises(ExtractionError, match="S3D_HowTo100M") as caught:
        load_s3d(tmp_path / "none.pth")
    assert "--random-weights" in str(caught.value)


def test_a_store_knows_its_weights_under_any_name(tmp_path: Path, public_form: dict[str, Tensor]) -> None:
    torch.save(public_form, tmp_path / "a.pth")
    shutil.copy(tmp_path / "a.pth", tmp_path / "renamed.pth")
    store = tmp_path / "store"
    made = prepare_encoder(store, [], SMALL, weights=tmp_path / "a.pth").provenance
    require_same_encoder(store, SMALL, random_seed=None, weights=tmp_path / "renamed.pth")
    assert prepare_encoder(store, [], SMALL, weights=tmp_path / "renamed.pth").provenance == made
    with pytest.raises(ExtractionError, match=r"typo\.pth: no such weights file"):
        require_same_encoder(store, SMALL, random_seed=None, weights=tmp_path / "typo.pth")
    torch.save({**public_form, "fc.bias": torch.zeros(512)}, tmp_path / "a.pth")
    with pytest.raises(StoreError, match="weights"):
        require_same_encoder(store, SMALL, random_seed=None, weights=tmp_path / "a.pth")


def unit_rows(features: np.ndarray) -> np.ndarray:
    rows = features.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_random_weights_tell_clips_apart(tmp_path: Path, make_video: Callable[..., Path]) -> None:
    clips = calibration_clips(
        [make_video(tmp_path / f"{seed}.mp4", 9.0, seed=seed) for seed in range(16)], SMALL.decode
    )
    assert clips.shape == (48, 16, 64, 64, 3)
    model = random_s3d(0, clips)
    paths = [make_video(tmp_path / f"{seed}.mp4", 1.0, seed=seed) for seed in range(20, 36)]
    rows = unit_rows(np.concatenate([features_of(path, model, SMALL).features for path in paths]))
    cosines = (rows @ rows.T)[~np.eye(16, dtype=bool)]
    assert abs(cosines.mean()) < 0.15
    assert cosines.max() < 0.98

    plain = S3D()
    alike = unit_rows(np.concatenate([features_of(path, plain, SMALL).features for path in paths]))
    assert (alike @ alike.T).min() > 0.999  # what calibration is for


def test_random_weights_are_deterministic_and_differ_by_seed() -> None:
    clips = np.random.default_rng(0).integers(0, 256, (9, 16, 32, 32, 3), np.uint8)
    state = torch.get_rng_state()
    first, again, other = (random_s3d(seed, clips).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv1.conv1.weight"], other["conv1.conv1.weight"])


def test_one_clip_is_enough_to_calibrate(tmp_path: Path, make_video: Callable[..., Path]) -> None:
    path = make_video(tmp_path / "a.mp4", 1.0)
    model = random_s3d(0, calibration_clips([path], SMALL.decode))
    features = features_of(path, model, SMALL).features
    assert features.shape == (1, 512)
    assert np.linalg.norm(features.astype(np.float64)) == pytest.approx(1.0, abs=2e-3)
