"""One shard file, byte by byte, as Zarr's sharding codec lays it out (videos → features).

A shard of N chunks is its written chunks one after another, each 256 x F float16 little-endian and its crc32c, then an
index of N pairs (offset, bytes) as u64 and the crc32c of the index. A chunk that was never written has all bits set in
its pair. Writing it here, chunk by chunk as videos arrive, needs one chunk of memory where zarr-python needs two
shards; zarr-python and tensorstore read the same bytes (tests).
"""

from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import numpy as np

from feature_store.files import crc32c
from feature_store.layout import CHUNK_ROWS, CRC_BYTES, StoreMeta
from vlm_dist.errors import StoreError

ABSENT = np.uint64(2**64 - 1)


def index_bytes(meta: StoreMeta) -> int:
    """Bytes of a shard's index with its checksum."""
    return meta.chunks_per_shard * 16 + CRC_BYTES


def shard_bytes(meta: StoreMeta, rows: int) -> int:
    """Bytes of a shard file that holds its first `rows` rows."""
    return -(-rows // CHUNK_ROWS) * (meta.chunk_bytes + CRC_BYTES) + index_bytes(meta)


class ShardFile:
    """Writes rows in order into an open file; `finish` pads the last chunk and appends the index."""

    def __init__(self, meta: StoreMeta, file: BinaryIO) -> None:
        self._meta = meta
        self._file = file
        self._chunk = np.zeros((CHUNK_ROWS, meta.feature_dim), "<f2")
        self._index = np.full((meta.chunks_per_shard, 2), ABSENT, "<u8")
        self.rows = 0
        self.size = 0
        self.crc32c = 0

    def append(self, features: np.ndarray) -> None:
        """Adds (n, F) float16 rows; the caller has made sure that they fit."""
        done = 0
        while done < len(features):
            at = self.rows % CHUNK_ROWS
            take = min(CHUNK_ROWS - at, len(features) - done)
            self._chunk[at : at + take] = features[done : done + take]
            self.rows += take
            done += take
            if self.rows % CHUNK_ROWS == 0:
                self._flush_chunk()

    def finish(self) -> None:
        """Writes what is left and the index."""
        if self.rows % CHUNK_ROWS:
            self._flush_chunk()
        self._write(self._index)
        self._write(_crc_of(self._index))

    def _flush_chunk(self) -> None:
        number = (self.rows - 1) // CHUNK_ROWS
        self._index[number] = self.size, self._meta.chunk_bytes + CRC_BYTES
        self._write(self._chunk)
        self._write(_crc_of(self._chunk))
        self._chunk[:] = 0

    def _write(self, data: np.ndarray) -> None:
        self._file.write(data.data)
        self.crc32c = crc32c(data, self.crc32c)
        self.size += data.nbytes


def parse_index(meta: StoreMeta, raw: bytes, path: Path | str) -> np.ndarray:
    """The (chunks, 2) offsets and sizes from a shard's last bytes; StoreError where the index is damaged."""
    if len(raw) != index_bytes(meta):
        raise StoreError(
            f"shard {path} is cut short: {len(raw)} bytes of index, expected {index_bytes(meta)}. {REPAIR}"
        )
    index = np.frombuffer(raw[:-CRC_BYTES], "<u8").reshape(-1, 2)
    if _crc_of(index).tobytes() != raw[-CRC_BYTES:]:
        raise StoreError(f"the chunk index at the end of shard {path} is damaged (crc32c differs). {REPAIR}")
    return index


def bad_chunks(meta: StoreMeta, path: Path) -> Iterator[tuple[int, str]]:
    """Reads a whole shard file; yields every written chunk whose checksum fails, and why.

    Raises:
        StoreError: the file's chunk index itself cannot be used.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - index_bytes(meta)))
        index = parse_index(meta, file.read(), path)
        for chunk, (offset, length) in enumerate(index):
            if offset == ABSENT:
                continue
            file.seek(int(offset))
            raw = file.read(int(length))
            if len(raw) != length or length != meta.chunk_bytes + CRC_BYTES:
                yield chunk, f"{len(raw)} bytes where {meta.chunk_bytes + CRC_BYTES} belong"
            elif crc32c(raw[:-CRC_BYTES]).to_bytes(CRC_BYTES, "little") != raw[-CRC_BYTES:]:
                yield chunk, "crc32c differs"


def read_rows(meta: StoreMeta, file: BufferedReader, row: int, n_rows: int) -> np.ndarray | None:
    """(n_rows, F) float16 rows of an open shard file by their place, which needs no chunk index.

    `ShardFile` writes chunks in order, so that a file without its end, where the index is, has all others where they
    belong. No checksum is compared here. None where the file ends before the rows do.
    """
    rows = np.empty((n_rows, meta.feature_dim), "<f2")
    done = 0
    while done < n_rows:
        chunk, within = divmod(row + done, CHUNK_ROWS)
        part = rows[done : done + CHUNK_ROWS - within]
        file.seek(chunk * (meta.chunk_bytes + CRC_BYTES) + within * meta.row_bytes)
        if file.readinto(part.data) != part.nbytes:
            return None
        done += len(part)
    return rows


REPAIR = "Run `vlm-dist store verify --deep --repair` on the store, then extract again"


def _crc_of(data: np.ndarray) -> np.ndarray:
    return np.array([crc32c(data)], "<u4")
