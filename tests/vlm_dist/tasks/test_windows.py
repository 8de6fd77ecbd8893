import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_dist.tasks.windows import MergedLogits, Windows


def naive_starts(seconds: int, width: int, step: int) -> list[int]:
    """Start 0, step, …; the first window that reaches the end is the last (reference facts 4.3)."""
    starts = [0]
    while starts[-1] + width < seconds:
        starts.append(starts[-1] + step)
    return starts


@given(seconds=st.lists(st.integers(1, 90), max_size=5), width=st.integers(1, 32), step=st.integers(1, 40))
@settings(max_examples=80, deadline=None)
def test_windows_are_the_reference_ones(seconds: list[int], width: int, step: int) -> None:
    step = min(step, width)
    windows = Windows.over(np.arange(len(seconds)) * 10, np.array(seconds, np.int64), width, step)
    expected = [(10 * v, start) for v, n in enumerate(seconds) for start in naive_starts(n, width, step)]
    assert list(zip(windows.video.tolist(), windows.start.tolist(), strict=True)) == expected


def test_merging_is_the_mean_over_windows() -> None:
    logits = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    merged = MergedLogits(11, 5, torch.device("cpu"))
    for window, start in zip(logits, (0, 3, 6), strict=True):
        merged.add(window, start)  # the last window has 5 seconds and 3 places of padding
    mean = merged.mean()
    for second in range(11):
        rows = [logits[w, second - start] for w, start in enumerate((0, 3, 6)) if start <= second < start + 8]
        torch.testing.assert_close(mean[second], torch.stack(rows).mean(dim=0))
