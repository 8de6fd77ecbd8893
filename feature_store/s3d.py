"""Frames → features: what the frozen S3D network is that turns each second of video into one token (see s3d_fused.py).

S3D is an Inception network whose 3-D convolutions are split into space and time (Xie et al. 2018); this variant was
trained with MIL-NCE on HowTo100M (Miech et al. 2020). Module names are those of the public checkpoint, so its state
dict loads by name. Shape letters: B clips, C channels, T frames, H height, W width.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

# Inception blocks: name, (b0, (b1 in, out), (b2 in, out), b3); the input width is the sum of the block before.
BLOCKS: dict[str, tuple[int, tuple[int, int], tuple[int, int], int]] = {
    "mixed_3b": (64, (96, 128), (16, 32), 32),
    "mixed_3c": (128, (128, 192), (32, 96), 64),
    "mixed_4b": (192, (96, 208), (16, 48), 64),
    "mixed_4c": (160, (112, 224), (24, 64), 64),
    "mixed_4d": (128, (128, 256), (24, 64), 64),
    "mixed_4e": (112, (144, 288), (32, 64), 64),
    "mixed_4f": (256, (160, 320), (32, 128), 128),
    "mixed_5b": (256, (160, 320), (32, 128), 128),
    "mixed_5c": (384, (192, 384), (48, 128), 128),
}
Layer = Literal["video_embedding", "mixed_5c"]
FEATURE_DIM: dict[Layer, int] = {"video_embedding": 512, "mixed_5c": 1024}


@contextmanager
def full_float32() -> Generator[None]:
    """Whole float32 on GPUs too, and the former setting afterwards.

    By default cuDNN rounds what a float32 convolution multiplies to the 10 bits of TF32, an error of 5e-4 in each
    product; the features of a store must be the same to 5e-5, whichever machine they were made on.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        deterministic = torch.backends.cudnn.deterministic
        with torch.backends.cudnn.flags(enabled=True, deterministic=deterministic, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def space_to_depth(frames: Tensor) -> Tensor:
    """Fold 2×2×2 blocks into channels: (B, 3, T, H, W) → (B, 24, T/2, H/2, W/2), new channel ((dt·2+dh)·2+dw)·3+c."""
    b, c, t, h, w = frames.shape
    blocks = frames.reshape(b, c, t // 2, 2, h // 2, 2, w // 2, 2)
    return blocks.permute(0, 3, 5, 7, 1, 2, 4, 6).reshape(b, 8 * c, t // 2, h // 2, w // 2)


class ConvUnit(nn.Module):
    """Convolution, BatchNorm, ReLU; a separable 3×3×3 is one in space (conv1), then one in time (conv2)."""

    def __init__(
        self, width_in: int, width_out: int, kernel: tuple[int, int, int] = (1, 1, 1), separable: bool = False
    ):
        super().__init__()
        t, h, w = kernel
        first = (1, h, w) if separable else kernel
        self.conv1 = nn.Conv3d(width_in, width_out, first, padding=(first[0] // 2, h // 2, w // 2), bias=False)
        self.bn1 = nn.BatchNorm3d(width_out)
        self.separable = separable
        if separable:
            self.conv2 = nn.Conv3d(width_out, width_out, (t, 1, 1), padding=(t // 2, 0, 0), bias=False)
            self.bn2 = nn.BatchNorm3d(width_out)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(self.bn2(self.conv2(x)), inplace=True) if self.separable else x


class SelfGating(nn.Module):
    """Weigh each channel by a sigmoid of a linear map of all channels' means over time and space."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.sigmoid(self.fc(x.mean(dim=(2, 3, 4))))
        return x * weights[:, :, None, None, None]


class PaddedMaxPool(nn.Module):
    """Max-pool of stride `stride` with zeros added by a fixed amount (kernel − stride, half before), in ceil mode."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        extra = [max(k - s, 0) for k, s in zip(kernel, stride, strict=True)]
        self.pad = [side for e in reversed(extra) for side in (e // 2, e - e // 2)]

    def forward(self, x: Tensor) -> Tensor:
        # Every input here has passed a ReLU, so zero padding can never win over a real value.
        return functional.max_pool3d(functional.pad(x, self.pad), self.kernel, self.stride, ceil_mode=True)


class Inception(nn.Module):
    """Four branches, each gated by itself, joined along the channels."""

    def __init__(self, width_in: int, b0: int, b1: tuple[int, int], b2: tuple[int, int], b3: int) -> None:
        super().__init__()
        self.conv_b0 = ConvUnit(width_in, b0)
        self.conv_b1_a = ConvUnit(width_in, b1[0])
        self.conv_b1_b = ConvUnit(*b1, kernel=(3, 3, 3), separable=True)
        self.conv_b2_a = ConvUnit(width_in, b2[0])
        self.conv_b2_b = ConvUnit(*b2, kernel=(3, 3, 3), separable=True)
        self.maxpool_b3 = nn.MaxPool3d(3, stride=1, padding=1)
        self.conv_b3_b = ConvUnit(width_in, b3)
        self.gating_b0 = SelfGating(b0)
        self.gating_b1 = SelfGating(b1[1])
        self.gating_b2 = SelfGating(b2[1])
        self.gating_b3 = SelfGating(b3)
        self.width = b0 + b1[1] + b2[1] + b3

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self.gating_b0(self.conv_b0(x)),
            self.gating_b1(self.conv_b1_b(self.conv_b1_a(x))),
            self.gating_b2(self.conv_b2_b(self.conv_b2_a(x))),
            self.gating_b3(self.conv_b3_b(self.maxpool_b3(x))),
        )
        return torch.cat(branches, dim=1)


class S3D(nn.Module):
    """The video branch of S3D (9.67M parameters); frames are RGB in [0, 1] with no mean or deviation taken off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConvUnit(24, 64, kernel=(2, 4, 4))
        self.maxpool_2a = PaddedMaxPool((1, 3, 3), (1, 2, 2))
        self.conv_2b = ConvUnit(64, 64)
        self.conv_2c = ConvUnit(64, 192, kernel=(3, 3, 3), separable=True)
        self.gating = SelfGating(192)
        self.maxpool_3a = PaddedMaxPool((1, 3, 3), (1, 2, 2))
        self.maxpool_4a = PaddedMaxPool((3, 3, 3), (2, 2, 2))
        self.maxpool_5a = PaddedMaxPool((2, 2, 2), (2, 2, 2))
        width = 192
        for name, sizes in BLOCKS.items():
            block = Inception(width, *sizes)
            setattr(self, name, block)
            width = block.width
        self.fc = nn.Linear(FEATURE_DIM["mixed_5c"], FEATURE_DIM["video_embedding"])
        self.eval()

    @full_float32()
    def forward(self, frames: Tensor, layer: Layer = "video_embedding") -> Tensor:
        """Features of clips, not normalised.

        Args:
            frames: (B, 3, T, H, W) float in [0, 1]; T, H and W even.
            layer: "mixed_5c" stops at the mean of the last Inception block over time and space.

        Returns:
            (B, 512) video embedding, or (B, 1024) for mixed_5c.
        """
        # Even kernels that are padded on both sides give one place too many.
        x = self.conv1(space_to_depth(frames))[:, :, 1:, 1:, 1:]
        x = self.conv_2c(self.conv_2b(self.maxpool_2a(x)))
        x = self.maxpool_3a(self.gating(x))
        for name in BLOCKS:
            if name == "mixed_4b":
                x = self.maxpool_4a(x)
            elif name == "mixed_5b":
                x = self.maxpool_5a(x)
            x = self.get_submodule(name)(x)
        x = x.mean(dim=(2, 3, 4))
        return x if layer == "mixed_5c" else self.fc(x)
