"""Files and folders on a node's disk that appear whole and go whole, among its processes (storage → node cache).

One is filled under a hidden name, `.NAME.ATTEMPT`, by the process that has the turn for its name, made durable, and
appears by rename. What is hidden while nobody has the turn was left by a process that was killed.
"""

import fcntl
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from feature_store.files import OUT_OF_DESCRIPTORS, fsync_dir
from vlm_dist.errors import StoreUnreachableError

VARIABLE = "FEATURE_STORE_CACHE"
_LOCKS = 64

Fill = Callable[[Path], None]


def cache_folder() -> Path:
    """The node's cache: $FEATURE_STORE_CACHE, or this host's folder in the user's cache (nodes may share a home)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(VARIABLE) or Path(base) / "vlm-dist" / socket.gethostname())


def appear(final: Path, fill: Fill) -> None:
    """Makes sure that a folder or file is there, whole and durable; `fill` makes it at the path that it is given."""
    final.parent.mkdir(parents=True, exist_ok=True)
    sweep(final.parent)
    with turn(final.name):
        if final.exists():  # another process was faster
            return
        staged = _hidden(final)
        try:
            fill(staged)
            _make_durable(staged)
            staged.rename(final)
            fsync_dir(final.parent)
        finally:
            remove(staged)


def sweep(folder: Path) -> None:
    """Removes what killed fills left: a hidden name is at work only while somebody has the turn for it."""
    for path in folder.iterdir():
        if path.name[0] == ".":
            with turn(path.name[1:].rpartition(".")[0], wait=False) as mine:
                if mine:
                    remove(path)


def remove_unused(folder: Path) -> None:
    """Removes a folder unless somebody holds it; who waits for it meanwhile sees that it has gone."""
    with suppress(FileNotFoundError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(folder)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file or folder, which is never seen in part; the caller has the turn for its name."""
    with suppress(FileNotFoundError):
        if path.is_dir():
            if path.name[0] != ".":
                path = path.rename(_hidden(path))
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def by_age(folder: Path) -> list[tuple[float, int, Path]]:
    """(last use, bytes, path) of what is whole in a folder, the least recently used first."""
    found: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            status = path.stat()
            if path.name[0] != ".":
                found.append((status.st_mtime, status.st_size, path))
    return sorted(found)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _make_durable(path: Path) -> None:
    """Fsyncs a file, or all of a folder: after a power cut a name must not stand for other bytes."""
    for parent, _, names in os.walk(path):
        for name in names:
            _fsync(Path(parent, name))
        fsync_dir(Path(parent))
    if path.is_file():
        _fsync(path)


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def same(path: Path, descriptor: int) -> bool:
    """Whether a name still stands for what was opened by it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def usable(path: Path) -> Generator[None]:
    """What goes wrong with the node's own disk is never taken for a damage of the store."""
    try:
        yield
    except FileNotFoundError as error:
        if error.filename is None or not str(error.filename).startswith(str(cache_folder())):
            raise  # an object of the store that is not there
        raise _unusable(path, error) from error
    except OSError as error:
        if error.errno in OUT_OF_DESCRIPTORS:
            raise  # see `files.descriptor_guard`
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> StoreUnreachableError:
    return StoreUnreachableError(
        f"this node's copy {path} of a store cannot be written: {error.strerror or error}. "
        f"Free some space there, or name another folder with {VARIABLE}"
    )


def digest(text: str) -> str:
    """A short name for a long one."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


@contextmanager
def turn(name: str, wait: bool = True) -> Generator[bool]:
    """One process of the node at a time for (nearly) each name, so that nothing is fetched twice.

    Without `wait`, False where it is another's.
    """
    folder = cache_folder() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / str(int(digest(name), 16) % _LOCKS)).open("w") as lock:
        mine = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            mine = False
        yield mine
