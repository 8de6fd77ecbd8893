"""Time on a GPU, and what the card can do at most."""

import statistics
from collections.abc import Callable
from typing import Any

import torch


def seconds(call: Callable[[], Any], repeats: int = 12) -> float:
    """Median of the GPU's own time for a call, after three for warmth."""
    for _ in range(3):
        call()
    took: list[float] = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(took)


def product_flops(dtype: torch.dtype, side: int = 8192) -> float:
    """FLOP/s of a large matrix product of random numbers."""
    a, b = (torch.randn(side, side, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b)


def copy_bytes(count: int = 1 << 30) -> float:
    """Bytes/s, read and written, of a large copy within the card's memory."""
    a = torch.randn(count, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / seconds(lambda: b.copy_(a))
