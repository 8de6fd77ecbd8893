"""An open shard, wherever it lies: a file, a mapped file, or an object read by ranges (storage → reader).

Each knows where its chunks begin, and scatters a contiguous run of its bytes into buffers.
"""

import mmap
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from feature_store.files import descriptor_guard
from feature_store.layout import CRC_BYTES, StoreMeta, shard_key
from feature_store.node_cache import ShardCache
from feature_store.shard import ABSENT, REPAIR, bad_chunks, index_bytes, parse_index
from vlm_dist.errors import StoreError

Buffers = Sequence[np.ndarray]  # C-contiguous, of any type


class ShardSource(Protocol):
    """An open shard."""

    where: str
    offsets: list[int]
    """Where each chunk begins in the file."""
    stops: list[int]
    """For each chunk, the one up to which all lie one after another, with their checksums; 0 where it is absent."""
    ranged: bool
    """Whether the reader should fetch the runs of a whole batch at once, with `Storage.read_ranges`."""

    def read(self, buffers: Buffers, offset: int) -> int:
        """Fills the buffers with what lies from `offset` on; the bytes that were there."""
        ...

    def advise(self, offset: int, length: int) -> None:
        """Says what will be read soon."""
        ...

    def drop(self) -> None:
        """Says that the bytes are bad: where they are a copy that this node keeps, the next one opened is a new one."""
        ...


def open_shard(meta: StoreMeta, shard: int, cache: ShardCache | None, mapped: bool) -> ShardSource:
    """Opens a shard and checks its chunk index.

    Args:
        meta: the store.
        shard: number.
        cache: keeps shards of a store in a bucket on this node; None reads ranges.
        mapped: map a shard that is a file, for stores that fit into memory.

    Raises:
        StoreError: the shard is missing, cut short, or its chunk index is damaged; too many files are open.
    """
    key = shard_key(shard)
    where = meta.place(key)
    try:
        with descriptor_guard(where):
            path = meta.storage.local(key)
            if path is not None:
                kind = MappedShard if mapped else FileShard
                return kind(meta, where, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            raw, _, tag = meta.storage.read_end(key, index_bytes(meta))
            if cache is None:
                return RangedShard(meta, where, raw)
            return _kept_shard(meta, key, raw, cache, f"{where}#{tag}")
    except FileNotFoundError:
        raise StoreError(f"shard {shard}: {where} is missing. {REPAIR}") from None
    except (IsADirectoryError, NotADirectoryError):
        raise StoreError(f"shard {shard}: {where} is damaged (a folder and a file are mixed up). {REPAIR}") from None


class FileShard:
    """A descriptor. Closes when nobody holds it: eviction spares a read at work."""

    ranged = False

    def __init__(self, meta: StoreMeta, where: str, descriptor: int) -> None:
        self.where = where
        self._descriptor = descriptor
        self.offsets, self.stops = _layout(meta, where, _end(meta, descriptor))

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read(self, buffers: Buffers, offset: int) -> int:
        return os.preadv(self._descriptor, buffers, offset)  # pyright: ignore[reportArgumentType]

    def advise(self, offset: int, length: int) -> None:
        os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def drop(self) -> None:
        pass


class KeptShard(FileShard):
    """The descriptor of a copy that the node keeps."""

    def __init__(self, meta: StoreMeta, where: str, descriptor: int, drop: Callable[[int], None]) -> None:
        self._drop = drop
        super().__init__(meta, where, descriptor)

    def drop(self) -> None:
        self._drop(self._descriptor)


class MappedShard:
    """A map of the whole file: quickest where the file is in memory.

    A file that is cut short while it is mapped ends the process (SIGBUS) instead of raising an error.
    """

    ranged = False

    def __init__(self, meta: StoreMeta, where: str, descriptor: int) -> None:
        self.where = where
        try:
            self.offsets, self.stops = _layout(meta, where, _end(meta, descriptor))
            self._map = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)  # holds a descriptor of its own
        finally:
            os.close(descriptor)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def read(self, buffers: Buffers, offset: int) -> int:
        return scatter(self._bytes[offset:], buffers)

    def advise(self, offset: int, length: int) -> None:
        ahead = offset % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, offset - ahead, length + ahead)

    def drop(self) -> None:
        pass


class RangedShard:
    """An object that is read by ranges."""

    ranged = True

    def __init__(self, meta: StoreMeta, where: str, raw_index: bytes) -> None:
        self.where = where
        self.offsets, self.stops = _layout(meta, where, raw_index)

    def read(self, buffers: Buffers, offset: int) -> int:
        raise AssertionError("the reader fetches ranges of a batch together")

    def advise(self, offset: int, length: int) -> None:
        pass

    def drop(self) -> None:
        pass


def scatter(data: np.ndarray, buffers: Buffers) -> int:
    """Fills the buffers with bytes, one after another; how many there were for them."""
    done = 0
    for buffer in buffers:
        part = data[done : done + buffer.nbytes]
        buffer.reshape(-1).view(np.uint8)[: len(part)] = part
        done += len(part)
    return done


def _layout(meta: StoreMeta, where: str, raw_index: bytes) -> tuple[list[int], list[int]]:
    """`offsets` and `stops` of a shard, from its last bytes."""
    offsets = parse_index(meta, raw_index, where)[:, 0]
    there = offsets != ABSENT
    follows = there[1:] & there[:-1] & (offsets[1:] == offsets[:-1] + np.uint64(meta.chunk_bytes + CRC_BYTES))
    ends = np.append(np.flatnonzero(~follows) + 1, len(offsets))
    stops = np.where(there, ends[np.searchsorted(ends, np.arange(len(offsets)), "right")], 0)
    return offsets.tolist(), stops.tolist()


def _end(meta: StoreMeta, descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, index_bytes(meta), max(0, size - index_bytes(meta)))


def _kept_shard(meta: StoreMeta, key: str, end: bytes, cache: ShardCache, tag: str) -> KeptShard:
    """The node's copy of a shard; fetched again, once, where it does not end with the shard's own chunk index."""
    descriptor = cache.open(tag, lambda path: _fetch(meta, key, path))
    if _end(meta, descriptor) != end:
        try:
            cache.drop(tag, descriptor)
        finally:
            os.close(descriptor)
        descriptor = cache.open(tag, lambda path: _fetch(meta, key, path))
    return KeptShard(meta, meta.place(key), descriptor, partial(cache.drop, tag))


def _fetch(meta: StoreMeta, key: str, path: Path) -> None:
    """Copies a shard to the node, and checks every chunk of it."""
    path.write_bytes(meta.storage.read(key))
    if bad := [f"chunk {chunk}: {why}" for chunk, why in bad_chunks(meta, path)]:
        raise StoreError(f"{meta.place(key)} is damaged ({bad[0]}). {REPAIR}")
