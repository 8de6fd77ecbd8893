"""Captions in a Parquet table, a row each → one video's after the other (captions → tokens): see caption_files.py.

`store export` writes such a table, so that captions come back as they went out.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from vlm_dist.errors import StoreError

_FORMS = (("id", "start_ms", "end_ms", "text"), ("video_id", "start", "end", "text"))
_ROWS = 1 << 16  # in memory at a time


def iter_parquet(file: Path) -> Iterator[tuple[str, list[Any], list[Any], list[Any]]]:
    """Id, starts and ends in seconds, and texts of every video; the rows of a video lie together.

    Raises:
        StoreError: no Parquet, or without the columns id, start_ms, end_ms, text or video_id, start, end, text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            columns = _columns(file, table.schema_arrow.names)
            scale = 1000 if columns == _FORMS[0] else 1
            for video_id, rows in groupby(_rows(table, columns), key=lambda row: row[0]):
                if not isinstance(video_id, str):
                    raise StoreError(f"{file}: the id {video_id!r} is not a text")
                _, starts, ends, texts = zip(*rows, strict=True)
                yield video_id, [_seconds(t, scale) for t in starts], [_seconds(t, scale) for t in ends], list(texts)
    except (pa.ArrowInvalid, OSError) as error:
        raise StoreError(f"{file} is not a whole Parquet file: {error}") from None


def _columns(file: Path, names: list[str]) -> tuple[str, ...]:
    for columns in _FORMS:
        if set(columns) <= set(names):
            return columns
    wanted = " or ".join(", ".join(columns) for columns in _FORMS)
    raise StoreError(f"{file} has the columns {', '.join(names) or 'of nothing'}; captions need {wanted}")


def _rows(table: Any, columns: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    for batch in table.iter_batches(_ROWS, columns=list(columns)):
        yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def _seconds(time: Any, scale: int) -> Any:
    return time / scale if isinstance(time, (int, float)) else time
