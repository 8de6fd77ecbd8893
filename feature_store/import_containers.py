"""Files that hold the arrays of many videos → one array at a time, by video id (outside → import)."""

import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from feature_store.import_rows import RowRules
from feature_store.npy import parse_header, read_header, read_rows, require_file
from feature_store.pickles import PickledArray, as_text, load_pickle
from vlm_dist.errors import ConfigError, ExtractionError, StoreError

SHARD_DATA = re.compile(r"([^.]+)_(\d+)_data\.npy")
_ONE_ARRAY = {"arr_0", "features"}  # what numpy, and extractors that write an .npz for every video, call the only array


class Container(Protocol):
    """An open file of several arrays."""

    @property
    def ids(self) -> Sequence[str]:
        """Videos of the file, in its order."""
        ...

    def load(self, video_id: str, rules: RowRules) -> np.ndarray:
        """One array of an acceptable form; ExtractionError says why there is none."""
        ...


class NpzFile:
    """An .npz of arrays by id, or of one array, whose id is the file's name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        require_file(path)
        try:
            self._archive = np.load(path, allow_pickle=False)
            names = [name.removesuffix(".npy") for name in self._archive.zip.namelist()]
        except (ValueError, EOFError, AttributeError, OSError, zipfile.BadZipFile) as error:
            raise ExtractionError(f"{path} is not an .npz file ({error})", "corrupt") from None
        self._names = {path.stem: names[0]} if len(names) == 1 and names[0] in _ONE_ARRAY else {n: n for n in names}
        self.ids = list(self._names)

    def load(self, video_id: str, rules: RowRules) -> np.ndarray:
        """See `Container`."""
        name = self._names[video_id]
        try:
            with self._archive.zip.open(f"{name}.npy") as member:
                shape, _, dtype = parse_header(member, "it")
            rules.check_form(shape, dtype.str)
            return self._archive[name]
        except ExtractionError as error:
            raise ExtractionError(f"{self.path}, array {name}: {error}", error.reason) from None
        except (ValueError, EOFError, KeyError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ExtractionError(f"{self.path}, array {name} cannot be read ({error})", "corrupt") from None


class PickleFile:
    """A pickled {id: array}, as UniVL's feature files are; all of it is in memory."""

    def __init__(self, path: Path, allow_pickle: bool) -> None:
        self.path = path
        content = load_pickle(path, allow_pickle)
        if not isinstance(content, dict):
            raise StoreError(f"{path} holds a {type(content).__name__}; give a pickled {{id: array}}")
        self._arrays: dict[str, object] = {}
        for key, value in cast("dict[object, object]", content).items():
            video_id = str(key) if isinstance(key, int) else as_text(key)
            if video_id is None:
                raise StoreError(f"{path} has the key {key!r}; the keys must be video ids")
            if video_id in self._arrays:
                raise StoreError(f"{path} has several keys that are the video id {video_id!r}; rename all but one")
            self._arrays[video_id] = value
        self.ids = list(self._arrays)

    def load(self, video_id: str, rules: RowRules) -> np.ndarray:
        """See `Container`."""
        value = self._arrays[video_id]
        if not isinstance(value, PickledArray):
            raise ExtractionError(f"{self.path}: video {video_id} is a {type(value).__name__}, no array", "bad_dtype")
        try:
            rules.check_form(value.shape, value.kind)
        except ExtractionError as error:
            raise ExtractionError(f"{self.path}, video {video_id}: {error}", error.reason) from None
        return value.array()


class ShardFile:
    """A shard of the reference implementation: rows of all its videos, and where each begins (reference 3.1)."""

    def __init__(self, path: Path, ids: Sequence[str], starts: np.ndarray) -> None:
        self.path = path
        self.ids = ids
        self._place = {video_id: number for number, video_id in enumerate(ids)}
        self._starts = starts
        self._header = read_header(path)

    def load(self, video_id: str, rules: RowRules) -> np.ndarray:
        """See `Container`."""
        place = self._place[video_id]
        start, stop = int(self._starts[place]), int(self._starts[place + 1])
        where = f"{self.path}, rows {start} to {stop}"
        try:
            rules.check_form((stop - start, *self._header.shape[1:]), self._header.dtype.str)
            if self._header.fortran:
                raise ExtractionError("its columns lie one after another (Fortran order)", "bad_shape")
            if stop > self._header.shape[0]:
                raise ExtractionError(f"it has {self._header.shape[0]} rows", "truncated")
            return read_rows(self.path, self._header, start, stop)
        except ExtractionError as error:
            raise ExtractionError(f"{where}: {error}", error.reason) from None


class ShardIds:
    """Which videos the shards of a folder hold: from SPLIT_meta.pkl, or from a list of ids in the shards' order."""

    def __init__(self, ids_file: Path | None, allow_pickle: bool) -> None:
        self._ids_file = ids_file
        self._allow_pickle = allow_pickle
        self._meta: dict[Path, dict[object, object]] = {}

    def read(self, path: Path) -> tuple[list[str], np.ndarray]:
        """Ids (n) and starts (n + 1,) of the shard with the data file `path`.

        Raises:
            ConfigError: nothing says the ids, or it is a pickle that is not allowed.
            StoreError: ids and starts do not fit each other.
        """
        split, number = _parts(path)
        starts = _starts(path)
        meta_file = path.with_name(f"{split}_meta.pkl")
        if self._ids_file is not None:
            ids = self._from_list(self._ids_file, path, split, number)
        elif meta_file.is_file():
            if meta_file not in self._meta:
                content = load_pickle(meta_file, self._allow_pickle)
                self._meta[meta_file] = cast("dict[object, object]", content) if isinstance(content, dict) else {}
            listed = self._meta[meta_file].get(number)
            ids = [as_text(video_id) for video_id in cast("list[object]", listed)] if isinstance(listed, list) else []
        else:
            raise ConfigError(
                f"{path} is a shard, and nothing says which videos it holds: put {meta_file.name} beside it, or give "
                "--ids FILE, the list of videos that the shards were made from (an id per line)"
            )
        known = [video_id for video_id in ids if video_id is not None]
        if len(known) != len(starts) - 1:
            source = self._ids_file or meta_file
            raise StoreError(f"{path} holds {len(starts) - 1} videos and {source} names {len(known)} for it")
        return known, starts

    def _from_list(self, ids_file: Path, path: Path, split: str, number: int) -> list[str | None]:
        """The shard's part of the list. All shards of the split must be there, else no line could be placed."""
        if not ids_file.is_file():
            raise ConfigError(f"--ids {ids_file}: there is no such file")
        ids = ids_file.read_text("utf-8-sig").split()
        found = [other for other in path.parent.iterdir() if (m := SHARD_DATA.fullmatch(other.name)) and m[1] == split]
        counts = {_parts(other)[1]: len(_starts(other)) - 1 for other in found}
        if sorted(counts) != list(range(len(counts))) or sum(counts.values()) != len(ids):
            raise StoreError(
                f"{ids_file} has {len(ids)} ids, and the shards {split}_* in {path.parent} hold {sum(counts.values())} "
                f"videos (numbers {', '.join(map(str, sorted(counts)))}): they do not belong together"
            )
        first = sum(counts[other] for other in range(number))
        return list(ids[first : first + counts[number]])


def _parts(path: Path) -> tuple[str, int]:
    match = SHARD_DATA.fullmatch(path.name)
    assert match, f"{path} was listed as a shard"
    return match[1], int(match[2])


def _starts(path: Path) -> np.ndarray:
    """(n + 1,) int64 first rows of a shard's videos, and the end."""
    file = path.with_name(path.name.replace("_data.npy", "_starts.npy"))
    try:
        header = read_header(file)
        starts = np.empty(0) if header.dtype.kind != "i" or len(header.shape) != 1 else read_rows(file, header)
    except ExtractionError as error:
        raise StoreError(f"{error}; it says where the videos of {path.name} begin") from None
    if not len(starts) or starts[0] != 0 or (np.diff(starts) < 0).any():
        raise StoreError(f"{file} does not hold ascending row numbers from 0 on")
    return starts.astype(np.int64)
