"""Pictures of an evaluation that people look at (… predictions → pictures → a run's artifacts)."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vlm_dist.metrics.segmentation import BACKGROUND

Strip = tuple[str, np.ndarray, np.ndarray]  # video id, truth (n,), prediction (n,)
STRIPS = 8
CLASSES = 15
COLOURS = 20  # of the colour map; a video with more steps uses some twice
GREY = (0.92, 0.92, 0.92)


def draw_ranks(rank: np.ndarray, candidates: int, path: Path) -> Path:
    """Recall by k against chance (k on a logarithmic axis), and a histogram of the ranks.

    Args:
        rank: (Q,) rank of the right answer, 1 is best.
        candidates: How many were ranked.
        path: PNG file to write.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    k = np.unique(np.geomspace(1, candidates, 200).round())
    left.plot(k, np.searchsorted(np.sort(rank), k, side="right") / len(rank), label="model")
    left.plot(k, k / candidates, linestyle="--", color="grey", label="chance")
    left.set(xscale="log", xlabel="k", ylabel="recall at k", ylim=(0, 1.02), title=f"{len(rank)} texts")
    left.legend(frameon=False)
    edges = np.unique(np.geomspace(1, candidates + 1, 16).round())
    counts, _ = np.histogram(rank, edges)
    labels = [f"{lo:g}" if hi - lo == 1 else f"{lo:g}–{hi - 1:g}" for lo, hi in pairwise(edges)]
    right.bar(range(len(counts)), counts)
    right.set_xticks(range(len(counts)), labels, rotation=60, fontsize=7)
    right.set(xlabel="rank of the right clip", ylabel="texts", title=f"median rank {np.median(rank):g} of {candidates}")
    return _save(figure, path)


def draw_strips(videos: Sequence[Strip], names: dict[int, str], path: Path) -> Path:
    """Time lines of truth over prediction, evenly chosen from the given videos; background is grey.

    Args:
        videos: Sorted from worst to best.
        names: Class names for the legends.
        path: PNG file to write.
    """
    chosen = [videos[i] for i in np.unique(np.linspace(0, len(videos) - 1, STRIPS).round().astype(int))]
    figure = Figure(figsize=(10, 1.5 * len(chosen)), layout="constrained")
    for axis, (video, truth, predicted) in zip(
        figure.subplots(len(chosen), 1, squeeze=False)[:, 0], chosen, strict=True
    ):
        steps = [int(c) for c in np.unique(truth) if c != BACKGROUND]
        steps += [int(c) for c in np.unique(predicted) if c != BACKGROUND and c not in steps]
        colour = {c: colormaps["tab20"](i % COLOURS)[:3] for i, c in enumerate(steps)} | {BACKGROUND: GREY}
        strips = [[colour[int(c)] for c in row] for row in (truth, predicted)]
        axis.imshow(strips, aspect="auto", interpolation="nearest", extent=(0, len(truth), 1.5, -0.5))
        axis.axhline(0.5, color="white", linewidth=2)
        axis.set_yticks([0, 1], ["truth", "model"])
        axis.tick_params(labelsize=7)
        axis.set_title(f"{video}: {np.mean(truth == predicted):.0%} of {len(truth)} s", fontsize=8, loc="left")
        for c in [c for c in steps if c in truth][:4]:
            axis.plot([], [], color=colour[c], linewidth=4, label=names.get(c, str(c))[:36])
        if steps:
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1.05), fontsize=6, frameon=False)
    figure.supxlabel("seconds", fontsize=8)
    return _save(figure, path)


def draw_class_accuracies(accuracies: dict[int, float], names: dict[int, str], path: Path) -> Path:
    """Accuracy of each class, sorted, with the worst and the best by name.

    Args:
        accuracies: By class id.
        names: By class id.
        path: PNG file to write.
    """
    order = sorted(accuracies, key=lambda c: (accuracies[c], c))
    shown = order if len(order) <= 2 * CLASSES else order[:CLASSES] + order[-CLASSES:]
    figure = Figure(figsize=(7, 1.2 + 0.18 * len(shown)), layout="constrained")
    axis = figure.subplots()
    axis.barh(range(len(shown)), [accuracies[c] for c in shown])
    axis.set_yticks(range(len(shown)), [names.get(c, str(c))[:48] for c in shown], fontsize=7)
    title = (
        f"all {len(order)} classes" if len(shown) == len(order) else f"worst and best {CLASSES} of {len(order)} classes"
    )
    axis.set(xlim=(0, 1), xlabel="accuracy over the class's seconds", title=title)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))
    return path
