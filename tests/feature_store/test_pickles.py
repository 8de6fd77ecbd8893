"""feature_store.pickles: data comes through whole; whatever could run is refused, and has not run."""

import io
import os
import pickle
from collections import OrderedDict
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_store.pickles import PickledArray, load_pickle
from vlm_dist.errors import ConfigError, StoreError

ANYWHERE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DATA: dict[str, Any] = {
    "c": np.arange(12, dtype=">f4").reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "transposed": np.arange(24, dtype=np.float16).reshape(2, 3, 4).transpose(1, 2, 0),
    "empty": np.zeros((0, 3), np.float16),
    "flags": np.array([True, False]),
    "texts": np.array(["äb", "c"]),
    "objects": np.array(["x", None], object),
    "numbers": [np.float64(2.5), np.int32(7), np.float16(0.5), 3, -1.5, True, None],
    "bytes": (b"\xff\x00", b"", "ü"),
}


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("protocol", range(6))
def test_data_of_every_protocol_comes_through(tmp_path: Path, protocol: int) -> None:
    file = tmp_path / "data.pkl"
    file.write_bytes(pickle.dumps(DATA, protocol))
    loaded = load_pickle(file, allow=True)
    assert isinstance(loaded, dict)
    assert list(loaded) == list(DATA)
    for name, value in DATA.items():
        got = loaded[name]
        assert isinstance(got, PickledArray) == isinstance(value, np.ndarray)
        if isinstance(got, PickledArray) and value.dtype != object:
            assert got.array().dtype == value.dtype
            np.testing.assert_array_equal(got.array(), value)
            assert got.shape == value.shape
        else:
            assert (got.values() if isinstance(got, PickledArray) else got) == plain(value)
    assert isinstance(loaded["numbers"][0], float)


def test_names_of_numpy_1_and_strings_of_python_2(tmp_path: Path) -> None:
    file = tmp_path / "old.pkl"
    raw = pickle.dumps({"v": np.arange(4, dtype="<f4")}, 2)
    file.write_bytes(raw.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    loaded = load_pickle(file, allow=True)
    assert isinstance(loaded, dict)
    assert loaded["v"].values() == [0, 1, 2, 3]
    # as Python 2 wrote an array: its name, its type and its bytes are all byte strings
    file.write_bytes(
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85"
        b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08\x00\x00\x80?\x00\x00\x00@tb."
    )
    array = load_pickle(file, allow=True)
    assert isinstance(array, PickledArray)
    assert array.values() == [1.0, 2.0]


def test_a_pickle_is_refused_until_it_is_allowed(tmp_path: Path) -> None:
    file = tmp_path / "data.pkl"
    file.write_bytes(pickle.dumps({}))
    with pytest.raises(ConfigError, match=r"a program that runs when it is opened.*--allow-pickle"):
        load_pickle(file, allow=False)


class Reduced:
    """Pickles to a call of a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def _torch_file() -> bytes:
    stream = io.BytesIO()
    torch.save({"v": torch.zeros(2)}, stream)
    return stream.getvalue()


def _hostile(mark: str) -> dict[str, bytes]:
    """Pickles that would make the file `mark`, or that are no plain data, by the name that the error must say."""
    touch = f"open({mark!r}, 'w')"
    named = {
        "posix.system": Reduced(os.system, (f"touch {mark}",)),
        "builtins.eval": Reduced(eval, (touch,)),
        "builtins.exec": Reduced(exec, (touch,)),
        "io.open": {"v": [Reduced(open, (mark, "w"))]},
        "builtins.getattr": Reduced(getattr, ("", "join")),
        "builtins.__import__": Reduced(__import__, ("os",)),
        "functools.partial": {"a": Reduced(partial, (eval, touch))},
        "pandas.DataFrame": b"cpandas\nDataFrame\n)R.",
        "collections.OrderedDict": OrderedDict(a=1),
        "numpy.load": b"cnumpy\nload\n(V" + mark.encode() + b"\ntR.",
        "numpy.testing._private.utils.runstring": b"cnumpy.testing._private.utils\nrunstring\n(V" + b"1\n}tR.",
        "torch._utils._rebuild_tensor_v2": {"v": torch.zeros(2)},
        "os.system": b"cos\nsystem\n(S'touch " + mark.encode() + b"'\ntR.",
        "numpy.ndarray.tofile": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
    }
    return {name: value if isinstance(value, bytes) else pickle.dumps(value) for name, value in named.items()}


@pytest.mark.parametrize("name", list(_hostile("x")))
def test_what_could_run_is_named_and_does_not_run(tmp_path: Path, name: str) -> None:
    mark, file = tmp_path / "it-ran", tmp_path / "hostile.pkl"
    file.write_bytes(_hostile(str(mark))[name])
    with pytest.raises(StoreError, match=f"names {name}, which is not plain data"):
        load_pickle(file, allow=True)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x02cnumpy\ndtype\n(V|V8\nI0\nI1\ntR.", "neither numbers nor strings"),
        (b"\x80\x02cnumpy\ndtype\n(Vf4,O\nI0\nI1\ntR.", "neither numbers nor strings"),
        # fields behind the end of an element: numpy's own reader would be given the offsets
        (b"\x80\x02cnumpy\ndtype\n(Vf4\nI0\nI1\ntR(I3\nV?\nNNNI8\nI1\nI0\ntb.", "byte order"),
        # one of the names that are allowed is changed by the file
        (b"\x80\x02c_codecs\nencode\n}V__code__\nI1\nsb.", "changes the functions"),
        (b"\x80\x02c_codecs\nencode\n(Vx\nVzlib\ntR.", "encoding"),
        (b"\x80\x02c__builtin__\nbytes\n(I99\ntR.", "of something"),
        (b"\x80\x02P0\n.", "not a whole pickle|outside of itself"),
        (b"\x80\x02I0\nQ.", "outside of itself"),
        (b"", "not a whole pickle"),
        (pickle.dumps(DATA)[:-40], "not a whole pickle"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00.", "not a whole pickle|memory"),
        (b"\x80\x04\x94\x82\x01.", "not a whole pickle"),
        (_torch_file(), "not a whole pickle"),
    ],
)
def test_odd_pickles_are_one_error(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "odd.pkl"
    file.write_bytes(content)
    with pytest.raises(StoreError, match=words):
        load_pickle(file, allow=True)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pkl")
    with pytest.raises(StoreError, match=r"pipe\.pkl is no plain file"):
        load_pickle(tmp_path / "pipe.pkl", allow=True)


def test_an_array_whose_bytes_do_not_fit_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "long.pkl"
    content = pickle.dumps(np.zeros(4, np.float32), 2)
    assert content.count(b"K\x04\x85") == 1
    file.write_bytes(content.replace(b"K\x04\x85", b"K\xff\x85"))  # 255 elements in the bytes of 4
    with pytest.raises(StoreError, match="do not fit"):
        load_pickle(file, allow=True)


ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
TREES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@ANYWHERE
@given(value=TREES, protocol=st.integers(0, 5))
def test_any_data_comes_through(tmp_path: Path, value: Any, protocol: int) -> None:
    file = tmp_path / "any.pkl"
    file.write_bytes(pickle.dumps(value, protocol))
    assert load_pickle(file, allow=True) == value


@ANYWHERE
@given(data=st.data())
def test_damaged_pickles_are_an_error_or_data(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed anywhere in a hostile pickle: what it names never runs, and nothing but a StoreError comes."""
    mark, file = tmp_path / "it-ran", tmp_path / "damaged.pkl"
    content = bytearray(pickle.dumps({"v": np.ones(3), "h": Reduced(os.mkdir, (str(mark),))}))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with suppress(StoreError):
        load_pickle(file, allow=True)
    assert not mark.exists()
