"""Index columns: one-chunk uncompressed Zarr v3 arrays, raw buffers on disk (features, captions → index)."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from feature_store.files import crc32c, fsync_dir, write_durable
from feature_store.layout import array_json
from vlm_dist.errors import StoreError

ArrayInfo = dict[str, Any]  # dtype, length, crc32c: what snapshot.json says of an array


def column_json(info: ArrayInfo) -> bytes:
    """The zarr.json of an array, which other readers of Zarr need."""
    dtype = np.dtype(info["dtype"])
    codec: dict[str, Any] = {"name": "bytes"}
    if dtype.itemsize > 1:
        codec["configuration"] = {"endian": "little"}
    return array_json([info["length"]], [max(1, info["length"])], dtype.name, [codec])


class ColumnWriter:
    """Appends to one 1-d array, any number of elements at a time; memory does not grow with it."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self._folder = folder / name
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._length = 0
        self._crc32c = 0
        (self._folder / "c").mkdir(parents=True)
        self._file = (self._folder / "c" / "0").open("wb", buffering=1 << 18)

    def append(self, values: np.ndarray) -> None:
        """Adds the elements of `values` (any shape of a dtype that casts safely)."""
        data = np.ascontiguousarray(values).astype(self._dtype, casting="same_kind", copy=False)
        self._file.write(data.data)
        self._crc32c = crc32c(data, self._crc32c)
        self._length += data.size

    def finish(self) -> ArrayInfo:
        """Fsyncs the buffer, writes the metadata, and says what was written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._length == 0:
            (self._folder / "c" / "0").unlink()
        info = {"dtype": self._dtype.name, "length": self._length, "crc32c": self._crc32c}
        write_durable(self._folder / "zarr.json", column_json(info))
        fsync_dir(self._folder / "c")
        fsync_dir(self._folder)
        return info


def write_column(folder: Path, name: str, values: np.ndarray) -> ArrayInfo:
    """Writes one array at once."""
    writer = ColumnWriter(folder, name, values.dtype.name)
    writer.append(values)
    return writer.finish()


def column_key(name: str) -> str:
    """The file of an array's values, from its snapshot's folder on."""
    return f"{name}/c/0"


def column_bytes(info: ArrayInfo) -> int:
    """Bytes of an array; where there are none, there is no file."""
    return info["length"] * np.dtype(info["dtype"]).itemsize


def open_column(folder: Path, name: str, info: ArrayInfo) -> np.ndarray:
    """Memory-maps an array, read-only; nothing of it is read.

    Raises:
        StoreError: the file is missing or has another size than was written.
    """
    dtype, wanted = np.dtype(info["dtype"]).newbyteorder("<"), column_bytes(info)
    if not wanted:
        return np.empty(0, dtype)
    path = folder / column_key(name)
    size = path.stat().st_size if path.is_file() else 0
    if size != wanted:
        raise StoreError(
            f"index array {path} has {size:,} bytes, {wanted:,} belong there; "
            "run `vlm-dist store verify --repair` on the store"
        )
    return np.asarray(np.memmap(path, dtype, "r"))


def check_column(folder: Path, name: str, info: ArrayInfo) -> bool:
    """Reads a whole array and compares its checksum; False where a byte differs."""
    values = open_column(folder, name, info)
    crc = 0
    for start in range(0, len(values), 1 << 22):
        crc = crc32c(values[start : start + (1 << 22)], crc)
    return crc == info["crc32c"]
