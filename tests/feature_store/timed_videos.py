"""Videos whose every picture has a time of its own, with sound beside them, in any container (for the tests)."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.video.stream import VideoStream

FPS = 16
CODECS = {".mp4": "libx264", ".mkv": "libx264", ".webm": "libvpx", ".avi": "mpeg4", ".flv": "libx264", ".ts": "libx264"}
SOUND = {".webm": "libopus", ".avi": "mp3"}


def write_frames(
    path: Path, times_s: Sequence[float], sound_s: float = 0.0, options: dict[str, str] | None = None
) -> Path:
    """A video with a noisy picture at each of the times, and `sound_s` seconds of noise beside it."""
    rng = np.random.default_rng(0)
    options = options or ({"movflags": "faststart"} if path.suffix == ".mp4" else {})
    with av.open(str(path), "w", container_options=options) as container:
        video = container.add_stream(CODECS[path.suffix], rate=FPS)
        assert isinstance(video, VideoStream)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        rate = Fraction(1, FPS if path.suffix in (".avi", ".ts") else 1000)
        video.time_base = video.codec_context.time_base = rate
        sound = container.add_stream(SOUND.get(path.suffix, "aac"), rate=48000, layout="mono") if sound_s else None
        heard = 0.0
        for time_s in times_s:
            picture = rng.integers(0, 256, (64, 64, 3), np.uint8)
            picture[16:] = int(20 + 5 * time_s) % 256  # so that a second tells its number
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time_s / rate), rate
            container.mux(video.encode(frame))
            heard = _play(container, sound, heard, min(time_s, sound_s))
        _play(container, sound, heard, sound_s)
        for stream in [video, *([sound] if sound else [])]:
            container.mux(stream.encode(None))
    return path


def _play(container: av.container.OutputContainer, sound: object, start_s: float, end_s: float) -> float:
    """Noise from one time to (nearly) the other."""
    while isinstance(sound, AudioStream) and start_s < end_s:
        noise = np.random.default_rng(1).uniform(-0.5, 0.5, (1, 960)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48000, round(start_s * 48000)
        container.mux(sound.encode(frame))
        start_s += 0.02
    return start_s


def steady(seconds: float, start_s: float = 0.0) -> list[float]:
    """Times of a steady video."""
    return [start_s + number / FPS for number in range(round(seconds * FPS))]
