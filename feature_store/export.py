"""Store → one .npy per video, as other tools read features (index, features → files).

A file appears under its name whole, so that the same command goes on where it was killed. What is written says where it
came from: `store import` of such a folder gives the same ids, bits and provenance.
"""

import json
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from feature_store.file_names import id_of_path, path_of_id
from feature_store.files import crc32c, disk_guard
from feature_store.index import StoreIndex
from feature_store.npy import read_header, read_rows, write_rows
from feature_store.reader import FeatureReader
from feature_store.storage import Root
from vlm_dist.errors import ExtractionError, StoreError

MARKER = "export.json"


class ExportSummary(NamedTuple):
    """What one call did."""

    written: int
    """Files that were written."""
    kept: int
    """Files that were there whole."""
    bytes: int
    """Of what was written."""


def open_export(folder: Path, index: StoreIndex) -> None:
    """Makes the folder of an export, or goes on with it, and says in it what made the features.

    Raises:
        StoreError: the folder holds other files, or the export of features of another origin.
    """
    said = {"vlm_dist_export": 1, "provenance": index.meta.provenance.model_dump(mode="json")}
    marker = folder / MARKER
    if marker.exists():
        try:
            same = json.loads(marker.read_bytes()) == said
        except ValueError:
            same = False
        if not same:
            raise StoreError(f"{folder} holds an export of other features ({MARKER} in it differs): give a new folder")
        return
    if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise StoreError(f"{folder} holds other files and is no export: give a new or an empty folder")
    with published(marker) as temporary:
        temporary.write_text(json.dumps(said, indent=1))


@contextmanager
def published(path: Path, size: int = 1 << 16) -> Generator[Path]:
    """A hidden name to write `size` bytes to, which becomes `path` at once when the block is through.

    After a kill it is there still, and the next export of this path writes over it.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with disk_guard(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)


def export_npy(root: Root, folder: Path, on_progress: Callable[[int], None] = lambda done: None) -> ExportSummary:
    """Writes the features of every video, (n, F) float16, bit for bit, to a file named by `path_of_id`.

    Files that are there are read and kept where their checksum is the video's.

    Args:
        root: the store.
        folder: new, empty, or of an earlier export of this store.
        on_progress: called with the number of videos that are through.

    Raises:
        StoreError: no store, damaged features (they are named), another folder's content, a full disk.
    """
    reader = FeatureReader(root, check="always")
    index = reader.index
    open_export(folder, index)
    _refuse_others(folder, index)
    written = kept = size = 0
    # In the order of the shards, so that a disk reads forward.
    for video in np.lexsort((index.row, index.shard)).tolist():
        path = folder / path_of_id(index.video_id(video), ".npy")
        if _is_whole(path, (int(index.n_rows[video]), index.meta.feature_dim), int(index.crc32c[video])):
            kept += 1
        else:
            rows = reader.read(video)
            with published(path, rows.nbytes) as temporary, temporary.open("wb") as file:
                write_rows(file, rows)
            written, size = written + 1, size + rows.nbytes
        on_progress(written + kept)
    return ExportSummary(written, kept, size)


def _refuse_others(folder: Path, index: StoreIndex) -> None:
    """Files of videos that the snapshot does not have would be imported with the others."""
    names = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names if name.endswith(".npy"))
    others = [path for path in names if index.find(id_of_path(path.relative_to(folder).parts, ".npy")) < 0]
    if others:
        raise StoreError(
            f"{folder} holds features of {len(others)} videos that the store has not, or not any more "
            f"({min(others).name}): delete them, or give a new folder"
        )


def _is_whole(path: Path, shape: tuple[int, int], crc: int) -> bool:
    """Whether a file holds exactly these rows."""
    try:
        header = read_header(path)
        if header.shape != shape or header.dtype != np.dtype("<f2") or header.fortran:
            return False
        return crc32c(read_rows(path, header)) == crc
    except ExtractionError:
        return False
