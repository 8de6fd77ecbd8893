"""A damaged snapshot → what is sound of it, part by part (index → repair).

The checksums that its snapshot.json tells decide. Captions are judged video by video: each has a checksum over all of
its captions, so that neither the columns nor the pointers into them need be sound as a whole.
"""

import shutil
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from feature_store.arrays import ArrayInfo, check_column, column_bytes, column_key, open_column
from feature_store.caption_table import COLUMNS, SPOKEN, CaptionTable, VideoCaptions, pack_ids, unpack_ids
from feature_store.files import crc32c, read_file
from feature_store.index import array_groups, snapshot_details, snapshot_key
from feature_store.layout import StoreMeta
from feature_store.node_files import usable
from feature_store.node_scratch import temporary_folder
from feature_store.published import SNAPSHOT_JSON, Location
from feature_store.tokenizer import Tokenizer, load_tokenizer
from vlm_dist.errors import StoreError, StoreUnreachableError, VlmDistError

_IDS = ("video_id", "video_id_ptr")
_PIECE = 1 << 26
_NOT_A_TOKENIZER = (VlmDistError, KeyError, TypeError, ValueError, OSError)


class SnapshotParts:
    """One snapshot whose snapshot.json is sound; whatever else it has may be damaged, or not be there."""

    def __init__(self, name: str, folder: Path) -> None:
        path = folder / SNAPSHOT_JSON
        self.name = name
        self.folder = folder
        self.details = snapshot_details(read_file(path), path, name)
        self._groups = array_groups(self.details)

    @property
    def splits(self) -> list[str]:
        """Names of its splits, sound or not."""
        return sorted(self.details["splits"])

    @property
    def tokenizer_sha256(self) -> str:
        """Of the tokenizer that made its tokens; empty where it has no captions."""
        return self.details["captions"].get("tokenizer_sha256", "")

    def count(self, part: str) -> int:
        """How many ids a part has: "" are its videos, "pending", "deleted", "splits/NAME"."""
        arrays = self._groups.get(part)
        return arrays["video_id_ptr"]["length"] - 1 if arrays else 0

    def ids(self, part: str) -> list[bytes] | None:
        """The ids of a part; None where they are damaged, or there is no such part."""
        if part not in self._groups:
            return None
        if not (arrays := self._groups[part]):
            return []
        if not all(self._sound(part, name) for name in _IDS):
            return None
        raw, ptr = (open_column(self.folder / part, name, arrays[name]) for name in _IDS)
        return unpack_ids(raw, ptr)

    def has(self, part: str, ids: Sequence[bytes]) -> bool:
        """Whether the ids of a part, which are damaged, were these; their checksums tell."""
        if not (arrays := self._groups[part]) or self.count(part) != len(ids):
            return False
        return all(
            (len(column), crc32c(column)) == (arrays[name]["length"], arrays[name]["crc32c"])
            for name, column in zip(_IDS, pack_ids(ids), strict=True)
        )

    def captions(self, part: str, ids: Sequence[bytes]) -> Iterator[tuple[bytes, bool, VideoCaptions | None]]:
        """(id, whether its captions are sound, its captions if it has any) of the videos of a part.

        Captions that are not sound and there all the same have their times and texts, and need tokens.
        """
        told = self._sound(part, "caption_crc32c")
        whole = all(self._sound(part, name) for name in COLUMNS if name != "caption_crc32c")
        spoken = all(self._sound(part, name) for name in SPOKEN)
        if not (told or whole or spoken):
            yield from ((key, False, None) for key in ids)
            return
        table = CaptionTable(*(self._column(part, name) for name in COLUMNS))
        for row, key in enumerate(ids):
            if told and not table.caption_crc32c[row]:
                yield key, True, None
                continue
            captions = table.video(row) if told or whole else None
            sound = whole or (captions is not None and captions.crc32c() == table.caption_crc32c[row])
            if not sound:
                captions = table.spoken(row) if spoken else None
            yield key, sound, captions if captions is not None and len(captions.start_ms) else None

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that made its tokens; None where it is damaged."""
        folder = self.folder / "tokenizer"
        if not self.tokenizer_sha256 or not folder.is_dir():
            return None
        with temporary_folder() as scratch:  # where tokenizer.json is damaged, the vocabulary itself may be whole
            vocabulary = scratch / "tokenizer"
            shutil.copytree(folder, vocabulary, ignore=shutil.ignore_patterns("tokenizer.json"))
            for place in (folder, vocabulary):
                try:
                    found = load_tokenizer(str(place))
                except _NOT_A_TOKENIZER:
                    continue
                if found.sha256 == self.tokenizer_sha256:
                    return found
        return None

    def _sound(self, part: str, name: str) -> bool:
        return is_sound(self.folder / part, name, self._groups[part][name])

    def _column(self, part: str, name: str) -> np.ndarray:
        """A column, as far as it is there; the checksum of each video tells what of it can be used."""
        info: ArrayInfo = self._groups[part][name]
        try:
            return open_column(self.folder / part, name, info)
        except StoreUnreachableError:
            raise
        except StoreError:
            path, size = self.folder / part / column_key(name), column_bytes(info)
            data = path.read_bytes()[:size] if path.is_file() else b""
            return np.frombuffer(data.ljust(size, b"\0"), np.dtype(info["dtype"]).newbyteorder("<"))


def is_sound(folder: Path, name: str, info: ArrayInfo) -> bool:
    """Whether a column is there as its checksum says."""
    try:
        return check_column(folder, name, info)
    except StoreUnreachableError:
        raise
    except StoreError:  # another size
        return False


@contextmanager
def opened_parts(meta: StoreMeta, name: str) -> Generator[SnapshotParts | None]:
    """A snapshot of the store for the block, whatever its bytes are; None where its snapshot.json cannot be read."""
    with as_it_is(meta, snapshot_key(name)) as folder:
        try:
            parts = SnapshotParts(name, folder) if folder else None
        except (StoreError, FileNotFoundError):
            parts = None
        yield parts


@contextmanager
def as_it_is(meta: StoreMeta, key: str) -> Generator[Path | None]:
    """A published folder as a local one, also one that lost files or has wrong bytes, which `copied` refuses.

    None where its LOCATION is damaged.
    """
    storage = meta.storage
    try:
        location = Location.of(storage, key)
    except StoreUnreachableError:
        raise
    except StoreError:
        yield None
        return
    place = location.folder if location else key
    if (local := storage.local(place)) is not None:
        yield local
        return
    with temporary_folder() as folder:
        with usable(folder):
            for file, size in storage.sizes(place).items():
                path = folder / file.removeprefix(f"{place}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as copy:
                    copy.writelines(storage.read_ranges([(file, at, _PIECE) for at in range(0, size, _PIECE)]))
        yield folder
