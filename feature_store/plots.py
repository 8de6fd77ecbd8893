"""A picture of a store: how long its videos are, and how many captions they have (index → a PNG file)."""

# pyright: reportUnknownMemberType=false

from pathlib import Path

import numpy as np

from feature_store.index import StoreIndex
from feature_store.storage import Root


def plot_store(root: Root, file: Path) -> None:
    """Draws the distributions of durations and of captions per video into a PNG file."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a screen

    index = StoreIndex(root)
    row_s = index.meta.provenance.window / index.meta.provenance.fps
    captions = np.diff(index.clip_ptr)
    spoken = captions[captions > 0]
    hours = float(index.n_rows.sum(dtype=np.int64)) * row_s / 3600
    panels = (
        (index.n_rows * row_s / 60, "minutes of video", f"{index.num_videos:,} videos, {hours:,.1f} h"),
        (spoken, "captions of a video", f"{index.num_clips:,} captions of {len(spoken):,} videos"),
    )
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for place, (values, what, title) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, place)
        if len(values):
            axes.hist(values, bins=min(50, max(10, len(values) // 4)), color="#3b6ea8")
            axes.axvline(float(np.median(values)), color="#c4442e", label=f"median {np.median(values):,.3g}")
            axes.legend(frameon=False)
        axes.set(xlabel=what, ylabel="videos", title=title)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
