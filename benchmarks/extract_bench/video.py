"""Videos to measure with: rendered, as H.264 in MP4, so that the benchmark needs no corpus."""

from pathlib import Path

import av
import numpy as np

FPS, WIDTH, HEIGHT = 30, 320, 240


def render(path: Path, seconds: int, seed: int) -> Path:
    """A textured ground that drifts, with a square that moves over it; about as many bits as a web video has."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = rng.integers(0, 256, (HEIGHT // 8 + 8, WIDTH // 8 + 8, 3)).astype(np.uint8)
    ground = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(seconds * FPS):
            shift = number // 3 % 56
            image = np.ascontiguousarray(ground[shift : shift + HEIGHT, shift : shift + WIDTH])
            left = 5 * number % (WIDTH - 60)
            image[90:150, left : left + 60] = rng.integers(0, 256, 3)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    return path
