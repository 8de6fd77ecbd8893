"""snapshot.json and its second copy: which of the two tells of the snapshot that they lie in (index → repair).

What was deleted and split is told nowhere else. A seal proves that a file is whole, not that it lies where it belongs:
so the snapshot's own name decides, in a bucket the checksum in LOCATION, and else what is in the snapshot's arrays.
"""

from pathlib import Path
from typing import Any

from feature_store.files import crc32c
from feature_store.index import array_groups, snapshot_details, snapshot_key
from feature_store.layout import StoreMeta
from feature_store.published import SNAPSHOT_COPY, SNAPSHOT_JSON, Location
from feature_store.snapshot import snapshot_names
from feature_store.snapshot_parts import as_it_is, is_sound
from vlm_dist.errors import StoreError, StoreUnreachableError


def recover_snapshots(meta: StoreMeta) -> list[str]:
    """Makes a lost, damaged or foreign snapshot.json anew from its second copy, where that fits; what was done."""
    done: list[str] = []
    for name in snapshot_names(meta):
        try:
            location = Location.of(meta.storage, snapshot_key(name))
        except StoreUnreachableError:
            raise
        except StoreError:  # where its files are is lost
            continue
        folder = location.folder if location else snapshot_key(name)
        key = f"{folder}/{SNAPSHOT_JSON}"
        there, copied = (_own(meta, f"{folder}/{file}", name) for file in (SNAPSHOT_JSON, SNAPSHOT_COPY))
        if copied and copied != there and _fitting(meta, name, location, there, copied) == copied:
            meta.storage.replace(key, copied)
            done.append(f"made {key} anew from its second copy")
    return done


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
