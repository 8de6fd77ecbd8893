"""The same S3D made for inference: what extraction runs (between decode and store; the definition is s3d.py).

What is different, none of it by more than its precision's rounding:
- activations lie as (B, T, H, W, C), so that a 1×1×1 convolution is a matrix product, one in space a 2-D convolution of
  B·T pictures, one in time a 2-D convolution over (T, H·W): views of the same memory, for which the libraries have fast
  kernels (PyTorch's own for 3-D convolutions and 3-D max-pooling are slow ones on CPUs);
- BatchNorm is folded into the convolution before it, and gates write where the branches are joined;
- frames come as bytes: scaling, folding into depth and padding are one copy;
- on GPUs, cuDNN adds bias and ReLU within the convolution, and what lies between convolutions (pools, gates), most of
  the time there, can be compiled into few kernels.
"""

# pyright: reportUnknownMemberType=false
import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from feature_store.s3d import BLOCKS, FEATURE_DIM, S3D, ConvUnit, Inception, Layer, SelfGating, full_float32


class FusedS3D(nn.Module):
    """One-second clips → S3D features.

    Args:
        model: whose weights it takes (folded copies; later changes of `model` do not show).
        layer: "mixed_5c" stops at the mean of the last Inception block over time and space.
        dtype: of weights and activations; means, gates and the last layer are float32.
        compiled: let torch.compile fuse what it can, for any number of clips; the first ones then take half a minute.
    """

    def __init__(
        self,
        model: S3D,
        layer: Layer = "video_embedding",
        dtype: torch.dtype = torch.float32,
        *,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.layer: Layer = layer
        self.feature_dim = FEATURE_DIM[layer]
        self.dtype = dtype
        self.conv1 = _Conv(*_folded(model.conv1.conv1, model.conv1.bn1), dtype)
        self.conv_2b = _Point(model.conv_2b, dtype)
        self.conv_2c = _Separable(model.conv_2c, dtype)
        self.gating = _Gate(model.gating)
        self.blocks = nn.ModuleDict({name: _Block(_inception(model, name), dtype) for name in BLOCKS})
        self.fc = copy.deepcopy(model.fc)
        self.eval().requires_grad_(False)
        self.compiled = compiled
        self._run = torch.compile(self._layers, fullgraph=True) if compiled else self._layers

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.fc.weight.device

    @torch.inference_mode()
    @full_float32()
    def forward(self, clips: Tensor) -> Tensor:
        """Features, not normalised.

        Args:
            clips: uint8 (B, T, H, W, 3), on the device of the weights; T, H and W even.

        Returns:
            (B, 512) float32, or (B, 1024) for mixed_5c.
        """
        if self.compiled and len(clips) > 1:  # one is compiled apart
            torch._dynamo.mark_dynamic(clips, 0)  # pyright: ignore[reportPrivateUsage]  # documented by this name
        return self._run(clips)

    @torch.inference_mode()
    @full_float32()
    def eager(self, clips: Tensor) -> Tensor:
        """The same, and never compiled."""
        return self._layers(clips)

    def _layers(self, clips: Tensor) -> Tensor:
        x = self.conv1(_depth(clips, self.dtype).permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        x = self.conv_2c(self.conv_2b(_pool_space(x)))
        x = _pool_space(self.gating(x, x))
        for name, block in self.blocks.items():
            if name == "mixed_4b":
                x = _pool_time(_pool_space(x), 3)
            elif name == "mixed_5b":
                x = _pool_time(_pool_space(x, 2), 2)
            x = block(x)
        x = x.mean(dim=(1, 2, 3), dtype=torch.float32)
        return x if self.layer == "mixed_5c" else self.fc(x)


class _Conv(nn.Module):
    """Convolution and ReLU with folded weights, in channels-last memory."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype, padding: Sequence[int] | None = None) -> None:
        super().__init__()
        layout = torch.channels_last_3d if weight.ndim == 5 else torch.channels_last
        self.weight = nn.Parameter(weight.to(dtype).contiguous(memory_format=layout), requires_grad=False)
        self.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        self.padding = list(padding or [0] * (weight.ndim - 2))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and torch.version.hip is None:
            return _conv_relu(x, self.weight, self.bias, self.padding)
        return functional.relu_(_conv(x, self.weight, self.bias, self.padding))


class _Point(nn.Module):
    """1×1×1 convolution and ReLU: (..., C) → (..., C')."""

    def __init__(self, unit: ConvUnit, dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias = _folded(unit.conv1, unit.bn1)
        self.weight = nn.Parameter(weight.flatten(1).to(dtype), requires_grad=False)
        self.bias = nn.Parameter(bias.to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu_(functional.linear(x, self.weight, self.bias))


class _Separable(nn.Module):
    """1×3×3, then 3×1×1 convolution, each with ReLU."""

    def __init__(self, unit: ConvUnit, dtype: torch.dtype) -> None:
        super().__init__()
        space, time = _folded(unit.conv1, unit.bn1), _folded(unit.conv2, unit.bn2)
        self.space = _Conv(space[0][:, :, 0], space[1], dtype, padding=(1, 1))
        self.time = _Conv(time[0][..., 0], time[1], dtype, padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        b, t, h, w, c = x.shape
        x = self.space(x.reshape(b * t, h, w, c).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = self.time(x.reshape(b, t, h * w, -1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x.reshape(b, t, h, w, -1)


class _Gate(nn.Module):
    """Weighs channels by a sigmoid of a linear map of their means."""

    def __init__(self, gating: SelfGating) -> None:
        super().__init__()
        self.fc = copy.deepcopy(gating.fc)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        weights = torch.sigmoid(self.fc(x.mean(dim=(1, 2, 3), dtype=torch.float32))).to(x.dtype)
        return _write(torch.mul, x, weights[:, None, None, None], out)


class _Block(nn.Module):
    """An Inception block; see `Inception`."""

    def __init__(self, block: Inception, dtype: torch.dtype) -> None:
        super().__init__()
        self.b0, self.b3 = _Point(block.conv_b0, dtype), _Point(block.conv_b3_b, dtype)
        self.b1 = nn.Sequential(_Point(block.conv_b1_a, dtype), _Separable(block.conv_b1_b, dtype))
        self.b2 = nn.Sequential(_Point(block.conv_b2_a, dtype), _Separable(block.conv_b2_b, dtype))
        gates = (block.gating_b0, block.gating_b1, block.gating_b2, block.gating_b3)
        self.gates = nn.ModuleList(map(_Gate, gates))
        self.width = block.width

    def forward(self, x: Tensor) -> Tensor:
        joined = x.new_empty(*x.shape[:-1], self.width)
        done = 0
        for branch, gate in zip((self.b0, self.b1, self.b2, self.b3), self.gates, strict=True):
            part = branch(_pool_around(x) if branch is self.b3 else x)
            gate(part, joined[..., done : done + part.shape[-1]])
            done += part.shape[-1]
        return joined


def _conv(x: Tensor, weight: Tensor, bias: Tensor, padding: Sequence[int]) -> Tensor:
    convolution = functional.conv3d if weight.ndim == 5 else functional.conv2d
    return convolution(x, weight, bias, padding=padding)


@torch.library.custom_op("feature_store::conv_relu", mutates_args=())
def _conv_relu(x: Tensor, weight: Tensor, bias: Tensor, padding: Sequence[int]) -> Tensor:
    """cuDNN's convolution with bias and ReLU, in one pass over the output."""
    ones = [1] * len(padding)
    return torch.cudnn_convolution_relu(x, weight, bias, ones, padding, ones, 1)


@_conv_relu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, padding: Sequence[int]) -> Tensor:
    return _conv(x, weight, bias, padding)


def _write(operation: Callable[..., Tensor], a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write what an operation gives to a view."""
    if torch.compiler.is_compiling():  # which takes no such views, and sees for itself that no copy is needed
        return out.copy_(operation(a, b))
    return operation(a, b, out=out)


def _inception(model: S3D, name: str) -> Inception:
    block = model.get_submodule(name)
    assert isinstance(block, Inception)
    return block


def _folded(conv: nn.Conv3d, norm: nn.BatchNorm3d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with its BatchNorm (eval mode) in them; folded in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    parts = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, var, scale, shift = (part.detach().double() for part in parts)
    weight, bias = fuse_conv_bn_weights(conv.weight.detach().double(), None, mean, var, norm.eps, scale, shift)
    return weight.detach().float(), bias.detach().float()


def _depth(clips: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 (B, T, H, W, 3) → (B, T/2 + 1, H/2 + 3, W/2 + 3, 24) in [0, 1]: `space_to_depth`, padded for conv1.

    conv1 (2×4×4, padded by 1×2×2 on both sides) drops the first frame, row and column of what it gives; so they are
    not computed: zeros before are one fewer.
    """
    b, t, h, w, c = clips.shape
    x = torch.zeros(b, t // 2 + 1, h // 2 + 3, w // 2 + 3, 8 * c, dtype=dtype, device=clips.device)
    blocks = clips.view(b, t // 2, 2, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 5, 2, 4, 6, 7)
    inner = x[:, : t // 2, 1 : h // 2 + 1, 1 : w // 2 + 1]
    inner.view(blocks.shape).copy_(blocks).div_(255)
    return x


def _pool_space(x: Tensor, kernel: int = 3) -> Tensor:
    """Max over kernel×kernel, stride 2. Padding is zeros in the reference, which nothing after a ReLU is below."""
    b, t, h, w, c = x.shape
    pictures = x.reshape(b * t, h, w, c).permute(0, 3, 1, 2)
    if kernel == 3 and (h % 2 or w % 2):  # of an odd side the last window lies at its very end
        pictures = functional.pad(pictures, (0, w % 2, 0, h % 2))
    pooled = functional.max_pool2d(pictures, kernel, 2, ceil_mode=True).permute(0, 2, 3, 1)
    return pooled.reshape(b, t, *pooled.shape[1:])


def _pool_time(x: Tensor, kernel: int) -> Tensor:
    """Max over `kernel` frames, stride 2; windows that pass the end are cut."""
    out = x[:, ::2].clone()
    for k in range(1, kernel):
        part = x[:, k::2][:, : out.shape[1]]
        there = out[:, : part.shape[1]]
        _write(torch.maximum, there, part, there)
    return out


def _pool_around(x: Tensor) -> Tensor:
    """Max over the 3×3×3 around each place."""
    b, t, h, w, c = x.shape
    pooled = functional.max_pool2d(x.reshape(b * t, h, w, c).permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    pooled = pooled.reshape(b, t, h, w, c)
    out = pooled.clone()
    _write(torch.maximum, out[:, 1:], pooled[:, :-1], out[:, 1:])
    _write(torch.maximum, out[:, :-1], pooled[:, 1:], out[:, :-1])
    return out
