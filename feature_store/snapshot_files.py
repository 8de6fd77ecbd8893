"""Does a snapshot have all its files (index → its problems), and those that follow from others, as they must be?"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from feature_store.arrays import column_bytes, column_json, column_key
from feature_store.index import StoreIndex, array_groups, snapshot_details, snapshot_key
from feature_store.layout import GROUP_JSON, StoreMeta
from feature_store.published import SNAPSHOT_COPY, SNAPSHOT_JSON, Location
from feature_store.tokenizer import load_tokenizer


class ToldFiles(NamedTuple):
    """All files that a snapshot must have: bytes by key, None where nothing tells them."""

    own: dict[str, int | None]
    """What only the snapshot itself tells."""
    derived: dict[str, int | None]
    """What follows from that, if the store has it as it was written here: see `derived_files`."""
    copy_differs: bool = False
    """Whether the second copy of snapshot.json is there, and says something else."""


def wrong_file(meta: StoreMeta, told: Mapping[str, int | None], sizes: Mapping[str, int]) -> str:
    """Which file is missing or has another size, and how; empty where all are as they were written.

    Args:
        meta: the store.
        told: bytes of the files that must be there, by key.
        sizes: bytes of all that is there.
    """
    for key, size in told.items():
        there = sizes.get(key)
        if there is None:
            return f"{meta.place(key)} is missing"
        if size not in (None, there):
            return f"{meta.place(key)} has {there:,} bytes, {size:,} belong there"
    return ""


def told_files(meta: StoreMeta, name: str) -> ToldFiles:
    """The files of a snapshot, as its LOCATION says, or else its snapshot.json.

    Raises:
        StoreError: the file that tells of the others is damaged.
        FileNotFoundError: it is not there.
    """
    folder = snapshot_key(name)
    if location := Location.of(meta.storage, folder):
        return ToldFiles({f"{location.folder}/{file}": size for file, (size, _) in location.files.items()}, {})
    key = f"{folder}/{SNAPSHOT_JSON}"
    data = meta.storage.read(key)
    details = snapshot_details(data, meta.place(key), name)
    columns = {
        "/".join(filter(None, (folder, group, column_key(array)))): size
        for group, arrays in array_groups(details).items()
        for array, info in arrays.items()
        if (size := column_bytes(info))
    }
    derived = details["files"] | {name: len(content) for name, content in _metadata(details, data).items()}
    copied = data
    if SNAPSHOT_COPY in details["files"]:
        with suppress(FileNotFoundError):
            copied = meta.storage.read(f"{folder}/{SNAPSHOT_COPY}")
    others = {f"{folder}/{file}": size for file, size in derived.items()}
    return ToldFiles({key: len(data), **columns}, others, copied != data)


def _metadata(details: dict[str, Any], data: bytes) -> dict[str, bytes]:
    """What other libraries read a snapshot by, by name, and the copy of snapshot.json, which is `data`."""
    files = {"zarr.json": GROUP_JSON} | ({"pending/zarr.json": GROUP_JSON} if details["pending"] else {})
    if SNAPSHOT_COPY in details["files"]:
        files[SNAPSHOT_COPY] = data
    for group, arrays in array_groups(details).items():
        for array, info in arrays.items():
            files["/".join(filter(None, (group, array, "zarr.json")))] = column_json(info)
    return files


def derived_files(index: StoreIndex) -> dict[str, bytes]:
    """What files of a snapshot must hold because others say so, by name: what other libraries read it by."""
    files = _metadata(index.details, (index.folder / SNAPSHOT_JSON).read_bytes())
    if index.tokenizer_dir:
        with TemporaryDirectory(prefix="vlm-dist-") as folder:
            load_tokenizer(str(index.tokenizer_dir)).save(Path(folder))
            files |= {f"tokenizer/{path.name}": path.read_bytes() for path in Path(folder).iterdir()}
    return files
