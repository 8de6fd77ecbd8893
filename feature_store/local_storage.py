"""A feature store in a folder: exclusive creation by hard link, publishing by rename, fsync before either."""

import errno
import os
import shutil
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR

from feature_store.files import SCRATCH, VOIDED, disk_guard, fsync_dir, read_file, write_durable
from feature_store.published import Location, Tree
from vlm_dist.errors import StoreError

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class LocalStorage:
    """A `Storage` on any POSIX file system that all workers see (NFS, Lustre, a disk)."""

    root: Path

    @property
    def address(self) -> str:
        """The folder's path."""
        return str(self.root)

    def path(self, key: str) -> Path:
        """The file or folder of a key."""
        return self.root / key

    @contextmanager
    def _writing(self, path: Path, needed: int) -> Generator[None]:
        """Turns a full disk, and a store that may not be written to, into a StoreError that says what to do."""
        try:
            with disk_guard(path, needed):
                yield
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            raise StoreError(
                f"the store {self.root} cannot be written to ({error.strerror}): let this user write to its folder and "
                "all that is in it, or work on a copy"
            ) from error

    def read(self, key: str) -> bytes:
        return read_file(self.path(key))

    def read_many(self, keys: Sequence[str]) -> Iterator[bytes]:
        return map(self.read, keys)

    def size(self, key: str) -> int | None:
        try:
            status = self.path(key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return None if S_ISDIR(status.st_mode) else status.st_size

    def sizes(self, folder: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for parent, _, names in os.walk(self.path(folder)):
            for name in names:
                path = Path(parent, name)
                if (size := self.size(str(path.relative_to(self.root)))) is not None:  # gone since it was listed
                    found[path.relative_to(self.root).as_posix()] = size
        return found

    def changed(self, key: str) -> float:
        root = self.path(key)
        inside = (Path(parent, name) for parent, folders, names in os.walk(root) for name in (*folders, *names))
        times: list[float] = []
        for path in (root, *inside):
            with suppress(FileNotFoundError):
                times.append(path.lstat().st_mtime)
        return max(times, default=time.time())

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(self.path(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def create(self, key: str, data: bytes, guard: str = "") -> bool:
        path = self.path(key)
        # Beside the guard: a link from a folder that was swept meanwhile fails, without any window in between.
        temp = (self.path(guard).parent if guard else self.path(SCRATCH)) / f"{path.name}.{uuid.uuid4().hex}"
        with self._writing(path, len(data)):
            try:
                if not guard:
                    temp.parent.mkdir(exist_ok=True)  # a copy of a store may have lost an empty folder
                    path.parent.mkdir(exist_ok=True)
                write_durable(temp, data)
                os.link(temp, path)
                fsync_dir(path.parent)
            except FileExistsError:
                return False
            finally:
                temp.unlink(missing_ok=True)
        return True

    def replace(self, key: str, data: bytes) -> None:
        path = self.path(key)
        temp = self.path(SCRATCH) / f"{path.name}.{uuid.uuid4().hex}"
        with self._writing(path, len(data)):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                temp.parent.mkdir(exist_ok=True)
                write_durable(temp, data)
                self._put(temp, path)
                fsync_dir(path.parent)
            finally:
                temp.unlink(missing_ok=True)

    def _put(self, source: Path, final: Path) -> None:
        """Renames; a folder in a file's place, which is nothing of the store's, goes aside with all that is in it."""
        try:
            source.replace(final)
        except IsADirectoryError:
            if not final.is_dir():  # somebody else has put it aside, and the file in its place
                return self._put(source, final)
            self.path(VOIDED).mkdir(exist_ok=True)
            final.rename(self.path(VOIDED) / f"folder-{uuid.uuid4().hex}-{final.name}")
            source.replace(final)

    def swap(self, key: str, before: bytes | None, data: bytes) -> bool:
        # Not one step, as POSIX has none: whoever swaps must look again afterwards, and all do.
        try:
            now = self.read(key)
        except FileNotFoundError:
            now = None
        if now != before:
            return False
        self.replace(key, data)
        return True

    def move(self, key: str, target: str) -> bool:
        source, final = self.path(key), self.path(target)
        try:
            with self._writing(final, 4096):
                final.parent.mkdir(parents=True, exist_ok=True)
                self._put(source, final)
        except FileNotFoundError:
            return False
        with suppress(FileNotFoundError):  # a sweep takes an attempt's folder away as soon as the shard is published
            fsync_dir(source.parent)
        for folder in final.parents:  # up to the root: the folders on the way may be new as well
            fsync_dir(folder)
            if folder == self.root:
                break
        return True

    def sync(self, folder: str) -> None:
        fsync_dir(self.path(folder))

    def remove(self, key: str) -> None:
        path = self.path(key)
        if path.is_dir():
            aside = self.path(SCRATCH) / f"removed.{uuid.uuid4().hex}"  # nobody sees half of it
            aside.parent.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):
                path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def prepare(self, folders: Sequence[str]) -> None:
        with self._writing(self.path("zarr.json"), 64 << 10):
            for name in folders:
                self.path(name).mkdir(parents=True, exist_ok=True)
        fsync_dir(self.root)
        with suppress(PermissionError):  # a folder that we may pass but not read: then its owner has made ours
            fsync_dir(self.root.parent)

    def scratch(self, name: str) -> Path:
        folder = self.path(SCRATCH) / name
        with self._writing(folder, 4096):
            folder.parent.mkdir(exist_ok=True)  # a copy of a store may have lost an empty folder
            folder.mkdir()
        return folder

    def upload(self, path: Path, key: str) -> None:
        # The scratch folder is on the store's own file system, and what is built there already has its final name.
        assert path == self.path(key), f"{path} is not where {key} belongs"
        for folder in (path.parent, path.parent.parent):
            fsync_dir(folder)

    def publish(self, folder: Path, key: str) -> bool:
        path = self.path(key)
        with self._writing(path, 4096):
            path.parent.mkdir(exist_ok=True)  # a copy of a store may have lost it
            try:
                folder.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return False
        fsync_dir(path.parent)
        return True

    def tree(self, key: str) -> Tree:
        location = Location.of(self, key)
        path = self.path(location.folder if location else key)
        if not path.is_dir():
            raise FileNotFoundError(path)
        return Tree(path)

    @contextmanager
    def copied(self, key: str) -> Generator[Path]:
        yield self.tree(key).folder

    def local(self, key: str) -> Path | None:
        return self.path(key)

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Iterator[bytes]:
        for key, start, length in ranges:
            with self.path(key).open("rb") as file:
                file.seek(start)
                yield file.read(length)

    def read_end(self, key: str, length: int) -> tuple[bytes, int, str]:
        with self.path(key).open("rb") as file:
            status = os.fstat(file.fileno())
            file.seek(max(0, status.st_size - length))
            return file.read(), status.st_size, f"{status.st_ino}-{status.st_mtime_ns}"
