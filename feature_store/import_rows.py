"""An array from outside → float16 rows that a store may hold, or the reason why not (import, before the writer)."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlm_dist.errors import ExtractionError

UNIT_TOLERANCE = 0.01  # float16 rounds the length of a 512-d unit row by at most 5e-4
OVERFLOW = "overflow"
_MAX_FLOAT16 = 65504.0


@dataclass(frozen=True)
class RowRules:
    """What an array must be, and what is done to it.

    Attributes:
        width: columns of the array; 0 takes any.
        most_rows: rows that a shard of the store holds.
        room: rows that the shard at hand has left; what needs more is not read now (reason `overflow`).
        unit: rows must have length 1 (or be zero); ignored where `normalise` makes them so.
        normalise: divide each row by its length.
        project: float32 (n, width) → float32 (n, F), before that; S3D's `fc`.
    """

    width: int
    most_rows: int
    room: int = sys.maxsize
    unit: bool = False
    normalise: bool = False
    project: Callable[[np.ndarray], np.ndarray] | None = None

    def check_form(self, shape: tuple[int, ...], dtype: str) -> None:
        """Refuse an array by what is said of it, before it is read.

        Args:
            shape: of the array.
            dtype: its type as numpy writes it, like `<f4`.

        Raises:
            ExtractionError: reason bad_dtype, bad_shape, zero_seconds, too_long, or overflow, which is no failure.
        """
        if dtype == "|O":
            raise ExtractionError("it holds Python objects (a pickle), not numbers", "bad_dtype")
        if dtype[1:] not in ("f2", "f4", "f8"):
            raise ExtractionError(f"its numbers are {dtype}; features are float16, float32 or float64", "bad_dtype")
        wanted = f"(seconds, {self.width or 'F'})"
        if len(shape) != 2 or (self.width and shape[1] != self.width) or shape[1] == 0:
            raise ExtractionError(f"its shape is {shape}, not {wanted}", "bad_shape")
        if shape[0] == 0:
            raise ExtractionError("it has no rows", "zero_seconds")
        if shape[0] > self.most_rows:
            raise ExtractionError(f"{shape[0]} rows; a shard of this store holds {self.most_rows}", "too_long")
        if shape[0] > self.room:
            raise ExtractionError(f"{shape[0]} rows; the shard has {self.room} left", OVERFLOW)

    def rows(self, array: np.ndarray) -> np.ndarray:
        """Rows for the store: projected, normalised, then rounded to the nearest float16 (ties to even).

        Args:
            array: (n, width) float16, float32 or float64, of a form that passed `check_form`.

        Returns:
            (n, F) float16, C-contiguous.

        Raises:
            ExtractionError: reason not_finite (as float16: beyond 65504 too), all_zero or not_normalised.
        """
        largest = _largest(array)
        if not np.isfinite(largest):
            raise ExtractionError("it holds numbers that are not finite (NaN or infinity)", "not_finite")
        if largest == 0:
            raise ExtractionError("all of its numbers are zero", "all_zero")
        if self.project is not None:
            array = self.project(array.astype(np.float32))
        if self.normalise:
            lengths = _row_lengths(array)
            array = array / np.where(lengths > 0, lengths, 1)[:, None]
        elif self.unit and not is_unit(array):
            raise ExtractionError(
                "its rows do not have length 1, as this store's have; import all with --normalise into a new store",
                "not_normalised",
            )
        if not _largest(array) <= _MAX_FLOAT16:
            raise ExtractionError(f"it holds numbers beyond {_MAX_FLOAT16:g}, the largest float16", "not_finite")
        rows = np.ascontiguousarray(array, np.float16)
        if _largest(rows) == 0:
            raise ExtractionError("all of its numbers are zero as float16", "all_zero")
        return rows


def is_unit(array: np.ndarray) -> bool:
    """Whether every row has length 1 within 1 %; a row of zeros (the feature of nothing) passes."""
    lengths = _row_lengths(array)
    return bool(((np.abs(lengths - 1) <= UNIT_TOLERANCE) | (lengths == 0)).all())


def _row_lengths(array: np.ndarray) -> np.ndarray:
    """(n,) float64 Euclidean lengths of rows."""
    if array.dtype.itemsize == 2:
        array = array.astype(np.float32)  # numpy is several times slower on halves; their squares cannot overflow it
        return np.sqrt(np.einsum("ij,ij->i", array, array)).astype(np.float64)
    return np.sqrt(np.einsum("ij,ij->i", array, array, dtype=np.float64))


def _largest(array: np.ndarray) -> float:
    """The largest magnitude; not finite where any number is not."""
    if array.dtype == np.float16:  # magnitudes of halves are in the order of their bits
        return float((array.view(np.uint16) & 0x7FFF).max().view(np.float16))
    return float(np.abs(array).max())
