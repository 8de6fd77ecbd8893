"""Annotated videos → videos of the store → splits, with every misfit named (annotations → items → batches)."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from feature_store.reader import FeatureReader
from feature_store.tokenizer import Tokenizer
from vlm_dist.data.batch import SpecialIds
from vlm_dist.data.records import HELD_OUT, SHOWN, TEST, TRAIN, refuse
from vlm_dist.errors import CheckpointError, TaskDataError
from vlm_dist.model.config import ModelConfig
from vlm_dist.train.config import FinetuneConfig

SLACK_S = 1.0  # annotations are cut on another clock than our 30 fps: this much beyond the last row is no error


class Misfits(NamedTuple):
    """What of the annotations does not fit the store, within the limit that the user set."""

    missing: Sequence[str] = ()
    """Videos without features."""
    outside: int = 0
    """Segments that start behind the end of their video: left out."""
    cut: int = 0
    """Segments that end behind it: used up to there."""
    first: str = ""
    """The first such segment."""
    test_items: int = 0
    """Test items that are measured."""
    test_items_missing: int = 0
    """Test items of the annotations that are not, for lack of features."""

    @property
    def lines(self) -> list[str]:
        """One sentence for every kind that occurs."""
        told: list[str] = []
        if self.missing:
            more = " …" if len(self.missing) > SHOWN else ""
            told.append(
                f"{len(self.missing)} annotated videos have no features in the store and are left out: "
                f"{', '.join(self.missing[:SHOWN])}{more}"
            )
        if self.outside or self.cut:
            told.append(
                f"{self.outside} segments lie behind the end of their video and are left out, {self.cut} end behind it "
                f"and are cut; the first: {self.first}"
            )
        if self.test_items_missing:
            told.append(f"the test is on {self.test_items} of {self.test_items + self.test_items_missing} test items")
        return told


def special_ids(reader: FeatureReader, tokenizer: Tokenizer, model: ModelConfig) -> SpecialIds:
    """Ids for the task's texts, after checking that features and vocabulary are the checkpoint's.

    Raises:
        TaskDataError: The store's features have another width than the checkpoint was trained on.
        CheckpointError: The tokenizer has more pieces than the checkpoint has rows in its word table.
    """
    width = reader.meta.feature_dim
    if model.feature_dim and width != model.feature_dim:
        raise TaskDataError(
            f"the store's features are {width} wide, the checkpoint reads {model.feature_dim}: "
            "extract the task's videos with the extractor of pre-training"
        )
    if model.vocab_size and tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} word pieces, the checkpoint only {model.vocab_size}: "
            "take the tokenizer that was saved with the checkpoint"
        )
    return SpecialIds.of(tokenizer)


def needed_splits(training: bool) -> dict[int, str]:
    """Splits that must fit the store, with their names: all of them to train, the test split alone to evaluate."""
    return {TRAIN: "training", HELD_OUT: "held-out", TEST: "test"} if training else {TEST: "test"}


def check_missing(
    file: Path, ids: Sequence[str], numbers: np.ndarray, split: np.ndarray, limit: float, training: bool
) -> list[str]:
    """Ids of the videos without features in the splits that are needed, sorted.

    Args:
        file: The annotations, for the message.
        ids: (N,) video of each item; repeats count as often as they occur.
        numbers: (N,) their store numbers, -1 without features.
        split: (N,) their splits, as the file names them.
        limit: Largest share of the items of *each* split that may lack features: 10 % of all may be the whole test.
        training: Whether the training and held-out splits are needed as well.

    Raises:
        TaskDataError: A split lacks more.
    """
    without: set[str] = set()
    for part, name in needed_splits(training).items():
        total = int((split == part).sum())
        lost = np.flatnonzero((split == part) & (numbers < 0)).tolist()
        missing = sorted({ids[i] for i in lost})
        if len(lost) > limit * total:
            shown = ", ".join(missing[:SHOWN]) + (" …" if len(missing) > SHOWN else "")
            raise TaskDataError(
                f"{file}: {len(lost)} of {total} {name} items ({len(lost) / total:.1%}) have no features in the store, "
                f"above the limit of {limit:.1%} (finetune.max_missing); {len(missing)} videos: {shown}\n"
                "extract them into the store, or raise the limit"
            )
        without.update(missing)
    return sorted(without)


def coverage_of_test(split: np.ndarray, kept: np.ndarray) -> dict[str, int]:
    """`test_items` and `test_items_missing` of `Misfits`: of items (N,) with these splits, those at `kept` are used."""
    used = int((split[kept] == TEST).sum())
    return {"test_items": used, "test_items_missing": int((split == TEST).sum()) - used}


def check_overlap(file: Path, ids: Sequence[str], split: np.ndarray) -> None:
    """Refuses a video that is in more than one of training, held-out and test.

    Raises:
        TaskDataError: Names the first such ids.
    """
    seen: dict[str, int] = {}
    shared = {video for video, part in zip(ids, split.tolist(), strict=True) if seen.setdefault(video, part) != part}
    if shared:
        shown = ", ".join(sorted(shared)[:SHOWN]) + (" …" if len(shared) > SHOWN else "")
        raise TaskDataError(
            f"{file}: {len(shared)} videos are in more than one split, so the test would not be honest: {shown}"
        )


def hold_out(ids: Sequence[str], split: np.ndarray, cfg: FinetuneConfig) -> np.ndarray:
    """The splits with a share of the training videos turned into held-out ones, whole videos at a time.

    Videos are taken in the order of a hash of their id, so the same ones are held out in every run and on every
    machine. Nothing is taken when the file names held-out videos itself, or selection does not need them.

    Returns:
        (N,) int8.
    """
    if cfg.select_on != "held-out" or not cfg.held_out or (split == HELD_OUT).any():
        return split
    videos = sorted(
        {ids[i] for i in np.flatnonzero(split == TRAIN).tolist()},
        key=lambda video: hashlib.blake2b(video.encode(), digest_size=8).digest(),
    )
    if len(videos) < 2:
        return split
    chosen = set(videos[: max(1, round(cfg.held_out * len(videos)))])
    held = np.fromiter((video in chosen for video in ids), bool, len(ids))
    return np.where(held & (split == TRAIN), HELD_OUT, split).astype(np.int8)


def check_bounds(
    file: Path,
    where: Sequence[str],
    start: np.ndarray,
    end: np.ndarray,
    rows: np.ndarray,
    split: np.ndarray,
    limit: float,
    training: bool,
) -> tuple[np.ndarray, Misfits]:
    """Which segments have rows; refused when more than `limit` of a needed split's leave their video.

    Args:
        file: The annotations, for the message.
        where: (N,) "line 3, video x" or "video x" of each segment.
        start: (N,) seconds.
        end: (N,) seconds.
        rows: (N,) seconds of features that the video has.
        split: (N,) split of the video, as the file names it.
        limit: Largest share of a split's segments that may lie behind their video or end well behind it.
        training: Whether the training and held-out splits are needed as well as the test split.

    Returns:
        (N,) bool, and the segments of the needed splits that have none or are cut short.
    """
    outside = start >= rows
    cut = ~outside & (end > rows + SLACK_S)
    needed = np.isin(split, list(needed_splits(training)))

    def told(places: np.ndarray) -> list[str]:
        return [
            f"{where[i]}: segment {start[i]:g} to {end[i]:g} s, but the video has {rows[i]} s of features"
            for i in np.flatnonzero(places).tolist()
        ]

    for part, name in needed_splits(training).items():
        total, wrong = int((split == part).sum()), told((outside | cut) & (split == part))
        if len(wrong) > limit * total:
            hint = (
                f"{len(wrong)} of {total} {name} segments leave their video, above the limit of {limit:.1%} "
                "(finetune.max_missing); are these the annotations of the store's videos?"
            )
            more = [f"… and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
            refuse(file, ["\n  ".join([*wrong[:SHOWN], *more, hint])])
    misfits = Misfits(
        outside=int((outside & needed).sum()),
        cut=int((cut & needed).sum()),
        first=next(iter(told((outside | cut) & needed)), ""),
    )
    return ~outside, misfits


def check_splits(file: Path, split: np.ndarray, cfg: FinetuneConfig, training: bool) -> None:
    """Refuses an empty test split, and empty training or held-out splits when they are needed.

    Raises:
        TaskDataError: Names the split that has nothing with features.
    """
    need = [(TEST, "test")]
    if training:
        need.append((TRAIN, "training"))
        if cfg.select_on == "held-out":
            need.append((HELD_OUT, "held-out"))
    for part, name in need:
        if not (split == part).any():
            hint = "; set finetune.held_out above 0, or finetune.select_on to last" if part == HELD_OUT else ""
            raise TaskDataError(f"{file}: no {name} items with features{hint}")
