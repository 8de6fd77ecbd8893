"""A published folder of a store in its two forms, and as a local folder that somebody has open (storage → index).

A folder is plain, its files below its own key, or in it lies LOCATION alone, which names the key that they are below,
with their sizes and checksums. Folders of a disk are published plain (by a rename), those of a bucket by a LOCATION
(created exclusively); a copied store brings either form to either place.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from feature_store.files import seal, unseal_as
from vlm_dist.errors import StoreError

SNAPSHOT_JSON = "snapshot.json"  # the file that tells what the others of a snapshot are
SNAPSHOT_COPY = "snapshot-copy.json"  # the same again: what was deleted and split is told nowhere else
_LOCATION = "LOCATION"


class _Place(Protocol):
    """What is asked of a storage here."""

    @property
    def address(self) -> str: ...

    def read(self, key: str) -> bytes: ...


@dataclass(frozen=True)
class Location:
    """Where a published folder's files are: the key that they are below; (size, crc32c) of each by name."""

    folder: str
    files: dict[str, tuple[int, int]]

    @staticmethod
    def key(published: str) -> str:
        """The object that publishes a folder."""
        return f"{published}/{_LOCATION}"

    @classmethod
    def of(cls, place: _Place, published: str) -> Self | None:
        """Reads it; None where the folder is plain, or not there.

        Raises:
            StoreError: it is damaged, or another folder's.
        """
        key = cls.key(published)
        try:
            found = unseal_as("a snapshot's location", place.read(key), f"{place.address}/{key}", cls._parsed)
        except (FileNotFoundError, NotADirectoryError):
            return None
        # A folder that was put aside has something before its first name.
        if not published.endswith(found.folder.rpartition("/")[2].partition(".")[0]):
            raise StoreError(
                f"{place.address}/{key} is that of {found.folder}: a file was copied or renamed; "
                "run `vlm-dist store verify --repair` on the store"
            )
        return found

    @classmethod
    def _parsed(cls, body: dict[str, Any]) -> Self:
        return cls(body["folder"], {name: (size, crc) for name, (size, crc) in body["files"].items()})

    def sealed(self) -> bytes:
        """What is in the object."""
        return seal({"folder": self.folder, "files": self.files})


def in_order(names: Iterable[str]) -> list[str]:
    """Names in the order to move them in: what tells what the others are is there until all of them have gone."""
    return sorted(names, key=lambda name: (name.rpartition("/")[2] in (SNAPSHOT_JSON, _LOCATION), name))


class Tree:
    """A published folder as a local one, to map files of. This is the store's own; see `node_cache.KeptTree`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def current(self) -> bool:
        """Whether its folder is still the one that was opened; a copy that somebody dropped is not."""
        return True

    def drop(self) -> bool:
        """Gives up a copy whose bytes are bad, so that the next one is a new one; False: this is the store's own."""
        return False
