"""feature_store.decode: which frames come out, how they are cut, and the reason for every broken file."""

import itertools
import math
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from feature_store.config import DecodeConfig
from feature_store.decode import DecodeError, SecondsReader

SMALL = DecodeConfig(fps=16, size=64)
MakeVideo = Callable[..., Path]


def read(path: Path, cfg: DecodeConfig = SMALL) -> np.ndarray:
    """All frames of a video: uint8 (n, size, size, 3)."""
    return np.concatenate(list(SecondsReader(path, cfg)))


def grey_steps(width: int, height: int) -> Callable[[int], np.ndarray]:
    """Frame k is one grey, 10 + 8 k, so that a decoded frame tells its number."""
    return lambda number: np.full((height, width, 3), 10 + 8 * number, np.uint8)


def frame_numbers(frames: np.ndarray) -> list[int]:
    return [round((float(frame.mean()) - 10) / 8) for frame in frames]


def test_whole_seconds(tmp_path: Path, make_video: MakeVideo) -> None:
    reader = SecondsReader(make_video(tmp_path / "a.mp4", 3.0), SMALL)
    seconds = list(reader)
    assert [second.shape for second in seconds] == [(16, 64, 64, 3)] * 3
    assert all(second.dtype == np.uint8 for second in seconds)
    assert reader.decoded_s == 3.0
    assert reader.claimed_s == pytest.approx(3.0)


def test_partial_last_second_is_kept_and_black_after_its_end(tmp_path: Path, make_video: MakeVideo) -> None:
    reader = SecondsReader(make_video(tmp_path / "a.mp4", 2.25), SMALL)
    *_, last = reader
    assert reader.decoded_s == pytest.approx(2.25)
    assert last[:4].any(axis=(1, 2, 3)).all()
    assert not last[4:].any()


def test_exact_multiple_has_no_extra_second(tmp_path: Path, make_video: MakeVideo) -> None:
    assert len(list(SecondsReader(make_video(tmp_path / "a.mp4", 2.0), SMALL))) == 2


@pytest.mark.parametrize(("source", "target"), [(10, 30), (30, 10), (25, 30), (24, 16)])
def test_frame_rate_picks_the_nearest_frames(tmp_path: Path, make_video: MakeVideo, source: int, target: int) -> None:
    path = make_video(tmp_path / "a.mp4", 20 / source, fps=source, pictures=grey_steps(64, 64))
    frames = read(path, DecodeConfig(fps=target, size=64))
    count = round(20 / source * target)
    # Frame k of the source is shown from the output slot nearest to its time on, until the next one's.
    shown_from = [math.floor(k * target / source + 0.5) for k in range(20)]
    expected = [max(k for k in range(20) if shown_from[k] <= slot) for slot in range(count)]
    assert frame_numbers(frames[:count]) == expected
    assert not frames[count:].any()


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (128, 72), (176, 144), (98, 74), (30, 30)])
def test_scale_and_centre_crop(tmp_path: Path, make_video: MakeVideo, width: int, height: int) -> None:
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([(x + 0.5) * 255 / width, (y + 0.5) * 255 / height, np.full(x.shape, 128)], axis=-1).astype(
        np.uint8
    )
    path = make_video(tmp_path / "a.mp4", 1.0, width=width, height=height, pictures=lambda number: ramp)
    frame = read(path)[0].astype(float)
    scale = 64 / min(width, height)
    wide, high = int(width * scale), int(height * scale)
    left, top = int((wide - 64) / 2), int((high - 64) / 2)
    red = (left + np.arange(64) + 0.5) / wide * 255
    green = (top + np.arange(64) + 0.5) / high * 255
    assert np.abs(frame[32, 2:-2, 0] - red[2:-2]).max() < 8
    assert np.abs(frame[2:-2, 32, 1] - green[2:-2]).max() < 8


def rotate_flag(path: Path, degrees: int) -> None:
    """Write a rotation (clockwise, in quarter turns) into an MP4's track header."""
    matrix = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_honoured_and_can_be_ignored(tmp_path: Path, make_video: MakeVideo, degrees: int) -> None:
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:20, 20:70] = (255, 0, 0)  # a red bar on the upper edge, off the centre
    path = make_video(tmp_path / "a.mp4", 1.0, width=96, pictures=lambda number: picture)
    stored = read(path)[0].astype(int)
    rotate_flag(path, degrees)
    ignored = read(path, SMALL.model_copy(update={"rotate": False}))[0].astype(int)
    assert np.abs(ignored - stored).max() <= 2
    turned = read(path)[0].astype(int)
    expected = np.rot90(stored, -degrees // 90)
    assert np.abs(turned - expected).mean() < 4
    assert np.abs(turned - stored).mean() > 20


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".avi"])
def test_other_containers(tmp_path: Path, make_video: MakeVideo, suffix: str) -> None:
    codec = {".mkv": "libx264", ".webm": "libvpx", ".avi": "mpeg4"}[suffix]
    reader = SecondsReader(make_video(tmp_path / f"a{suffix}", 2.0, codec=codec), SMALL)
    assert len(list(reader)) == 2
    assert reader.claimed_s == pytest.approx(2.0, abs=0.1)


def test_reordered_frames_of_an_avi_come_in_order(tmp_path: Path, make_video: MakeVideo) -> None:
    """AVI has no times of presentation; FFmpeg's guess of them swaps the frames between key frames."""
    path = make_video(tmp_path / "a.avi", 25 / 16, codec="libx264", pictures=grey_steps(64, 64))
    assert frame_numbers(read(path)[:25]) == list(range(25))


def test_broken_files_have_their_reason(broken_videos: dict[str, Path]) -> None:
    for reason, path in broken_videos.items():
        with pytest.raises(DecodeError, match=path.name) as caught:
            read(path)
        assert caught.value.reason == reason


def test_truncated_counts_what_decodes(broken_videos: dict[str, Path]) -> None:
    path = broken_videos["truncated"]
    with pytest.raises(DecodeError) as caught:
        read(path)
    assert caught.value.claimed_s == pytest.approx(6.0, abs=0.1)
    assert 2.0 < caught.value.decoded_s < 5.0
    frames = read(path, SMALL.model_copy(update={"min_coverage": 0.3}))
    assert len(frames) >= caught.value.decoded_s * 16


def test_every_truncation_ends_in_frames_or_a_reason(tmp_path: Path, make_video: MakeVideo) -> None:
    data = make_video(tmp_path / "a.mp4", 4.0).read_bytes()
    cut = tmp_path / "cut.mp4"
    outcomes = []
    for size in np.linspace(0, len(data), 12, dtype=int):
        cut.write_bytes(data[:size])
        try:
            outcomes.append(len(read(cut)))
        except DecodeError as error:
            outcomes.append(error.reason)
    assert outcomes[0] == "empty_file"
    assert outcomes[-1] == 64
    assert {"truncated", "corrupt", "not_a_video", "empty_file", 64} >= set(outcomes)
    assert "truncated" in outcomes


def test_mp4_without_its_index_is_truncated(tmp_path: Path, make_video: MakeVideo) -> None:
    path = make_video(tmp_path / "a.mp4", 2.0, container_options={"movflags": "0"})
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(DecodeError, match="index") as caught:
        read(path)
    assert caught.value.reason == "truncated"


def test_zero_seconds(tmp_path: Path, make_video: MakeVideo) -> None:
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        container.add_stream("mpeg4", rate=16).width = 64
        container.streams.video[0].height = 64
        container.start_encoding()
    with pytest.raises(DecodeError) as caught:
        read(path)
    assert caught.value.reason == "zero_seconds"


def test_folder_and_extreme_shape(tmp_path: Path, make_video: MakeVideo) -> None:
    with pytest.raises(DecodeError) as caught:
        read(tmp_path)
    assert caught.value.reason == "not_a_video"
    with pytest.raises(DecodeError, match="4000x16") as caught:
        read(make_video(tmp_path / "thin.mp4", 0.25, width=4000, height=16))
    assert caught.value.reason == "corrupt"


def test_timeout_counts_the_decoder_and_not_what_is_done_with_its_frames(tmp_path: Path, make_video: MakeVideo) -> None:
    path = make_video(tmp_path / "a.mp4", 3.0)
    slowly = [time.sleep(0.2) for _ in SecondsReader(path, SMALL.model_copy(update={"timeout_s": 0.5}))]
    assert len(slowly) == 3
    with pytest.raises(DecodeError, match="gave up") as caught:
        list(SecondsReader(path, SMALL.model_copy(update={"timeout_s": 1e-6})))
    assert caught.value.reason == "timeout"


@pytest.mark.parametrize(("frame_s", "late"), [(0.2, False), (0.3, True)])
def test_a_long_video_may_take_four_seconds_for_each_of_its_own(
    tmp_path: Path, make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch, frame_s: float, late: bool
) -> None:
    """At 16 frames a second: 3.2 and 4.8 s of work for a second of video."""
    path, clock = make_video(tmp_path / "a.mp4", 8.0), itertools.count()
    monkeypatch.setattr("feature_store.decode.time", SimpleNamespace(monotonic=lambda: frame_s * next(clock)))
    seconds = iter(SecondsReader(path, SMALL.model_copy(update={"timeout_s": 1.0})))
    if late:
        with pytest.raises(DecodeError, match=r"s of decoding for \d\.\d s of video \(extract\.decode\.timeout_s\)"):
            list(seconds)
    else:
        assert len(list(seconds)) == 8


def test_a_name_with_a_colon_is_no_address(
    tmp_path: Path, make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_video(tmp_path / "12:30.mp4", 1.0)
    monkeypatch.chdir(tmp_path)
    for name in ("12:30.mp4", "./12:30.mp4"):
        assert len(list(SecondsReader(name, SMALL))) == 1


def test_one_frame_is_one_second(tmp_path: Path, make_video: MakeVideo) -> None:
    assert len(list(SecondsReader(make_video(tmp_path / "a.mp4", 1 / 16), SMALL))) == 1


def test_odd_names(tmp_path: Path, make_video: MakeVideo) -> None:
    for name in ("with space.mp4", "neue\nzeile.mp4", "søster 妹.mp4", "http:colon.mp4", "%03d.mp4"):
        source = make_video(tmp_path / "plain.mp4", 1.0)
        assert len(list(SecondsReader(source.rename(tmp_path / name), SMALL))) == 1, name


def test_real_clips(shared: Path) -> None:
    expected = {"bikes.mp4": 10, "bunny.mp4": 6, "eye_makeup.avi": 7, "person_drinking.avi": 4, "carphone.mp4": 4}
    for name, seconds in expected.items():
        assert len(list(SecondsReader(shared / "data" / "videos" / name, SMALL))) == seconds, name


@pytest.mark.parametrize("fps", [25, 30])
def test_same_frames_as_ffmpeg(tmp_path: Path, make_video: MakeVideo, fps: int) -> None:
    path = make_video(tmp_path / "a.mp4", 3.0, fps=fps, width=176, height=144)
    assert psnr(path, 64, 176, 144) > 60


def test_same_frames_as_ffmpeg_of_joined_files(tmp_path: Path, make_video: MakeVideo) -> None:
    parts = [make_video(tmp_path / f"{n}.ts", 3.0, seed=n).read_bytes() for n in range(2)]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(parts))
    assert psnr(path, 64, 64, 64) > 60


def test_same_frames_as_ffmpeg_on_real_clips(shared: Path) -> None:
    for name, width, height in (("bikes.mp4", 640, 272), ("person_drinking.avi", 1920, 1080)):
        assert psnr(shared / "data" / "videos" / name, 224, width, height) > 60, name


def psnr(path: Path, size: int, width: int, height: int) -> float:
    """How close the worst frame is to that of the reference's ffmpeg command, in decibels (40 cannot be seen)."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    wide = int(width * size / height)
    filters = f"fps=30,scale={wide}:{size}:flags=bicubic,crop={size}:{size}:{(wide - size) // 2}:0"
    command = [ffmpeg, "-v", "error", "-i", str(path), "-vf", filters, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, check=True, capture_output=True).stdout
    theirs = np.frombuffer(raw, np.uint8).reshape(-1, size, size, 3).astype(np.float32)
    ours = read(path, DecodeConfig(fps=30, size=size))
    assert len(ours) == -(-len(theirs) // 30) * 30
    error = np.mean((ours[: len(theirs)].astype(np.float32) - theirs) ** 2, axis=(1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(error, 1e-9))).min())
