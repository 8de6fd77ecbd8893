"""feature_store.encode: one function from a file to tokens."""

import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
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


THREE_HOURS = """
import resource, sys, torch
from feature_store.config import DecodeConfig, ExtractConfig
from feature_store.encode import features_from_file

class Counter:
    device = torch.device("cpu")
    def __call__(self, clips):
        return clips.float().mean((1, 2, 3)) + 1

cfg = ExtractConfig(decode=DecodeConfig(fps=2, size=224))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
features_from_file(sys.argv[1], Counter(), cfg)
before = peak()
got = features_from_file(sys.argv[2], Counter(), cfg)
print(len(got.features), got.decoded_s, peak() - before)
"""


@pytest.mark.slow
def test_three_hours_of_1080p_take_the_memory_of_seconds(tmp_path: Path) -> None:
    """All frames would be 3.2 GB; what the allocator keeps of pictures that come and go is not."""
    for name, rounds in (("short", 1), ("long", 180)):
        write_rounds(tmp_path / f"{name}.mp4", rounds)
    command = [sys.executable, "-c", THREE_HOURS, str(tmp_path / "short.mp4"), str(tmp_path / "long.mp4")]
    rows, decoded_s, more = map(float, subprocess.run(command, check=True, capture_output=True).stdout.split())
    assert (rows, decoded_s) == (10_800, 10_800)
    assert more < 250, f"{more:.0f} MB more than a minute needs"


def write_rounds(path: Path, rounds: int) -> None:
    """A minute of 1080p, a picture every two seconds, encoded once and muxed so many times."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(1, 2), options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 1920, 1080, "yuv420p", Fraction(1, 2)
        packets = []
        for number in range(30):
            picture = np.kron(rng.integers(0, 256, (27, 48, 3)).astype(np.uint8), np.ones((40, 40, 1), np.uint8))
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = 4 * number, Fraction(1, 2)
            packets += stream.encode(frame)
        packets += stream.encode()
        for round_ in range(rounds):
            for number, packet in enumerate(packets):
                copy = av.Packet(bytes(packet))
                copy.stream, copy.time_base, copy.is_keyframe = stream, Fraction(1, 2), packet.is_keyframe
                copy.pts = copy.dts = 120 * round_ + 4 * number  # ultrafast makes no pictures that refer ahead
                container.mux(copy)
