"""Pickle files of arrays and captions → plain data, while nothing in the file can run (outside → import, captions).

A pickle is a program. This reader knows a dozen names, and gives even those no real function: each stands for a small
class here that keeps numbers and bytes, and numpy sees them only after they were checked. What it cannot prevent: a
file made for it may fill the memory or, by a million nested tuples, end the process.
"""

import pickle
import re
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np

from feature_store.files import no_plain_file
from vlm_dist.errors import ConfigError, StoreError

SUFFIXES = (".pkl", ".pickle", ".p")
_KIND = re.compile(r"(?:b1|[iu][1248]|f[248]|[US]\d{1,6}|O8?)")


def load_pickle(path: Path, allow: bool) -> object:
    """The object in a pickle file: dicts, lists, tuples, strings, bytes, numbers, and arrays as `PickledArray`.

    The whole object is in memory: a pickle cannot be read in parts.

    Raises:
        ConfigError: `allow` is false.
        StoreError: it names a class or function that is not data (it is named, and nothing of it has run), or it is no
            file, or not a whole pickle.
    """
    require_allowed(path, allow)
    if wrong := no_plain_file(path):
        raise StoreError(f"{path} {wrong}: give a pickle file")
    with path.open("rb") as file:
        try:
            # Strings of Python 2 come as bytes: the raw bytes of its arrays are such strings.
            return _Unpickler(file, encoding="bytes").load()
        except _Refused as error:
            raise StoreError(f"{path} is refused: {error}. Save it as .npy or .npz files instead") from None
        except MemoryError:
            raise StoreError(f"{path} does not fit into memory: a pickle is read whole. Split it") from None
        except Exception as error:  # a damaged pickle raises anything
            detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise StoreError(f"{path} is not a whole pickle of arrays, dicts and strings ({detail})") from None


def require_allowed(path: Path, allow: bool) -> None:
    """ConfigError that says what the risk is, and what to type, where pickles are not allowed."""
    if not allow:
        raise ConfigError(
            f"{path} is a pickle, and a pickle can hold a program that runs when it is opened. vlm-dist opens one only "
            "where you allow it, restricted to arrays, lists, dicts, strings and numbers: add --allow-pickle if you "
            "trust where the file comes from"
        )


def as_text(value: object) -> str | None:
    """A string of Python 3, or of Python 2 where it is UTF-8; None for anything else."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    return value if isinstance(value, str) else None


class PickledArray:
    """What a file says of one numpy array; `array` makes it real.

    Attributes:
        shape: of the array.
        kind: numpy's name of the element type, as `<f4`; `|O` holds Python objects.
    """

    def __init__(self, *_: object) -> None:
        self.shape: tuple[int, ...] = ()
        self.kind = "|O"
        self._data: bytes | bytearray | list[object] = []
        self._order = "C"
        self._stored_shape: tuple[int, ...] = ()
        self._axes: tuple[int, ...] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state  # as numpy writes them, with a version in front
        self.fill(shape, kind, data, "F" if fortran else "C")

    def fill(self, shape: Any, kind: Any, data: Any, order: str) -> None:
        """Takes the array's parts, checked against each other."""
        if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in cast("Any", shape)):
            raise _Refused("an array without a shape")
        shape = cast("tuple[int, ...]", shape)
        if not isinstance(kind, _Kind):
            raise _Refused("an array without an element type")
        objects = kind.name == "|O"
        size = prod(shape) * (1 if objects else np.dtype(kind.name).itemsize)
        if not isinstance(data, list if objects else (bytes, bytearray)) or len(cast("Any", data)) != size:
            raise _Refused("an array whose bytes do not fit its shape")
        self.shape, self.kind, self._data, self._order = shape, kind.name, cast("Any", data), order

    def permute(self, axes: tuple[int, ...]) -> None:
        """Transposes, once: numpy writes the axes of a transposed array apart."""
        self._axes, self._stored_shape = axes, self.shape
        self.shape = tuple(self.shape[axis] for axis in axes)

    def array(self) -> np.ndarray:
        """The array of numbers or strings, read-only."""
        assert not isinstance(self._data, list), "the caller has looked at `kind`"
        flat = np.frombuffer(self._data, self.kind)
        if self._axes is not None:
            return flat.reshape(self._stored_shape).transpose(self._axes)
        return flat.reshape(self.shape, order="F" if self._order == "F" else "C")

    def values(self) -> list[Any]:
        """The elements as Python values, as `ndarray.tolist` gives them."""
        return list(self._data) if isinstance(self._data, list) else self.array().tolist()


class _Refused(pickle.UnpicklingError):
    """What is in the file is not plain data."""


class _Kind:
    """Stands for `numpy.dtype`: plain numbers, strings, or Python objects; no structures."""

    def __init__(self, code: object, *_: object) -> None:
        text = as_text(code) or ""
        if not _KIND.fullmatch(text):
            raise _Refused(f"an array of the type {text!r}, which is neither numbers nor strings")
        self._code = text.rstrip("8") if text.startswith("O") else text
        self.name = np.dtype(self._code).str

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = as_text(state[1])
        if order not in ("<", ">", "|", "="):
            raise _Refused(f"an array of the byte order {order!r}")
        self.name = np.dtype(self._code).newbyteorder(order).str


def _array_of_buffer(data: Any, kind: Any, shape: Any, order: Any, axes: Any = None) -> PickledArray:
    """Stands for what numpy writes in protocol 5."""
    array = PickledArray()
    array.fill(shape, kind, data, "F" if as_text(order) == "F" else "C")
    if axes is not None:
        if not isinstance(axes, tuple) or sorted(cast("Any", axes)) != list(range(len(array.shape))):
            raise _Refused("an array with axes that it does not have")
        array.permute(cast("tuple[int, ...]", axes))
    return array


def _scalar(kind: Any, data: Any = b"") -> Any:
    """Stands for one numpy number, which becomes Python's."""
    array = PickledArray()
    array.fill((1,), kind, data, "C")
    return array.values()[0]


def _bytes_of_text(text: Any, encoding: Any = "latin1") -> bytes:
    """Stands for `_codecs.encode`, by which protocols 0 to 2 write bytes."""
    if not isinstance(text, str) or as_text(encoding) != "latin1":
        raise _Refused(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes(*arguments: object) -> bytes:
    """Stands for `bytes`, by which those protocols write the empty string."""
    if arguments:
        raise _Refused("bytes() of something")
    return b""


class _StandIn:
    """One name that a file may say. It can be called; what else a pickle may do to an object is refused."""

    def __init__(self, make: Callable[..., object]) -> None:
        self._make = make

    def __call__(self, *arguments: object) -> object:
        return self._make(*arguments)

    def __setstate__(self, state: object) -> None:
        raise _Refused("a pickle that changes the functions it is read with")


def _allowed() -> dict[tuple[str, str], _StandIn]:
    names: dict[tuple[str, str], Callable[..., object]] = {
        ("numpy", "ndarray"): PickledArray,
        ("numpy", "dtype"): _Kind,
        ("_codecs", "encode"): _bytes_of_text,
        ("builtins", "bytes"): _no_bytes,
        ("__builtin__", "bytes"): _no_bytes,  # protocols 0 to 2 use the names of Python 2
    }
    for core in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2
        names[f"{core}.multiarray", "_reconstruct"] = PickledArray
        names[f"{core}.multiarray", "scalar"] = _scalar
        names[f"{core}.numeric", "_frombuffer"] = _array_of_buffer
    return {name: _StandIn(make) for name, make in names.items()}


_ALLOWED = _allowed()


class _Unpickler(pickle.Unpickler):
    """Finds the allowed names and no others."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        found = _ALLOWED.get((module_name, global_name))
        if found is None:
            raise _Refused(f"it names {module_name}.{global_name}, which is not plain data")
        return found

    def persistent_load(self, pid: object) -> Any:
        raise _Refused("it points outside of itself, as PyTorch's files do")
