"""Scenes → real video files (H.264 in MP4, the index first), written with PyAV."""

from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream

from vlm_dist.demo.scene import SIZE, Scene

FPS = 16


def write_video(path: Path, scene: Scene) -> None:
    """Encode a scene at 64 x 64 pixels and 16 frames a second."""
    with av.open(str(path), "w", container_options={"movflags": "faststart"}) as container:
        # Without mbtree=0, x264 gives other bytes from run to run.
        options = {"preset": "veryfast", "crf": "20", "g": "16", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.codec_context.thread_count = 1  # the same bytes on every machine
        for number in range(round(scene.duration * FPS)):
            frame = av.VideoFrame.from_ndarray(scene.picture(number / FPS), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_audio(path: Path, seconds: float) -> None:
    """Encode a hum without any picture."""
    rate = 16_000
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        for start in range(0, round(seconds * rate), 1024):
            wave = np.sin(np.arange(start, start + 1024, dtype=np.float32) * 0.05)[None]
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
