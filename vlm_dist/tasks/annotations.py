"""Annotation files of end tasks → checked arrays (videos → features, annotations → tasks → metrics).

Three forms (reference facts 4.1 and 4.3), each read into numpy arrays and refused with file, line and schema:

* a clip list, one JSON object per line: `{"video_id": "a", "start": 3.0, "end": 9.5, "text": "whisk the eggs",
  "split": "train"}`; without start and end the whole video is meant; split is train, held-out or test;
* MSRVTT_JSFUSION_test.csv: columns key, vid_key, video_id, sentence, separated by commas or semicolons; all test, but
  where there is a column split;
* COIN.json: `{"database": {video_id: {"subset": "training", "annotation": [{"id": "3", "label": "whisk", "segment":
  [3.0, 9.5]}]}}}`; ids count from 1, 0 is the background.

Endings, gzip and encoding: see `data.records`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_dist.data.records import (
    DOCUMENT,
    LINES,
    SPLITS,
    TABLE,
    form_of,
    iter_rows,
    read_database,
    refuse,
    split_of,
    text_of,
)
from vlm_dist.errors import TaskDataError

LIST_SCHEMA = (
    'one JSON object per line: {"video_id": str, "start": seconds, "end": seconds, "text": str, '
    '"split": "train" | "held-out" | "test"}'
)
CSV_SCHEMA = "a header with the columns video_id and sentence, separated by commas or semicolons"
COIN_SCHEMA = (
    '{"database": {video_id: {"subset": "training" | "testing", "annotation": [{"id": "1", "label": str, '
    '"segment": [start s, end s]}]}}}'
)


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
    _need_form(file, f"a clip list (.jsonl: {LIST_SCHEMA}; or .csv: {CSV_SCHEMA})", LINES, TABLE)
    table = form_of(file) == TABLE
    schema = CSV_SCHEMA if table else LIST_SCHEMA
    ids: list[str] = []
    texts: list[str] = []
    numbers: list[tuple[float, float, int, int]] = []
    problems: list[str] = []
    for line, record in iter_rows(file, schema, ("video_id", "sentence")):
        try:
            if isinstance(record, str):
                raise ValueError(record)
            if table:
                record = {"split": "test", **record, "text": record["sentence"], "start": None, "end": None}
            video, text, start, end, split = _clip(record)
        except ValueError as error:
            problems.append(f"line {line}: {error}")
            continue
        ids.append(video)
        texts.append(text)
        numbers.append((start, end, split, line))
    refuse(file, problems, schema)
    if not ids:
        refuse(file, ["no clips in it"], schema)
    columns = np.array(numbers, np.float64)
    return ClipList(
        file, ids, columns[:, 0], columns[:, 1], texts, columns[:, 2].astype(np.int8), columns[:, 3].astype(np.int64)
    )


def _clip(record: dict[str, Any]) -> tuple[str, str, float, float, int]:
    start, end = record.get("start"), record.get("end")
    if (start is None) != (end is None):
        raise ValueError("start and end come together")
    span = (math.nan, math.nan) if start is None else _span([start, end])
    return text_of(record, "video_id"), text_of(record, "text"), *span, _split(record, "split")


def read_steps(file: Path) -> StepAnnotations:
    """Reads step annotations in the form of COIN.json.

    Raises:
        TaskDataError: Absent, of another form, or with segments that make no sense (the first few are named).
    """
    _need_form(file, f"step annotations in the form of COIN.json: {COIN_SCHEMA}", DOCUMENT)
    database = read_database(file, COIN_SCHEMA)
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
                names.setdefault(label, text_of(step, "label"))
        except ValueError as error:
            problems.append(f"video {video}: {error}")
    refuse(file, problems, COIN_SCHEMA)
    columns = np.array(segments, np.float64).reshape(-1, 4)
    owner, label = columns[:, 0].astype(np.int64), columns[:, 3].astype(np.int64)
    return StepAnnotations(
        file, ids, np.array(splits, np.int8), owner, columns[:, 1], columns[:, 2], label, dict(sorted(names.items()))
    )


def _need_form(file: Path, what: str, *forms: str) -> None:
    if not file.is_file():
        found = "is a folder" if file.is_dir() else "is not there"
        raise TaskDataError(f"{file} {found}; this task needs {what}")
    if form_of(file) not in forms:
        raise TaskDataError(f"{file}: a file of this ending holds something else; this task needs {what}")


def _split(record: dict[str, Any], key: str) -> int:
    split = split_of(record.get(key))
    if split is None:
        raise ValueError(f"{key} is {record.get(key)!r}, not one of {', '.join(SPLITS)}")
    return split


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
