"""Which videos of a store train, which are held out, and which never train (paper 5.1.1, 5.1.2)."""

import hashlib
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.config import SplitConfig
from vlm_dist.data.records import (
    DOCUMENT,
    IDS,
    TRAIN,
    form_of,
    iter_rows,
    read_database,
    read_text,
    refuse,
    split_of,
    text_of,
)
from vlm_dist.errors import ConfigError, TaskDataError


class VideoIndex(Protocol):
    """The part of `feature_store.index.StoreIndex` that splits need."""

    @property
    def num_videos(self) -> int: ...
    @property
    def status(self) -> NDArray[np.integer]: ...
    @property
    def n_rows(self) -> NDArray[np.integer]: ...
    @property
    def clip_ptr(self) -> NDArray[np.integer]: ...
    def id_list(self) -> list[bytes]: ...
    def find_many(self, video_ids: list[str], /) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class Split:
    """Rows of a store by use.

    train, validation    (n,) int64, ascending
    excluded             videos left out for each list, by its name; a video on two lists counts for both
    without_features     videos of the index without a row; those that never came so far are not in it
    without_captions     videos with features and no caption
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    excluded: dict[str, int]
    without_features: int
    without_captions: int


def split_videos(
    index: VideoIndex, cfg: SplitConfig, known: Mapping[str, Set[str]], only: Collection[str] | None = None
) -> Split:
    """Split the videos that have features and captions into training and validation, without the known ids.

    A video is held out when the hash of its id lies below a threshold that falls as the corpus grows past
    validation_videos / validation_share: what trained once is never held out later, and appending to a store moves
    nothing while the corpus is small.

    Args:
        index: of the store.
        cfg: size of the validation split. Its `exclude` files are read by the caller, with `read_id_list`.
        known: ids that never train, by the name of their list (evaluation splits of end tasks).
        only: ids that take part (the named split `cfg.only`, read by the caller); None takes all.

    Raises:
        ConfigError: nothing is left to train on; the message counts the reasons.
    """
    has_rows = (np.asarray(index.status) == 0) & (np.asarray(index.n_rows) > 0)
    has_captions = np.diff(np.asarray(index.clip_ptr).astype(np.int64)) > 0
    eligible = has_rows & has_captions
    if only is not None:
        chosen = index.find_many(list(only))
        eligible &= np.isin(np.arange(index.num_videos), chosen)
    excluded: dict[str, int] = {}
    for name, ids in known.items():
        rows = index.find_many(list(ids)) if ids else np.empty(0, np.int64)
        rows = rows[rows >= 0]
        excluded[name] = len(rows)
        eligible[rows] = False
    rows = np.flatnonzero(eligible)
    share = min(cfg.validation_share, cfg.validation_videos / max(len(rows), 1))
    names = index.id_list()
    place = np.fromiter((_place(names[row]) for row in rows), np.float64, len(rows))
    held_out = place < share
    if share > 0 and len(rows) > 1 and not held_out.any():
        held_out[place.argmin()] = True  # a very small corpus keeps one
    split = Split(
        train=rows[~held_out],
        validation=rows[held_out],
        excluded=excluded,
        without_features=int((~has_rows).sum()),
        without_captions=int((has_rows & ~has_captions).sum()),
    )
    if len(split.train) == 0:
        lists = "".join(f", {count} on the list {name}" for name, count in excluded.items())
        raise ConfigError(
            f"no video is left to train on: of {index.num_videos} in the store, {split.without_features} have no "
            f"features, {split.without_captions} no captions{lists}, {len(split.validation)} are held out. Extract or "
            "caption more videos, or exclude fewer"
        )
    return split


def read_id_list(path: Path, left_out: Collection[int] = (TRAIN,)) -> set[str]:
    """Read the video ids of one list or evaluation split (forms and endings: see `data.records`).

    Args:
        path: of the list. Rows of a table or of JSON lines may have a `split`, entries of a COIN file a `subset`.
        left_out: splits whose videos are not wanted; what belongs to no split is.

    Raises:
        TaskDataError: the file is absent, of another form, or holds no id.
    """
    form = form_of(path)
    if form == IDS:
        ids = {line.strip() for line in read_text(path, "one video id per line").splitlines() if line.strip()}
    elif form == DOCUMENT:
        schema = '{"database": {video_id: {"subset": "training" | "testing"}}}'
        ids = {v for v, entry in read_database(path, schema).items() if split_of(entry.get("subset")) not in left_out}
    else:
        ids = _ids_of_rows(path, left_out)
    if not ids:
        raise TaskDataError(f"{path} holds no video id that is asked for")
    return ids


def _ids_of_rows(path: Path, left_out: Collection[int]) -> set[str]:
    schema = "rows with a video_id, and perhaps a split"
    ids: set[str] = set()
    problems: list[str] = []
    for line, row in iter_rows(path, schema, ("video_id",)):
        try:
            if isinstance(row, str):
                raise ValueError(row)
            video = text_of(row, "video_id")
        except ValueError as error:
            problems.append(f"line {line}: {error}")
            continue
        if split_of(row.get("split")) not in left_out:
            ids.add(video)
    refuse(path, problems, schema)
    return ids


def _place(video_id: bytes) -> float:
    """A number in [0, 1) that only the id decides."""
    digest = hashlib.blake2b(video_id, digest_size=8, person=b"validation").digest()
    return int.from_bytes(digest, "little") / 2.0**64
