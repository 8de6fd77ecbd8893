"""What the user typed → arrays to import, by video id (before planning).

Only ids are read here; `ArraySources.load` then reads one array at a time, whatever the size of the corpus. A pickle
alone is one object: it is in memory whole while its arrays are imported, one pickle at a time.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from feature_store.config import ADDRESS
from feature_store.export import MARKER
from feature_store.file_names import id_of_path
from feature_store.import_containers import SHARD_DATA, Container, NpzFile, PickleFile, ShardFile, ShardIds
from feature_store.import_rows import RowRules
from feature_store.npy import read_header, read_rows
from feature_store.pickles import SUFFIXES
from feature_store.plan import PlannedVideo, unfit_id
from feature_store.records import Provenance
from vlm_dist.errors import ConfigError, ExtractionError, StoreError

FORMS = "folders with ID.npy, ID.npz or SPLIT_0_data.npy shards, such files, or pickles {id: array}"


class ArraySources:
    """The arrays of files and folders, in the order given; a folder's in the order of their names.

    Attributes:
        videos: id and file of every array. The ids within one file are known to `load`.
        refused: why an array is none of `videos`, a line for each: its id can't be one of a store's.
        exported: the provenance, where all of it was written by `store export` from stores of one provenance.
    """

    def __init__(self, paths: Sequence[Path], *, allow_pickle: bool = False, ids_file: Path | None = None) -> None:
        """List what there is.

        Args:
            paths: folders (with their sub-folders; hidden files and pickles in them are passed over) and files.
            allow_pickle: open pickles, restricted to data.
            ids_file: ids of the reference's shards, one a line, in the order of the shards.

        Raises:
            ConfigError: no such file, nothing in it, or a pickle that is not allowed.
            StoreError: a pickle or a shard whose videos cannot be told.
        """
        self._allow_pickle = allow_pickle
        self._shard_ids = ShardIds(ids_file, allow_pickle)
        self._shards: dict[str, tuple[list[str], np.ndarray]] = {}
        self._open: tuple[str, Container] | None = None
        self._provenances: list[Provenance | None] = []
        self.videos: list[PlannedVideo] = []
        for path in paths:
            found = len(self.videos)
            if ADDRESS.fullmatch(str(path)):
                raise ConfigError(f"{path}: arrays are imported from folders and files; copy the bucket's here first")
            if path.is_dir():
                self._provenances.append(_exported_provenance(path))
                export = path if self._provenances[-1] else None
                self.videos.extend(self._in_folder(path.absolute(), export.absolute() if export else None))
            elif path.exists():
                self._provenances.append(None)
                self.videos.extend(self._in_file(path.absolute()))
            else:
                raise ConfigError(f"{path}: no such file or folder; give {FORMS}")
            if len(self.videos) == found:
                raise ConfigError(f"{path} holds no features that can be imported; give {FORMS}")
        unfit = [(video, wrong) for video in self.videos if (wrong := unfit_id(video.video_id))]
        self.refused = [
            f"{_shown(video.path)}: the id {_shown(video.video_id)[:40]} {wrong}; it is not imported"
            for video, wrong in unfit
        ]
        left_out = {id(video) for video, _ in unfit}
        self.videos = [video for video in self.videos if id(video) not in left_out]
        if unfit and not self.videos:
            raise StoreError(f"no array has an id that a store can take. {self.refused[0]}")
        first = self._provenances[0] if self._provenances else None
        self.exported = first if all(each == first for each in self._provenances) else None

    def load(self, video: PlannedVideo, rules: RowRules) -> np.ndarray:
        """The array of one video.

        Returns:
            (n, width) float16, float32 or float64, as it is in the file.

        Raises:
            ExtractionError: why there is none, with the file in the message and a reason of `records.Reason`.
        """
        path = Path(video.path)
        if path.suffix.lower() == ".npy" and video.path not in self._shards:
            header = read_header(path)
            try:
                rules.check_form(header.shape, header.dtype.str)
            except ExtractionError as error:
                raise ExtractionError(f"{path}: {error}", error.reason) from None
            return read_rows(path, header)
        return self._container(path).load(video.video_id, rules)

    def _container(self, path: Path) -> Container:
        """The open file; the one before is closed, so that two pickles are never in memory together."""
        if self._open is None or self._open[0] != str(path):
            self._open = None
            self._open = str(path), self._opened(path)
        return self._open[1]

    def _opened(self, path: Path) -> Container:
        if str(path) in self._shards:
            return ShardFile(path, *self._shards[str(path)])
        return NpzFile(path) if path.suffix.lower() == ".npz" else PickleFile(path, self._allow_pickle)

    def _in_folder(self, folder: Path, export: Path | None) -> Iterator[PlannedVideo]:
        entries = sorted((entry for entry in os.scandir(folder) if entry.name[0] != "."), key=lambda entry: entry.name)
        names = {entry.name for entry in entries}
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir():
                yield from self._in_folder(path, export)
            elif path.suffix.lower() == ".npy":
                if export:
                    yield PlannedVideo(id_of_path(path.relative_to(export).parts, ".npy"), entry.path)
                elif not _belongs_to_shard(entry.name, names):
                    yield PlannedVideo(path.stem, entry.path)
                elif SHARD_DATA.fullmatch(entry.name):
                    yield from self._in_shard(path)
            elif path.suffix.lower() == ".npz":
                yield from self._in_file(path)

    def _in_file(self, path: Path) -> Iterator[PlannedVideo]:
        suffix = path.suffix.lower()
        if suffix == ".npy":
            beside = {name for name in (path.name, _partner(path.name)) if (path.parent / name).is_file()}
            if _belongs_to_shard(path.name, beside):
                yield from self._in_shard(path)
            else:
                yield PlannedVideo(path.stem, str(path))
        elif suffix == ".npz":
            try:
                ids = NpzFile(path).ids
            except ExtractionError:
                ids = [path.stem]  # a broken file becomes a record, when it is loaded
            yield from (PlannedVideo(video_id, str(path)) for video_id in ids)
        elif suffix in SUFFIXES:
            yield from (PlannedVideo(video_id, str(path)) for video_id in self._container(path).ids)
        else:
            raise ConfigError(f"{path}: the ending {suffix!r} is not known; give {FORMS}")

    def _in_shard(self, path: Path) -> Iterator[PlannedVideo]:
        if not SHARD_DATA.fullmatch(path.name):
            raise ConfigError(f"{path} is a part of a shard; give its SPLIT_N_data.npy, or the folder")
        ids, starts = self._shard_ids.read(path)
        self._shards[str(path)] = ids, starts
        yield from (PlannedVideo(video_id, str(path)) for video_id in ids)


def _shown(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _partner(name: str) -> str:
    """The other file of a pair data, starts; the name itself where it is not of a pair."""
    for ending, other in (("_data.npy", "_starts.npy"), ("_starts.npy", "_data.npy")):
        if name.endswith(ending):
            return name.removesuffix(ending) + other
    return name


def _belongs_to_shard(name: str, beside: set[str]) -> bool:
    """Whether a file is one of a pair; the reference keeps caption times and ids in such pairs too."""
    partner = _partner(name)
    return partner != name and partner in beside


def _exported_provenance(folder: Path) -> Provenance | None:
    """What `store export` says in a folder that it wrote; None for any other folder."""
    marker = folder / MARKER
    try:
        return Provenance.model_validate(json.loads(marker.read_bytes())["provenance"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise StoreError(f"{marker} is damaged ({type(error).__name__}): export the store again") from None
