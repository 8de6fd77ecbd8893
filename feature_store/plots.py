"""Pictures of a store: durations, captions, and how much of each video decoded (index, commit records → pictures)."""

# pyright: reportUnknownMemberType=false

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from feature_store.commit import iter_commits
from feature_store.index import StoreIndex
from feature_store.layout import open_store
from feature_store.storage import Root
from vlm_dist.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINS = np.linspace(0, 1.25, 51)  # of decoded over claimed seconds


def plot_store(root: Root, file: Path) -> None:
    """Draws the distributions of durations and of captions per video into a file.

    Raises:
        ConfigError: the file's ending is that of no picture, or it cannot be written.
        StoreError: no store, or no snapshot in it yet.
    """
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
            axes.margins(y=0.15)  # room for the legend above the bars
            axes.legend(frameon=False, loc="upper right")
        axes.set(xlabel=what, ylabel="videos", title=title)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, file)


def decoded_histogram(root: Root) -> tuple[np.ndarray, np.ndarray, int]:
    """How much of what its file claims was decoded of each video, from the commit records, one of them at a time.

    Returns:
        Videos with features, and without, by decoded / claimed seconds (50 bins of 0.025; the last takes all above);
        and how many claim nothing.
    """
    counts = np.zeros((2, len(_BINS) - 1), np.int64)
    failed: dict[str, float] = {}  # by id, the last try of those that have no features yet
    silent = 0
    for commit in iter_commits(open_store(root)):
        shares: list[float] = []
        for record in commit.videos:
            share = record.decoded_s / record.claimed_s if record.claimed_s > 0 else np.nan
            if record.status == "ok":
                failed.pop(record.video_id, None)
                shares.append(share)
            elif record.status == "failed":
                failed[record.video_id] = share
        counts[0] += _binned(shares)
        silent += int(np.isnan(shares).sum())
    counts[1] = _binned(list(failed.values()))
    return counts[0], counts[1], silent + int(np.isnan(list(failed.values())).sum())


def _binned(shares: list[float]) -> np.ndarray:
    told = np.asarray(shares, np.float64)
    return np.histogram(np.minimum(told[~np.isnan(told)], _BINS[-1]), _BINS)[0]


def plot_decoded(root: Root, file: Path) -> None:
    """Draws `decoded_histogram` into a file, on a logarithmic axis: what is broken is rare. Errors as `plot_store`."""
    from matplotlib.figure import Figure

    ok, failed, silent = decoded_histogram(root)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    middle, width = (_BINS[1:] + _BINS[:-1]) / 2, _BINS[1]
    axes.bar(middle, ok, width, color="#3b6ea8", label=f"with features: {ok.sum():,}")
    axes.bar(middle, failed, width, bottom=ok, color="#c4442e", label=f"without: {failed.sum():,}")
    title = f"{silent:,} more: no file, or none that claims a length" if silent else ""
    top = 3 * max(1, int((ok + failed).max()))
    axes.set(xlabel="decoded / claimed seconds", ylabel="videos", yscale="symlog", ylim=(0, top), title=title)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    for place in np.flatnonzero(ok + failed):
        axes.annotate(f"{ok[place] + failed[place]:,}", (middle[place], (ok + failed)[place]), ha="center", va="bottom")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, file)


def _save(figure: "Figure", file: Path) -> None:
    """Writes a picture in the form that its ending says."""
    form, forms = file.suffix[1:].lower(), figure.canvas.get_supported_filetypes()
    if form not in forms:
        raise ConfigError(f"picture {file}: the ending {file.suffix!r} is not known; name it .png, .pdf or .svg")
    try:
        figure.savefig(file, dpi=120, format=form)
    except OSError as error:
        raise ConfigError(
            f"picture {file} cannot be written: {error.strerror or error}. Make room there, or name another place"
        ) from error
