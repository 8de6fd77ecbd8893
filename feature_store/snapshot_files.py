"""Does a snapshot have all its files (index → its problems), and those that follow from others, as they must be?"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from feature_store.arrays import column_bytes, column_json, column_key
from feature_store.index import StoreIndex, array_groups, snapshot_details, snapshot_key
from feature_store.layout import GROUP_JSON, StoreMeta
from feature_store.published import SNAPSHOT_JSON, Location
from feature_store.tokenizer import load_tokenizer


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


def derived_files(index: StoreIndex) -> dict[str, bytes]:
    """What files of a snapshot must hold because others say so, by name: what other libraries read it by."""
    files = {"zarr.json": GROUP_JSON} | ({"pending/zarr.json": GROUP_JSON} if index.details["pending"] else {})
    for group, arrays in array_groups(index.details).items():
        for array, info in arrays.items():
            files["/".join(filter(None, (group, array, "zarr.json")))] = column_json(info)
    if index.tokenizer_dir:
        with TemporaryDirectory(prefix="vlm-dist-") as folder:
            load_tokenizer(str(index.tokenizer_dir)).save(Path(folder))
            files |= {f"tokenizer/{path.name}": path.read_bytes() for path in Path(folder).iterdir()}
    return files
