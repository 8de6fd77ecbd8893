"""Annotation files of end tasks → checked arrays (videos → features, annotations → tasks → metrics).

Three forms (reference facts 4.1 and 4.3), each read into numpy arrays and refused with file, line and schema:

* a clip list, one JSON object per line: `{"video_id": "a", "start": 3.0, "end": 9.5, "text": "whisk the eggs",
  "split": "train"}`; without start and end the whole video is meant; split is train, held-out or test;
* MSRVTT_JSFUSION_test.csv: columns key, vid_key, video_id, sentence, separated by commas or semicolons; all test;
* COIN.json (or .json.gz): `{"database": {video_id: {"subset": "training", "annotation": [{"id": "3", "label":
  "whisk", "segment": [3.0, 9.5]}]}}}`; ids count from 1, 0 is the background.
"""

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_dist.errors import TaskDataError

TRAIN, HELD_OUT, TEST = 0, 1, 2
SPLITS = {
    "train": TRAIN, "training": TRAIN, "held-out": HELD_OUT, "val": HELD_OUT, "validation": HELD_OUT,
    "test": TEST, "testing": TEST,
}  # fmt: skip
LIST_SCHEMA = (
    'one JSON object per line: {"video_id": str, "start": seconds, "end": seconds, "text": str, '
    '"split": "train" | "held-out" | "test"}'
)
CSV_SCHEMA = "a header with the columns video_id and sentence, separated by commas or semicolons"
COIN_SCHEMA = (
    '{"database": {video_id: {"subset": "training" | "testing", "annotation": [{"id": "1", "label": str, '
    '"segment": [start s, end s]}]}}}'
)
SHOWN = 5


def refuse(file: Path, problems: Sequence[str], schema: str = "") -> None:
    """Raises TaskDataError with the first few problems of a file; does nothing when there are none."""
    if not problems:
        return
    more = f"\n  … and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    expected = f"\nexpected: {schema}" if schema else ""
    raise TaskDataError(f"{file}:\n  " + "\n  ".join(problems[:SHOWN]) + more + expected)


@dataclass(frozen=True)
class ClipList:
    """Clips with one text each.

    Attributes:
        file: Where they came from.
        video_ids: (N,) ids.
        start: (N,) seconds; NaN for the whole video.
        end: (N,) seconds; NaN for the whole video.
        texts: (N,) captions.
        split: (N,) int8, TRAIN, HELD_OUT or TEST.
        lines: (N,) line numbers in the file.
    """

    file: Path
    video_ids: list[str]
    start: np.ndarray
    end: np.ndarray
    texts: list[str]
    split: np.ndarray
    lines: np.ndarray


@dataclass(frozen=True)
class StepAnnotations:
    """Videos with labelled segments.

    Attributes:
        file: Where they came from.
        video_ids: (V,) ids in the order of the file.
        split: (V,) int8.
        segment_video: (S,) which video each segment belongs to, in file order.
        start: (S,) seconds.
        end: (S,) seconds.
        label: (S,) class ids from 1.
        class_names: Label text by class id; ids that never occur are absent.
    """

    file: Path
    video_ids: list[str]
    split: np.ndarray
    segment_video: np.ndarray
    start: np.ndarray
    end: np.ndarray
    label: np.ndarray
    class_names: dict[int, str]


def read_clip_list(file: Path) -> ClipList:
    """Reads a clip list (.jsonl) or a test list in the form of MSRVTT_JSFUSION_test.csv (.csv).

    Raises:
        TaskDataError: Absent, of another form, or with lines that make no sense (the first few are named).
    """
    _need_file(file, f"a clip list (.jsonl: {LIST_SCHEMA}; or .csv: {CSV_SCHEMA})")
    table = file.suffix.lower() == ".csv"
    records = _csv_records(file) if table else _json_records(file)
    ids: list[str] = []
    texts: list[str] = []
    numbers: list[tuple[float, float, int, int]] = []
    problems: list[str] = []
    for line, record in records:
        try:
            video, text, start, end, split = _clip(record)
        except ValueError as error:
            problems.append(f"line {line}: {error}")
            continue
        ids.append(video)
        texts.append(text)
        numbers.append((start, end, split, line))
    refuse(file, problems, CSV_SCHEMA if table else LIST_SCHEMA)
    if not ids:
        refuse(file, ["no clips in it"], CSV_SCHEMA if table else LIST_SCHEMA)
    columns = np.array(numbers, np.float64)
    return ClipList(
        file, ids, columns[:, 0], columns[:, 1], texts, columns[:, 2].astype(np.int8), columns[:, 3].astype(np.int64)
    )


def _clip(record: dict[str, Any] | str) -> tuple[str, str, float, float, int]:
    if isinstance(record, str):
        raise ValueError(record)
    start, end = record.get("start"), record.get("end")
    if (start is None) != (end is None):
        raise ValueError("start and end come together")
    span = (math.nan, math.nan) if start is None else _span([start, end])
    return _text(record, "video_id"), _text(record, "text"), *span, _split(record, "split")


def _json_records(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                yield number, f"not JSON ({error})"
                continue
            yield number, record if isinstance(record, dict) else "not a JSON object"


def _csv_records(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            header = lines.readline()
            separator = ";" if header.count(";") > header.count(",") else ","
            columns = next(csv.reader([header], delimiter=separator), [])
            if not {"video_id", "sentence"} <= set(columns):
                refuse(file, [f"line 1: columns {', '.join(columns) or 'none'}"], CSV_SCHEMA)
            rows = csv.reader(lines, delimiter=separator)
            for row in rows:
                if len(row) == len(columns):
                    named = dict(zip(columns, row, strict=True))
                    yield rows.line_num + 1, {"video_id": named["video_id"], "text": named["sentence"], "split": "test"}
                elif row:
                    yield rows.line_num + 1, f"{len(row)} fields where the header has {len(columns)}"
    except (UnicodeDecodeError, csv.Error) as error:
        refuse(file, [f"not a text table ({error})"], CSV_SCHEMA)


def read_steps(file: Path) -> StepAnnotations:
    """Reads step annotations in the form of COIN.json, plain or gzipped.

    Raises:
        TaskDataError: Absent, of another form, or with segments that make no sense (the first few are named).
    """
    _need_file(file, f"step annotations in the form of COIN.json: {COIN_SCHEMA}")
    database = _database(file)
    ids, splits = list(database), []
    segments: list[tuple[int, float, float, int]] = []
    names: dict[int, str] = {}
    problems: list[str] = []
    for number, (video, entry) in enumerate(database.items()):
        try:
            splits.append(_split(entry, "subset"))
            annotation = entry.get("annotation")
            if not isinstance(annotation, list):
                raise ValueError("no list `annotation`")
            for step in annotation:
                label = _label(step)
                segments.append((number, *_span(step.get("segment")), label))
                names.setdefault(label, _text(step, "label"))
        except ValueError as error:
            problems.append(f"video {video}: {error}")
    refuse(file, problems, COIN_SCHEMA)
    columns = np.array(segments, np.float64).reshape(-1, 4)
    owner, label = columns[:, 0].astype(np.int64), columns[:, 3].astype(np.int64)
    return StepAnnotations(
        file, ids, np.array(splits, np.int8), owner, columns[:, 1], columns[:, 2], label, dict(sorted(names.items()))
    )


def _database(file: Path) -> dict[str, Any]:
    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one object")
        return table

    try:
        raw = file.read_bytes()
        document = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw, object_pairs_hook=no_twins)
    except (OSError, EOFError, ValueError, zlib.error) as error:  # what gzip, UTF-8 and JSON can raise
        raise TaskDataError(f"{file}: not readable as JSON ({error})\nexpected: {COIN_SCHEMA}") from error
    database = document.get("database") if isinstance(document, dict) else None
    if not isinstance(database, dict) or not database:
        refuse(file, ["no videos under the key `database`"], COIN_SCHEMA)
    assert isinstance(database, dict)
    broken = [f"video {video}: not an object" for video, entry in database.items() if not isinstance(entry, dict)]
    refuse(file, broken, COIN_SCHEMA)
    return database


def _need_file(file: Path, what: str) -> None:
    if not file.is_file():
        found = "is a folder" if file.is_dir() else "is not there"
        raise TaskDataError(f"{file} {found}; this task needs {what}")


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is {value!r}, not a text")
    return value


def _split(record: dict[str, Any], key: str) -> int:
    value = record.get(key)
    if not isinstance(value, str) or value not in SPLITS:
        raise ValueError(f"{key} is {value!r}, not one of {', '.join(SPLITS)}")
    return SPLITS[value]


def _span(value: Any) -> tuple[float, float]:
    numbers = isinstance(value, list) and len(value) == 2 and all(type(v) in (int, float) for v in value)
    if not numbers or not all(math.isfinite(v) for v in value):
        raise ValueError(f"{value!r} is not a start and an end in seconds")
    start, end = float(value[0]), float(value[1])
    if start < 0 or start >= end:
        raise ValueError(f"start {start:g} s must be at least 0 and below the end {end:g} s")
    return start, end


def _label(step: Any) -> int:
    value = step.get("id") if isinstance(step, dict) else None
    try:
        label = int(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else 0
    except ValueError:
        label = 0
    if label < 1:
        raise ValueError(f"label id {value!r} is not a whole number from 1 (0 is the background)")
    return label
