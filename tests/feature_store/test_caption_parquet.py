"""feature_store.caption_parquet: captions in a Parquet table, as the store exports them and as others write them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_store import caption_parquet
from feature_store.caption_files import RawCaptions, iter_captions
from vlm_dist.errors import StoreError


def table(path: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_both_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(caption_parquet, "_ROWS", rows)
    told = {"text": ["one", None, "three"], "other": [1, 2, 3]}
    expected = [RawCaptions("b", [0.25, 1.0], [1.5, 2.001], ["one", None]), RawCaptions("a", [0.0], [None], ["three"])]
    ours = table(tmp_path / "o.parquet", id=["b", "b", "a"], start_ms=[250, 1000, 0], end_ms=[1500, 2001, None], **told)
    assert list(iter_captions(ours)) == expected
    start, end = [0.25, 1.0, 0.0], [1.5, 2.001, None]
    theirs = table(tmp_path / "t.PARQUET", video_id=["b", "b", "a"], start=start, end=end, **told)
    assert list(iter_captions(theirs)) == expected


def test_errors_name_the_file(tmp_path: Path) -> None:
    twice = table(tmp_path / "twice.parquet", id=["a", "b", "a"], start_ms=[0] * 3, end_ms=[1] * 3, text=["x"] * 3)
    with pytest.raises(StoreError, match=r"twice\.parquet: video a occurs twice"):
        list(iter_captions(twice))
    with pytest.raises(StoreError, match="has the columns id, text; captions need id, start_ms"):
        list(iter_captions(table(tmp_path / "few.parquet", id=["a"], text=["x"])))
    numbers = table(tmp_path / "n.parquet", id=[1], start_ms=[0], end_ms=[1], text=["x"])
    with pytest.raises(StoreError, match="the id 1 is not a text"):
        list(iter_captions(numbers))
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(twice.read_bytes()[:-20])
    with pytest.raises(StoreError, match=r"cut\.parquet is not a whole Parquet file"):
        list(iter_captions(cut))
    (tmp_path / "empty.parquet").touch()
    with pytest.raises(StoreError, match="is not a whole Parquet file"):
        list(iter_captions(tmp_path / "empty.parquet"))
