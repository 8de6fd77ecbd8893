"""The straightforward way, as the paper's extraction script goes it: ffmpeg's pipe, all frames as floats, S3D eager."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from torch.nn import functional

from feature_store.s3d import S3D

FPS, SIZE, BATCH = 30, 224, 32


def features(path: Path, model: S3D) -> np.ndarray:
    """(seconds, 512) float16: decode the whole video, then encode 32 seconds at a time."""
    frames = _frames(path)
    frames = torch.cat([frames, frames.new_zeros(-len(frames) % FPS, SIZE, SIZE, 3)])
    clips = frames.view(-1, FPS, SIZE, SIZE, 3).permute(0, 4, 1, 2, 3)
    with torch.inference_mode():
        rows = [functional.normalize(model(clips[k : k + BATCH]), dim=-1) for k in range(0, len(clips), BATCH)]
    return torch.cat(rows).half().numpy()


def _frames(path: Path) -> torch.Tensor:
    """(frames, 224, 224, 3) float32 in [0, 1]."""
    scale = f"scale='if(gt(iw,ih),-2,{SIZE})':'if(gt(iw,ih),{SIZE},-2)'"
    filters = f"fps={FPS},{scale},crop={SIZE}:{SIZE}:(iw-{SIZE})/2:(ih-{SIZE})/2"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-threads", "1", "-i", str(path), "-vf", filters]
    raw = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], check=True, stdout=subprocess.PIPE)
    pixels = np.frombuffer(raw.stdout, np.uint8).reshape(-1, SIZE, SIZE, 3)
    return torch.from_numpy(pixels.astype(np.float32) / 255)
