"""What a node keeps of a store in a bucket: index snapshots to map, and shards up to a budget (storage → reader).

Shared by all processes of a node; a file appears by rename, and the least recently used shards go first. Deleting what
another process has open or mapped does not disturb it.
"""

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from vlm_dist.errors import StoreUnreachableError

VARIABLE = "FEATURE_STORE_CACHE"
_KEPT_TREES = 4  # newest snapshots of a store; running jobs may hold older ones open
_LOCKS = 64


def cache_folder() -> Path:
    """The node's cache: $FEATURE_STORE_CACHE, or vlm-dist in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(VARIABLE) or Path(base) / "vlm-dist")


def tree_folder(address: str, name: str) -> Path:
    """Where a published folder of a store lies on this node (whether it is there or not)."""
    return cache_folder() / "trees" / _digest(address) / name.replace("/", "-")


def keep_tree(final: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` fill an empty folder, which then appears as `final`; nothing to do where it is there."""
    if final.is_dir():
        return
    with _usable(final), _turn(final.name):
        if final.is_dir():  # another process was faster
            return
        staged = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
        try:
            staged.mkdir(parents=True)
            fill(staged)
            staged.rename(final)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    trees = [path for path in final.parent.iterdir() if path.name[0] != "."]
    for old in sorted(trees, key=lambda path: path.stat().st_mtime)[:-_KEPT_TREES]:
        shutil.rmtree(old, ignore_errors=True)


class ShardCache:
    """Whole shard files on the node's disk, at most `budget` bytes of them over all stores."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.folder = cache_folder() / "shards"

    def open(self, tag: str, fill: Callable[[Path], None]) -> int:
        """A descriptor of the file of that tag, filled at first use.

        Args:
            tag: names store, shard and content.
            fill: writes a verified file at a path.
        """
        path = self.folder / _digest(tag)
        while True:
            with suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                os.utime(descriptor)
                return descriptor
            self._fill(path, fill)

    def _fill(self, path: Path, fill: Callable[[Path], None]) -> None:
        with _usable(path), _turn(path.name):
            if path.exists():
                return
            temp = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                fill(temp)
                temp.replace(path)
            finally:
                temp.unlink(missing_ok=True)
        self._evict(path)

    def _evict(self, newest: Path) -> None:
        files: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.budget:
                return
            if path != newest and path.name[0] != ".":
                path.unlink(missing_ok=True)
                total -= size


@contextmanager
def _usable(path: Path) -> Generator[None]:
    """What goes wrong with the node's own disk is never taken for a damage of the store."""
    try:
        yield
    except FileNotFoundError as error:
        if error.filename is None or not str(error.filename).startswith(str(cache_folder())):
            raise  # an object of the store that is not there
        raise _unusable(path, error) from error
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> StoreUnreachableError:
    return StoreUnreachableError(
        f"this node's copy {path} of a store cannot be written: {error.strerror or error}. "
        f"Free some space there, or name another folder with {VARIABLE}"
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@contextmanager
def _turn(name: str) -> Generator[None]:
    """One process of the node at a time for (nearly) each name, so that nothing is fetched twice."""
    folder = cache_folder() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / str(int(_digest(name), 16) % _LOCKS)).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
