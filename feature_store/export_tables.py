"""Index snapshot → Parquet: a table of videos and a table of captions, for pandas, DuckDB, Spark (index → files).

Columns go from the memory-mapped index to Arrow without a Python object per caption, one row group after another.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false, reportUnknownParameterType=false
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.export import ExportSummary, open_export, published
from feature_store.index import StoreIndex
from feature_store.storage import Root

GROUP = 1 << 16  # captions (or videos) of one row group, about
_SOURCE = b"vlm_dist.snapshot"

VIDEOS = pa.schema(
    [
        ("id", pa.string()),
        ("shard", pa.uint32()),
        ("row", pa.uint32()),
        ("n_rows", pa.uint32()),
        ("crc32c", pa.uint32()),
        ("captions", pa.uint32()),
        ("tokens", pa.uint32()),
    ]
)


def clips_schema(token_type: str) -> pa.Schema:
    """Columns of clips.parquet; token ids are uint16 or uint32, as the store has them."""
    tokens = pa.list_(pa.uint16() if token_type == "uint16" else pa.uint32())
    times = [("start_ms", pa.uint32()), ("end_ms", pa.uint32())]
    return pa.schema([("id", pa.string()), *times, ("text", pa.string()), ("tokens", tokens)])


def export_parquet(root: Root, folder: Path, on_progress: Callable[[int], None] = lambda done: None) -> ExportSummary:
    """Writes videos.parquet, clips.parquet and splits/NAME.jsonl of the store's snapshot; keeps what is there already.

    Args:
        root: the store.
        folder: new, empty, or of an earlier export of this store.
        on_progress: called with the number of videos whose rows are written, of both tables together.

    Raises:
        StoreError: no store, damaged captions (the video is named), another folder's content, a full disk.
    """
    index = StoreIndex(root)
    index.check_columns()
    open_export(folder, index)
    tables = {
        "videos.parquet": (VIDEOS, _video_groups(index)),
        "clips.parquet": (clips_schema(index.tokens.dtype.name), _clip_groups(index)),
    }
    written = kept = size = done = 0
    for name, (schema, groups) in tables.items():
        path = folder / name
        described = schema.with_metadata({_SOURCE: f"{index.name} {index.fingerprint}".encode()})
        if _source(path) == described.metadata[_SOURCE]:
            kept, done = kept + 1, done + index.num_videos
            on_progress(done)
            continue
        with published(path) as temporary:
            with pq.ParquetWriter(temporary, described) as writer:
                for table, videos in groups:
                    writer.write_table(table.replace_schema_metadata(described.metadata), row_group_size=2 * GROUP)
                    done += videos
                    on_progress(done)
            size += temporary.stat().st_size
        written += 1
    splits = _export_splits(index, folder / "splits")
    return ExportSummary(written + splits.written, kept + splits.kept, size + splits.bytes)


def _export_splits(index: StoreIndex, folder: Path) -> ExportSummary:
    """A file of ids for each split, as `store split NAME --videos FILE` takes it."""
    written = kept = size = 0
    for name in index.splits:
        lines = (json.dumps({"video_id": video_id.decode()}) + "\n" for video_id in index.split_ids(name))
        path, data = folder / f"{name}.jsonl", "".join(lines).encode()
        if path.exists() and path.read_bytes() == data:
            kept += 1
            continue
        with published(path, len(data)) as temporary:
            temporary.write_bytes(data)
        written, size = written + 1, size + len(data)
    return ExportSummary(written, kept, size)


def _source(path: Path) -> bytes:
    """The snapshot that a table is of; empty where there is none, or half of one (its schema is written last)."""
    try:
        return pq.read_schema(path).metadata.get(_SOURCE, b"")
    except (FileNotFoundError, AttributeError, pa.ArrowInvalid):
        return b""


def _video_groups(index: StoreIndex) -> Iterator[tuple[pa.Table, int]]:
    for first in range(0, index.num_videos, GROUP):
        part = slice(first, min(first + GROUP, index.num_videos))
        columns = [index.shard[part], index.row[part], index.n_rows[part], index.crc32c[part]]
        counts = [np.diff(ptr[first : part.stop + 1]).astype(np.uint32) for ptr in (index.clip_ptr, index.tok_ptr)]
        ids = [index.video_id(video) for video in range(part.start, part.stop)]
        yield pa.table([pa.array(ids, pa.string()), *(pa.array(c) for c in (*columns, *counts))], VIDEOS), len(ids)


def _clip_groups(index: StoreIndex) -> Iterator[tuple[pa.Table, int]]:
    """Whole videos with about GROUP captions together."""
    schema, captions = clips_schema(index.tokens.dtype.name), index.captions
    first = 0
    while first < index.num_videos:
        full = int(np.searchsorted(index.clip_ptr, index.clip_ptr[first] + GROUP, "right")) - 1
        last = min(max(full, first + 1), first + GROUP, index.num_videos)
        for video in range(first, last):
            index.check_captions(video)
        clips = slice(int(index.clip_ptr[first]), int(index.clip_ptr[last]))
        tokens = slice(int(index.tok_ptr[first]), int(index.tok_ptr[last]))
        text = slice(int(captions.text_ptr[first]), int(captions.text_ptr[last]))
        ids = pa.array([index.video_id(video) for video in range(first, last)], pa.string())
        of_clip = np.repeat(np.arange(last - first), np.diff(index.clip_ptr[first : last + 1]))
        token_type = schema.field("tokens").type
        columns = [
            ids.take(pa.array(of_clip)),
            pa.array(index.clip_start_ms[clips]),
            pa.array(index.clip_end_ms[clips]),
            pa.StringArray.from_buffers(
                len(of_clip),
                pa.py_buffer(_offsets(captions.clip_ntext[clips])),
                pa.py_buffer(np.ascontiguousarray(captions.text[text])),
            ),
            pa.ListArray.from_arrays(
                pa.array(_offsets(index.clip_ntok[clips])),
                pa.array(index.tokens[tokens]),
                type=token_type,
            ),
        ]
        yield pa.table(columns, schema), last - first
        first = last


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """(n + 1,) int32 ends of pieces of these lengths, from 0."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
