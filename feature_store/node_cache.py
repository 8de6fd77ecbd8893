"""What a node keeps of a store in a bucket: index snapshots to map, and shards up to a budget (storage → reader).

Shared by all processes of a node; the least recently used go first. Deleting what another process has open or mapped
does not disturb it; a tree, of which files are opened later as well, is spared while a process of the node holds it.
"""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from feature_store.node_files import (
    Fill,
    appear,
    by_age,
    cache_folder,
    digest,
    remove,
    remove_unused,
    same,
    sweep,
    turn,
    usable,
)
from feature_store.published import Tree

_KEPT_TREES = 4  # of a store, beside older ones that are in use


class KeptTree(Tree):
    """A copy of a published folder on this node, which stays there while somebody holds this."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        super().__init__(folder)
        self._descriptor = descriptor  # of the folder, with a shared lock on it

    def __del__(self) -> None:
        os.close(self._descriptor)

    @property
    def current(self) -> bool:
        return same(self.folder, self._descriptor)

    def drop(self) -> bool:
        with usable(self.folder), turn(self.folder.name):
            if self.current:  # else another process was faster, and a new copy is there
                remove(self.folder)
        return True


def keep_tree(address: str, name: str, fill: Fill) -> KeptTree:
    """This node's copy of a published folder.

    Args:
        address: of the store.
        name: of the folder and its content.
        fill: makes the folder and fills it, where there is no copy yet.
    """
    final = cache_folder() / "trees" / digest(address) / name.replace("/", "-")
    with usable(final):
        if tree := _hold(final):
            return tree
        while True:
            appear(final, fill)
            if tree := _hold(final):  # before others go, so that it is not one of them
                _evict_trees(final.parent)
                return tree


class ShardCache:
    """Whole shard files on the node's disk, at most `budget` bytes of them over all stores."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.folder = cache_folder() / "shards"

    def open(self, tag: str, fill: Fill) -> int:
        """A descriptor of the file of that tag, filled at first use.

        Args:
            tag: names store, shard and content.
            fill: writes a verified file at a path.
        """
        path = self.folder / digest(tag)
        while True:
            with suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                _touch(descriptor)
                return descriptor
            with usable(path):
                appear(path, fill)
                self._evict(path)

    def drop(self, tag: str, descriptor: int) -> None:
        """Gives up the file that was opened as this descriptor, whose bytes are bad; whoever opens it next fills it."""
        path = self.folder / digest(tag)
        with usable(path), turn(path.name):
            if same(path, descriptor):
                remove(path)

    def _evict(self, newest: Path) -> None:
        sweep(self.folder)
        files = by_age(self.folder)
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self.budget:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size


def _hold(final: Path) -> KeptTree | None:
    """The tree, in use from now on; None where it is not there (any more)."""
    try:
        descriptor = os.open(final, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    tree = KeptTree(final, descriptor)  # closes it
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    _touch(descriptor)
    return tree if same(final, descriptor) else None


def _evict_trees(folder: Path) -> None:
    sweep(folder)
    for _, _, old in by_age(folder)[:-_KEPT_TREES]:
        with turn(old.name, wait=False) as mine:
            if mine:
                remove_unused(old)


def _touch(descriptor: int) -> None:
    with suppress(OSError):  # a cache that others filled for us
        os.utime(descriptor)
