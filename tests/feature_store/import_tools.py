"""What the tests of import share: arrays, a folder of them, and what a store then holds."""

from pathlib import Path

import numpy as np

from feature_store.config import ImportConfig
from feature_store.reader import FeatureReader
from feature_store.verify import verify_store

CFG = ImportConfig(rows_per_shard=1024)
F = 16


def unit_rows(number: int, rows: int, width: int = F) -> np.ndarray:
    """(rows, width) float32 of length 1."""
    values = np.random.default_rng(number).standard_normal((rows, width)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


ARRAYS = {f"v{number}": unit_rows(number, 3 + 7 * number) for number in range(6)}


def contents(root: Path) -> dict[str, np.ndarray]:
    reader = FeatureReader(root, check="always")
    return {reader.index.video_id(k): reader.read(k) for k in range(reader.index.num_videos)}


def assert_holds(root: Path, arrays: dict[str, np.ndarray]) -> None:
    """Exactly these arrays, rounded to float16, in a store that verifies."""
    found = contents(root)
    assert sorted(found) == sorted(arrays)
    for video_id, rows in arrays.items():
        assert found[video_id].tobytes() == rows.astype(np.float16).tobytes(), video_id
    assert not verify_store(root, deep=True, repair=False).problems


def npy_folder(folder: Path) -> Path:
    """ARRAYS as files, some of them in a sub-folder, and files that are not for us."""
    (folder / "part" / "deep").mkdir(parents=True)
    for number, (video_id, rows) in enumerate(ARRAYS.items()):
        np.save(folder / ("" if number % 2 else "part/deep") / f"{video_id}.npy", rows)
    (folder / "notes.txt").write_text("no features")
    (folder / ".v9.npy.partial").touch()
    (folder / "raw_caption.pkl").write_bytes(b"no pickle")
    return folder
