"""Temporary folders on this node, where things of a store in a bucket are built and looked at (under the storage).

All of a process lie in one folder under $TMPDIR, beside a lock that it holds as long as it lives: what a killed process
left there is removed by the next one that needs such a folder.
"""

import atexit
import fcntl
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX, _LOCK = "vlm-dist-store-", ".lock"

_turn = threading.Lock()
_folders: dict[int, Path] = {}  # by process: a forked one makes its own


def node_folder(name: str) -> Path:
    """A fresh folder that is gone, at the latest, when another process needs one after this one has ended."""
    with _turn:
        if os.getpid() not in _folders:
            _sweep()
            _folders[os.getpid()] = _make_own()
    folder = _folders[os.getpid()] / name
    folder.mkdir()
    return folder


@contextmanager
def temporary_folder() -> Generator[Path]:
    """Such a folder for the block."""
    folder = node_folder(uuid.uuid4().hex)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_own() -> Path:
    while True:
        folder = Path(tempfile.gettempdir(), _PREFIX + uuid.uuid4().hex)
        lock = folder.with_suffix(_LOCK)
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if lock.exists() and os.path.samestat(lock.stat(), os.fstat(descriptor)):
            break
        os.close(descriptor)  # swept between its creation and our lock
    folder.mkdir(mode=0o700)
    atexit.register(_remove, os.getpid(), folder)
    return folder  # the descriptor stays open, and the lock held, until the process ends


def _remove(owner: int, folder: Path) -> None:
    if os.getpid() == owner:  # a forked process inherits the call
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(_LOCK).unlink(missing_ok=True)


def _sweep() -> None:
    """Removes the folders whose process has ended."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*{_LOCK}"):
        with suppress(OSError):  # another user's, or another process is at it
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink()
            finally:
                os.close(descriptor)
