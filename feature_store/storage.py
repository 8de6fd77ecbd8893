"""Where a feature store lies, as a space of whole objects: a local folder or `s3://bucket/prefix` (under the store).

The store's protocol needs seven things of its place: read, list, create exclusively, replace at once, move, publish a
folder for one caller only, and a local folder to build in. Everything above speaks in keys ("_commits/000003.json") and
knows no file system and no bucket.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from feature_store.config import ADDRESS
from feature_store.local_storage import LocalStorage
from feature_store.node_scratch import temporary_folder
from feature_store.published import Tree
from vlm_dist.errors import ConfigError

Root = str | Path


class Storage(Protocol):
    """A store's place. Objects appear whole or not at all; every method may be called by many processes at once."""

    @property
    def address(self) -> str:
        """The place as people write it, for messages; `open_storage` of it gives the same place again."""
        ...

    def read(self, key: str) -> bytes:
        """A whole object; FileNotFoundError where there is none."""
        ...

    def read_many(self, keys: Sequence[str]) -> Iterator[bytes]:
        """Several objects in their order, a bounded number of them ahead."""
        ...

    def size(self, key: str) -> int | None:
        """Bytes of an object; None where there is none."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every object below a folder, by key, in one listing."""
        ...

    def changed(self, key: str) -> float:
        """When an object, or anything below a folder, last changed: seconds since 1970; now where nothing is there."""
        ...

    def names(self, folder: str) -> list[str]:
        """Names of what is right below a folder, objects and folders, sorted; empty where there is none."""
        ...

    def create(self, key: str, data: bytes, guard: str = "") -> bool:
        """Puts an object where none is; True for the one caller that did it.

        Raises:
            FileNotFoundError: the object `guard` (where given) is not there any more.
        """
        ...

    def replace(self, key: str, data: bytes) -> None:
        """Puts an object, also over an older one."""
        ...

    def swap(self, key: str, before: bytes | None, data: bytes) -> bool:
        """Puts an object if what is there is still `before` (None: nothing); False where it is not."""
        ...

    def move(self, key: str, target: str) -> bool:
        """Moves an object or a published folder, over an older object; False where it is not there (any more)."""
        ...

    def sync(self, folder: str) -> None:
        """Makes sure that the names in a folder are durable, also those that others have made."""
        ...

    def remove(self, key: str) -> None:
        """Removes an object, or all below a folder; what is not there is fine."""
        ...

    def prepare(self, folders: Sequence[str]) -> None:
        """Makes folders, where the place has such a thing."""
        ...

    def scratch(self, name: str) -> Path:
        """A fresh local folder to build in; the caller removes it."""
        ...

    def upload(self, path: Path, key: str) -> None:
        """Makes a file that was built in a scratch folder an object, durably; it is gone from there afterwards."""
        ...

    def publish(self, folder: Path, key: str) -> bool:
        """Makes a durable scratch folder a folder of the store, whole, if there is none; True for the one who did."""
        ...

    def tree(self, key: str) -> Tree:
        """A published folder as a local one to map files of, as long as it is held; FileNotFoundError where none is.

        It may be a copy that this node keeps, whose bytes may have gone bad since it came: see `Tree.drop`.
        """
        ...

    def copied(self, key: str) -> AbstractContextManager[Path]:
        """A published folder as the store has it now, for a block: the folder itself, or a copy that goes away."""
        ...

    def local(self, key: str) -> Path | None:
        """The object's own file, where objects are files; else None."""
        ...

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Iterator[bytes]:
        """(key, start, length) of several pieces → their bytes (fewer at an object's end), asked for at once."""
        ...

    def read_end(self, key: str, length: int) -> tuple[bytes, int, str]:
        """The last bytes of an object, its size, and a tag that another content would not have."""
        ...


def open_storage(root: Root) -> Storage:
    """The place of an address: a folder (which need not exist), or s3://bucket/prefix.

    Raises:
        ConfigError: another scheme, or an s3 address without a bucket.
    """
    text = str(root)
    if text.startswith("s3:/"):  # one slash is what a Path leaves of two
        from feature_store.s3_storage import S3Storage  # its client takes a while to import

        return S3Storage(text)
    if ADDRESS.match(text):
        raise ConfigError(f"{text}: a store lies in a folder or at s3://bucket/prefix")
    return LocalStorage(Path(root))


@contextmanager
def fetched(storage: Storage, key: str) -> Generator[Path]:
    """An object as a file for the block: its own where objects are files, else a copy that goes away."""
    path = storage.local(key)
    if path is not None:
        yield path
        return
    with temporary_folder() as folder:
        copy = folder / key.rpartition("/")[2]
        copy.write_bytes(storage.read(key))
        yield copy
