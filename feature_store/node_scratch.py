"""Temporary folders on this node, where things of a store in a bucket are built and looked at (under the storage).

All of a process lie in one folder of the node's cache, on which it holds a lock as long as it lives: what a killed
process left there is removed by the next one that needs such a folder.
"""

import atexit
import fcntl
import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from feature_store.node_files import cache_folder, remove_unused, turn, usable

_own: dict[tuple[int, Path], Path] = {}  # by process, as a forked one makes its own, and by cache


def node_folder(name: str) -> Path:
    """A fresh folder, which is gone, at the latest, when another process needs one after this one has ended."""
    base = cache_folder() / "scratch"
    with usable(base / name):
        with turn(base.name):
            own = _own.get((os.getpid(), base))
            if own is None or not own.is_dir():  # somebody may empty the cache meanwhile
                own = _own[os.getpid(), base] = _make_own(base)
        folder = own / name
        assert not folder.exists(), f"{folder} is in use"
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


def _make_own(base: Path) -> Path:
    """The caller has the turn for it, so that nobody sweeps between the folder and its lock."""
    base.mkdir(parents=True, exist_ok=True)
    for other in base.iterdir():
        remove_unused(other)
    folder = base / uuid.uuid4().hex
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # held until the process ends
    atexit.register(_remove, os.getpid(), folder)
    return folder


def _remove(owner: int, folder: Path) -> None:
    if os.getpid() == owner:  # a forked process inherits the call
        shutil.rmtree(folder, ignore_errors=True)
