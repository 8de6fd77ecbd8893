"""Small real videos, whole and broken, for any test (a pytest plugin, see tests/conftest.py)."""

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.stream import VideoStream

Pictures = Callable[[int], np.ndarray]


def moving_square(seed: int, width: int, height: int) -> Pictures:
    """Frames by number: a square of a random colour that travels over a random background, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    ground, colour = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
    x, y, dx, dy = rng.integers(0, width), rng.integers(0, height), *rng.integers(-3, 4, 2)
    side = max(2, min(width, height) // 3)

    def picture(number: int) -> np.ndarray:
        image = np.empty((height, width, 3), np.uint8)
        image[:] = ground
        rows = (np.arange(side) + y + dy * number) % height
        columns = (np.arange(side) + x + dx * number) % width
        image[np.ix_(rows, columns)] = colour
        return image

    return picture


def write_video(
    path: Path,
    seconds: float = 2.0,
    *,
    fps: int = 16,
    width: int = 64,
    height: int = 64,
    seed: int = 0,
    pictures: Pictures | None = None,
    codec: str = "libx264",
    container_options: dict[str, str] | None = None,
) -> Path:
    """Render a video file; the index of an MP4 comes first, so that it can be cut off and still open."""
    pictures = pictures or moving_square(seed, width, height)
    options = container_options or ({"movflags": "faststart"} if path.suffix in (".mp4", ".mov") else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", container_options=options) as container:
        stream = container.add_stream(codec, rate=fps, options={"g": "8"} if codec == "libx264" else {})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(round(seconds * fps)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pictures(number), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_audio(path: Path, seconds: float = 2.0) -> Path:
    """An MP4 with a tone and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for start in range(0, round(seconds * 16000), 1024):
            tone = np.sin(np.arange(start, start + 1024, dtype=np.float32) * 0.17)[None]
            frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def make_video() -> Callable[..., Path]:
    """`write_video`, for tests."""
    return write_video


@pytest.fixture
def broken_videos(tmp_path: Path) -> dict[str, Path]:
    """One file for each way in which a video is broken, by the reason that extraction must record."""
    folder = tmp_path / "broken"
    folder.mkdir()
    whole = write_video(folder / "whole.mp4", 6.0, seed=1).read_bytes()
    files = {
        "missing": folder / "missing.mp4",
        "empty_file": folder / "empty.mp4",
        "not_a_video": folder / "text.mp4",
        "no_video_stream": write_audio(folder / "audio.mp4"),
        "truncated": folder / "truncated.mp4",
        "corrupt": folder / "corrupt.mp4",
    }
    files["empty_file"].touch()
    files["not_a_video"].write_text("this is a recipe, not a film\n" * 50)
    files["truncated"].write_bytes(whole[: len(whole) * 6 // 10])
    data = bytearray(whole)
    media = data.index(b"mdat") + 4
    data[media + 8 :] = bytes(len(data) - media - 8)  # a sound index that points at zeros
    files["corrupt"].write_bytes(data)
    (folder / "whole.mp4").unlink()
    return files
