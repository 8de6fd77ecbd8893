"""What tells where a snapshot's files are and what is in them: LOCATION, snapshot.json, its copy (index → repair).

What was deleted and split is told nowhere else. A seal proves that a file is whole, not that it lies where it belongs:
so the snapshot's own name decides, in a bucket the checksum in LOCATION, and else what is in the snapshot's arrays.
"""

from pathlib import Path
from typing import Any

from feature_store.arrays import column_bytes, column_key
from feature_store.files import crc32c
from feature_store.index import array_groups, snapshot_details, snapshot_key
from feature_store.layout import SNAPSHOTS, StoreMeta
from feature_store.published import SNAPSHOT_COPY, SNAPSHOT_JSON, Location
from feature_store.snapshot import snapshot_names, told_number
from feature_store.snapshot_parts import as_it_is, is_sound
from vlm_dist.errors import StoreError, StoreUnreachableError

_TOLD_IN = (SNAPSHOT_JSON, SNAPSHOT_COPY)


def recover_snapshots(meta: StoreMeta) -> list[str]:
    """Makes what is lost, damaged or another snapshot's anew, where the rest tells it; what was done.

    A LOCATION from the objects of the one folder that can be meant, a snapshot.json from its second copy.
    """
    done: list[str] = []
    there = snapshot_names(meta)
    told = f"{told_number(meta):06d}"  # by CURRENT
    for name in [*there, *([] if told in there else [told])]:
        try:
            location = Location.of(meta.storage, snapshot_key(name))
        except StoreUnreachableError:
            raise
        except StoreError:
            location = None
            lost = True
        else:
            lost = name not in there
        if lost:
            if not (location := _found_again(meta, name)):
                continue
            key = Location.key(snapshot_key(name))
            meta.storage.replace(key, location.sealed())
            done.append(f"made {key} anew from the objects that it names")
        folder = location.folder if location else snapshot_key(name)
        key = f"{folder}/{SNAPSHOT_JSON}"
        read, copied = (_own(meta, f"{folder}/{file}", name) for file in _TOLD_IN)
        if copied and copied != read and _fitting(meta, name, location, read, copied) == copied:
            meta.storage.replace(key, copied)
            done.append(f"made {key} anew from its second copy")
        if location and read and not copied and location.files.get(SNAPSHOT_COPY) == (len(read), crc32c(read)):
            meta.storage.replace(f"{folder}/{SNAPSHOT_COPY}", read)  # without all its objects a bucket's is not opened
            done.append(f"wrote {folder}/{SNAPSHOT_COPY} anew")
    return done


def _found_again(meta: StoreMeta, name: str) -> Location | None:
    """Where the objects of a snapshot are whose LOCATION is lost; None where none or several folders can be meant.

    The checksums of its columns are those that its snapshot.json tells: no damage is sealed.
    """
    storage = meta.storage
    folders = [f"{SNAPSHOTS}/{folder}" for folder in storage.names(SNAPSHOTS) if folder.startswith(f"{name}.")]
    told = {
        folder: data for folder in folders for file in _TOLD_IN[::-1] if (data := _own(meta, f"{folder}/{file}", name))
    }
    if len(told) != 1:
        return None
    ((folder, data),) = told.items()
    details = snapshot_details(data, folder, name)
    files = {
        "/".join(filter(None, (part, column_key(array)))): (size, info["crc32c"])
        for part, arrays in array_groups(details).items()
        for array, info in arrays.items()
        if (size := column_bytes(info))
    }
    files |= dict.fromkeys(_TOLD_IN if SNAPSHOT_COPY in details["files"] else _TOLD_IN[:1], (len(data), crc32c(data)))
    for key in storage.sizes(folder):
        if (file := key.removeprefix(f"{folder}/")) not in files:  # small: metadata, the tokenizer
            other = storage.read(key)
            files[file] = len(other), crc32c(other)
    return Location(folder, files)


def _own(meta: StoreMeta, key: str, name: str) -> bytes:
    """A snapshot.json, or its copy, as it is; empty where it is damaged, lost or that of another name."""
    try:
        data = meta.storage.read(key)
        snapshot_details(data, key, name)
    except StoreUnreachableError:
        raise
    except (StoreError, FileNotFoundError):
        return b""
    return data


def _fitting(meta: StoreMeta, name: str, location: Location | None, there: bytes, copied: bytes) -> bytes:
    """Which of the two belongs to a snapshot; empty where neither does."""
    found = [data for data in (there, copied) if data]
    if location and (told := location.files.get(SNAPSHOT_JSON)):
        found = [data for data in found if (len(data), crc32c(data)) == told]
    if len(found) < 2:
        return found[0] if found else b""
    with as_it_is(meta, snapshot_key(name)) as folder:
        assert folder, "its location was read"
        return max(found, key=lambda data: _agreement(folder, snapshot_details(data, name, name)))


def _agreement(folder: Path, details: dict[str, Any]) -> tuple[int, int]:
    """How many arrays are there as they are told; of two that are so, the one that tells of none besides is more."""
    sound = [
        is_sound(folder / part, array, info)
        for part, arrays in array_groups(details).items()
        for array, info in arrays.items()
    ]
    return sum(sound), sum(sound) - len(sound)
