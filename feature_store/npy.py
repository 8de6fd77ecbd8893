"""An .npy file → its header, and any run of its rows, without trusting it (outside → import; export reads its own).

numpy's own loader would unpickle what it finds, and map a file that another process may cut short.
"""

from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy_format

from vlm_dist.errors import ExtractionError


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
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            if size == 0:
                raise ExtractionError(f"{path} is empty", "empty_file")
            return _parse(file, size)
    except FileNotFoundError:
        raise ExtractionError(f"{path} is not there", "missing") from None
    except (ValueError, EOFError, SyntaxError, TypeError) as error:
        if isinstance(error, ExtractionError):
            raise
        raise ExtractionError(f"{path} is not an .npy file ({error})", "corrupt") from None
    except OSError as error:
        raise ExtractionError(f"{path} cannot be read: {error.strerror}", "error") from error


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


def _parse(file: BinaryIO, size: int) -> NpyHeader:
    version = npy_format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = npy_format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = npy_format.read_array_header_2_0(file)
    else:
        raise ValueError(f"its format version {version[0]}.{version[1]} is not for arrays of numbers")
    if any(length < 0 for length in shape):
        raise ValueError("a negative shape")
    return NpyHeader(shape, fortran, dtype, file.tell(), size)
