"""Features that others made → a store: bad arrays, rounding, again, killed, another origin, through S3D's fc."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from feature_store.import_arrays import ImportState, import_arrays
from feature_store.import_sources import ArraySources
from feature_store.info import failures, store_info
from feature_store.layout import open_store
from feature_store.s3d import S3D
from tests.feature_store.import_tools import ARRAYS, CFG, F, assert_holds, contents, npy_folder, unit_rows
from tests.feature_store.store_tools import make_store, random_corpus
from vlm_dist.errors import StoreError


def test_again_does_nothing_and_more_is_added(tmp_path: Path) -> None:
    folder, store = npy_folder(tmp_path / "in"), tmp_path / "store"
    import_arrays(store, ArraySources([folder]), CFG)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    again = import_arrays(store, ArraySources([folder]), CFG)
    assert (again.shards, again.videos, again.ok, again.bytes_read) == (0, 0, 0, 0)
    assert before == {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    np.save(folder / "new.npy", unit_rows(99, 5))
    assert import_arrays(store, ArraySources([folder]), CFG).ok == 1
    assert_holds(store, {**ARRAYS, "new": unit_rows(99, 5)})


BAD = {
    "bad_shape": [np.ones((3, F + 1)), np.ones(F), np.ones((2, 3, F)), np.float32(1)],
    "bad_dtype": [np.ones((3, F), np.int64), np.array([["x"] * F]), np.array([[None] * F]), np.ones((3, F), complex)],
    "zero_seconds": [np.ones((0, F))],
    "not_finite": [np.full((3, F), np.nan), np.full((3, F), np.inf), np.full((3, F), 1e6), np.full((3, F), -7e4)],
    "all_zero": [np.zeros((3, F)), np.full((3, F), 1e-9)],
    "too_long": [np.ones((1025, F))],
}


def test_bad_arrays_are_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    folder, expected = npy_folder(tmp_path / "in"), {}
    for name in ARRAYS:  # not of length 1, so that the store takes rows of any length
        path = next(folder.rglob(f"{name}.npy"))
        np.save(path, 3 * ARRAYS[name])
    for reason, arrays in BAD.items():
        for number, array in enumerate(arrays):
            np.save(folder / f"{reason}{number}.npy", array)
            expected[f"{reason}{number}"] = reason
    whole = (folder / "v1.npy").read_bytes()
    files = {"empty_file": b"", "truncated": whole[:-1], "corrupt": b"no npy file", "corrupt2": whole[:40]}
    for name, content in files.items():
        (folder / f"{name}.npy").write_bytes(content)
        expected[name] = name.rstrip("2")
    state = import_arrays(tmp_path / "store", ArraySources([folder]), CFG)
    found = {record.video_id: record for record in failures(tmp_path / "store")}
    assert {video_id: record.reason for video_id, record in found.items()} == expected
    assert all(str(folder) in record.message for record in found.values())
    assert state.failed == len(expected)
    assert_holds(tmp_path / "store", {name: 3 * rows for name, rows in ARRAYS.items()})
    again = import_arrays(tmp_path / "store", ArraySources([folder]), CFG)
    assert again.shards == 0


def test_no_flipped_bit_of_a_header_stops_an_import(tmp_path: Path) -> None:
    """numpy reads the header as Python: what is damaged may be no Python at all, as in the last file."""
    folder = tmp_path / "in"
    folder.mkdir()
    np.save(folder / "whole.npy", ARRAYS["v1"])
    whole = (folder / "whole.npy").read_bytes()
    for bit in range(8 * 128):
        header = bytearray(whole[:128])
        header[bit // 8] ^= 1 << bit % 8
        (folder / f"{bit}.npy").write_bytes(bytes(header) + whole[128:])
    (folder / "open.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00{evil" + b" " * 120)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        state = import_arrays(tmp_path / "store", ArraySources([folder]), CFG)
    assert not told, "they would stand between the lines of a command"
    assert state.ok + state.failed == 1026
    found = {record.video_id: record for record in failures(tmp_path / "store")}
    assert found["open"].reason == "corrupt"
    assert all(f"{video_id}.npy" in record.message for video_id, record in found.items())
    assert contents(tmp_path / "store")["whole"].tobytes() == ARRAYS["v1"].astype(np.float16).tobytes()


@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_what_is_no_plain_file_is_recorded(tmp_path: Path, ending: str) -> None:
    """Opening a pipe would wait for its writer for ever."""
    folder = npy_folder(tmp_path / "in")
    os.mkfifo(folder / f"pipe{ending}")
    (folder / f"null{ending}").symlink_to("/dev/null")
    (folder / f"nowhere{ending}").symlink_to("nothing")
    import_arrays(tmp_path / "store", ArraySources([folder]), CFG)
    found = {record.video_id: (record.reason, record.message) for record in failures(tmp_path / "store")}
    no_file = "is no plain file, but a pipe, a socket or a device"
    assert found == {
        "pipe": ("corrupt", f"{folder / f'pipe{ending}'} {no_file}"),
        "null": ("corrupt", f"{folder / f'null{ending}'} {no_file}"),
        "nowhere": ("missing", f"{folder / f'nowhere{ending}'} is not there"),
    }
    assert_holds(tmp_path / "store", ARRAYS)


def test_no_good_array_makes_no_store(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, F)))
    with pytest.raises(StoreError, match=r"none of the 1 arrays.*a: all of its numbers are zero"):
        import_arrays(tmp_path / "store", ArraySources([tmp_path / "a.npy"]), CFG)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_float_is_rounded_to_the_nearest_half(tmp_path: Path, dtype: str, order: str) -> None:
    rows = np.asarray(unit_rows(0, 300) * 100, dtype, order=order)  # type: ignore[call-overload]
    np.save(tmp_path / "a.npy", rows)
    import_arrays(tmp_path / "store", ArraySources([tmp_path / "a.npy"]), CFG)
    assert_holds(tmp_path / "store", {"a": rows})
    assert not open_store(tmp_path / "store").provenance.normalised


def test_a_store_of_unit_rows_takes_no_others(tmp_path: Path) -> None:
    folder = npy_folder(tmp_path / "in")
    np.save(folder / "longer.npy", 2 * unit_rows(7, 5))
    state = import_arrays(tmp_path / "store", ArraySources([folder]), CFG)
    assert state.reasons == {"not_normalised": 1}
    assert open_store(tmp_path / "store").provenance.normalised
    assert "--normalise" in failures(tmp_path / "store")[0].message
    state = import_arrays(tmp_path / "other", ArraySources([folder]), CFG.model_copy(update={"normalise": True}))
    assert state.failed == 0
    lengths = np.linalg.norm(contents(tmp_path / "other")["longer"].astype(np.float32), axis=1)
    assert np.abs(lengths - 1).max() < 2e-3


def test_another_origin_is_refused(tmp_path: Path) -> None:
    sources = ArraySources([npy_folder(tmp_path / "in")])
    import_arrays(tmp_path / "store", sources, CFG)
    with pytest.raises(StoreError, match="extractor is 'imported', not 'clip'"):
        import_arrays(tmp_path / "store", sources, CFG.model_copy(update={"extractor": "clip"}))
    extracted = make_store(tmp_path / "extracted", random_corpus(3))
    with pytest.raises(StoreError, match="extractor is 's3d', not 'imported'"):
        import_arrays(extracted, sources, CFG)


def test_only_the_own_arrays_are_touched(tmp_path: Path) -> None:
    """What another import has planned and not done yet is neither done nor recorded as failed."""
    store = tmp_path / "store"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for number in range(4):
            np.save(tmp_path / name / f"{name}{number}.npy", ARRAYS["v2"])

    def stop(state: ImportState) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_arrays(store, ArraySources([tmp_path / "one"]), CFG, on_progress=stop)
    assert import_arrays(store, ArraySources([tmp_path / "two"]), CFG).ok == 4
    assert store_info(store)["videos"] == {"planned": 8, "ok": 4, "failed": 0, "open": 4, "deleted": 0}
    assert import_arrays(store, ArraySources([tmp_path / "one"]), CFG).ok == 4
    assert store_info(store)["videos"]["open"] == 0


def test_more_rows_than_one_shard_holds(tmp_path: Path) -> None:
    arrays = {f"v{number}": unit_rows(number, 400) for number in range(9)}
    np.savez(tmp_path / "all.npz", **arrays)  # type: ignore[arg-type]
    state = import_arrays(tmp_path / "store", ArraySources([tmp_path / "all.npz"]), CFG)
    assert (state.ok, state.failed) == (9, 0)
    assert state.bytes_read == 9 * 400 * F * 4  # what does not fit a shard is not read for nothing
    assert_holds(tmp_path / "store", arrays)


def test_an_id_that_repeats_is_recorded(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "v0.npy", ARRAYS["v0"])
    import_arrays(tmp_path / "store", ArraySources([tmp_path / "a", tmp_path / "b"]), CFG)
    assert [(record.video_id, record.reason) for record in failures(tmp_path / "store")] == [("v0", "duplicate")]


@pytest.fixture(scope="module")
def s3d_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """S3D weights in the public file's form."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "s3d.pth"
    torch.save(S3D().state_dict(), path)
    return path


def test_mixed_5c_through_fc(tmp_path: Path, s3d_file: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    wide = np.abs(unit_rows(0, 40, 1024)) * 3
    np.save(folder / "a.npy", wide)
    np.save(folder / "narrow.npy", unit_rows(1, 4, 512))
    state = import_arrays(tmp_path / "store", ArraySources([folder]), CFG, weights=s3d_file)
    assert state.reasons == {"bad_shape": 1}
    model = S3D()
    model.load_state_dict(torch.load(s3d_file, weights_only=True))
    with torch.inference_mode():
        expected = functional.normalize(model.fc(torch.from_numpy(wide)), dim=-1).numpy()
    assert np.abs(contents(tmp_path / "store")["a"].astype(np.float32) - expected).max() < 1e-3
    provenance = open_store(tmp_path / "store").provenance
    assert (provenance.weights, provenance.layer, provenance.feature_dim) == ("s3d.pth", "video_embedding", 512)
    assert provenance.normalised
    assert len(provenance.weights_sha256) == 64


def test_mixed_5c_as_it_is(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.abs(unit_rows(0, 40, 1024)) * 3)
    import_arrays(tmp_path / "store", ArraySources([tmp_path / "a.npy"]), CFG)
    provenance = open_store(tmp_path / "store").provenance
    assert (provenance.layer, provenance.feature_dim, provenance.normalised) == ("mixed_5c", 1024, False)


def test_fc_gives_the_embeddings_that_the_reference_gave(shared: Path, tmp_path: Path) -> None:
    recorded = np.load(shared / "golden" / "s3d_io.npz")
    weights = {key: torch.from_numpy(value) for key, value in np.load(shared / "golden" / "s3d_weights.npz").items()}
    torch.save(weights, tmp_path / "s3d.pth")
    np.save(tmp_path / "small.npy", recorded["mixed_5c_small"])
    import_arrays(tmp_path / "store", ArraySources([tmp_path / "small.npy"]), CFG, weights=tmp_path / "s3d.pth")
    expected = functional.normalize(torch.from_numpy(recorded["emb_small"]), dim=-1).numpy()
    assert np.abs(contents(tmp_path / "store")["small"].astype(np.float32) - expected).max() < 1e-3


SLOW_IMPORT = """
import sys, time
from pathlib import Path
from feature_store.config import ImportConfig
from feature_store.import_arrays import import_arrays
from feature_store.import_sources import ArraySources
import_arrays(Path(sys.argv[2]), ArraySources([Path(sys.argv[1])]), ImportConfig(rows_per_shard=1024),
              on_progress=lambda state: time.sleep(0.05))
"""


@pytest.mark.slow
def test_a_killed_import_goes_on_where_it_was(tmp_path: Path) -> None:
    arrays = {f"v{number:02d}": unit_rows(number, 50) for number in range(24)}
    folder, store = tmp_path / "in", tmp_path / "store"
    folder.mkdir()
    for video_id, rows in arrays.items():
        np.save(folder / f"{video_id}.npy", rows)
    process = subprocess.Popen([sys.executable, "-P", "-c", SLOW_IMPORT, str(folder), str(store)])
    while len(committed := sorted(store.glob("_commits/*.json"))) < 3:
        assert process.poll() is None, "it was to be killed in the middle"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    committed = sorted(store.glob("_commits/*.json"))
    before = [path.stat().st_mtime_ns for path in committed]
    state = import_arrays(store, ArraySources([folder]), CFG)
    assert 0 < state.ok < 24
    assert [path.stat().st_mtime_ns for path in committed] == before
    assert_holds(store, arrays)
    (note,) = (store / "_staging").iterdir()  # of the killed one; it goes after a day
    assert note.name.startswith("writer.")
