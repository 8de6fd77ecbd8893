"""Does a snapshot have all its files (index → its problems): a look from the outside, at names and sizes only."""

from collections.abc import Mapping

from feature_store.arrays import column_bytes, column_key
from feature_store.index import array_groups, snapshot_details, snapshot_key
from feature_store.layout import StoreMeta
from feature_store.published import SNAPSHOT_JSON, Location


def wrong_file(meta: StoreMeta, name: str, sizes: Mapping[str, int]) -> str:
    """Which file of a snapshot is missing or has another size, and how; empty where all are as they were written.

    Args:
        meta: the store.
        name: of the snapshot.
        sizes: bytes of all that is in the store's index, by key.

    Raises:
        StoreError: the file that tells of the others is damaged.
    """
    for key, size in _told(meta, name).items():
        if (there := sizes.get(key)) != size:
            has = "is missing" if there is None else f"has {there:,} bytes, {size:,} belong there"
            return f"{meta.place(key)} {has}"
    return ""


def _told(meta: StoreMeta, name: str) -> dict[str, int]:
    """Bytes of a snapshot's files by key, as its LOCATION says, or else its snapshot.json."""
    folder = snapshot_key(name)
    if location := Location.of(meta.storage, folder):
        return {f"{location.folder}/{file}": size for file, (size, _) in location.files.items()}
    key = f"{folder}/{SNAPSHOT_JSON}"
    try:
        data = meta.storage.read(key)
    except FileNotFoundError:
        return {key: -1}  # which no listing has
    told = {key: len(data)}
    for group, arrays in array_groups(snapshot_details(data, meta.place(key))).items():
        for array, info in arrays.items():
            if size := column_bytes(info):
                told["/".join(filter(None, (folder, group, column_key(array))))] = size
    return told
