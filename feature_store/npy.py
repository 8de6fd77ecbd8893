"""An .npy file → its header, and any run of its rows, without trusting it (outside → import); rows → an .npy file.

numpy's own loader would unpickle what it finds, and map a file that another process may cut short.
"""

from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy_format

from feature_store.files import no_plain_file
from vlm_dist.errors import ExtractionError

_READERS = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}


class NpyHeader(NamedTuple):
    """What an .npy file says of its array."""

    shape: tuple[int, ...]
    fortran: bool
    """Whether columns lie one after another, so that there are no runs of rows."""
    dtype: np.dtype
    offset: int
    """Bytes in front of the first element."""
    size: int
    """Bytes of the file."""


def read_header(path: Path) -> NpyHeader:
    """The header of a file.

    Raises:
        ExtractionError: no such file (`missing`), an empty one (`empty_file`), or none that numpy wrote (`corrupt`).
    """
    try:
        require_file(path)
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            if size == 0:
                raise ExtractionError(f"{path} is empty", "empty_file")
            return NpyHeader(*parse_header(file, str(path)), file.tell(), size)
    except OSError as error:
        raise ExtractionError(f"{path} cannot be read: {error.strerror}", "error") from error


def require_file(path: Path) -> None:
    """ExtractionError where no file is there (`missing`), or something that is none (`corrupt`)."""
    if wrong := no_plain_file(path):
        raise ExtractionError(f"{path} {wrong}", "corrupt" if path.exists() else "missing")


def read_rows(path: Path, header: NpyHeader, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows start to stop (default: all) of a file of numbers, read at once.

    Raises:
        ExtractionError: the file ends before them (`truncated`), or cannot be read (`error`).
    """
    assert not header.dtype.hasobject, "the caller has looked at the type"
    assert not header.fortran or (start, stop) == (0, None), "columns have no runs of rows"
    stop = header.shape[0] if stop is None else stop
    row = int(np.prod(header.shape[1:], dtype=np.int64))
    count = (stop - start) * row
    first = header.offset + start * row * header.dtype.itemsize
    last = first + count * header.dtype.itemsize
    if last > header.size:
        raise ExtractionError(f"{path} ends after {header.size:,} of {last:,} bytes", "truncated")
    try:
        flat = np.fromfile(path, header.dtype, count, offset=first)
    except OSError as error:
        raise ExtractionError(f"{path} cannot be read: {error.strerror}", "error") from error
    if len(flat) < count:
        raise ExtractionError(f"{path} was cut short while it was read", "truncated")
    return flat.reshape((stop - start, *header.shape[1:]), order="F" if header.fortran else "C")


def write_rows(file: IO[bytes], rows: np.ndarray) -> None:
    """What `np.save` writes of a contiguous array, which on a full disk raises an error without a number."""
    npy_format.write_array_header_1_0(file, npy_format.header_data_from_array_1_0(rows))
    file.write(rows.data)


def parse_header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns lie one after another, and type of the array that begins here.

    Raises:
        ExtractionError: it is none that numpy wrote (`corrupt`).
    """
    try:
        version = npy_format.read_magic(file)
        if version not in _READERS:
            raise ValueError(f"its format version {version[0]}.{version[1]} is not for arrays of numbers")
        shape, fortran, dtype = _READERS[version](file)
        if any(length < 0 for length in shape):
            raise ValueError("a negative shape")
    except OSError:
        raise
    except Exception as error:  # numpy parses the header as Python, and damaged Python raises anything
        raise ExtractionError(f"{name} is not an .npy file ({error})", "corrupt") from None
    return shape, fortran, dtype
