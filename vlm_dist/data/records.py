"""Lists of video ids and task annotations as text → records: endings, gzip and splits, the same for every reader.

    .lst .txt        one video id per line
    .csv             a table with a header (commas or semicolons) and the column video_id
    .jsonl .ndjson   one JSON object per line, with the key video_id
    .json            one object in the form of COIN.json: {"database": {video_id: {"subset": …}}}

Each may be gzipped, with or without a further `.gz`, and begin with a byte order mark.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_dist.errors import TaskDataError

TRAIN, HELD_OUT, TEST = 0, 1, 2
SPLITS = {
    "train": TRAIN, "training": TRAIN, "held-out": HELD_OUT, "val": HELD_OUT, "validation": HELD_OUT,
    "test": TEST, "testing": TEST,
}  # fmt: skip
LINES, TABLE, DOCUMENT, IDS = ".jsonl", ".csv", ".json", ".lst"
_FORMS = {".jsonl": LINES, ".ndjson": LINES, ".csv": TABLE, ".json": DOCUMENT, ".lst": IDS, ".txt": IDS}
SHOWN = 5


def refuse(file: Path, problems: Sequence[str], schema: str = "") -> None:
    """Raises TaskDataError with the first few problems of a file; does nothing when there are none."""
    if not problems:
        return
    more = f"\n  … and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    expected = f"\nexpected: {schema}" if schema else ""
    raise TaskDataError(f"{file}:\n  " + "\n  ".join(problems[:SHOWN]) + more + expected)


def form_of(file: Path) -> str:
    """LINES, TABLE, DOCUMENT or IDS, by the file's ending. Errors: TaskDataError for another one."""
    name = file.with_suffix("") if file.suffix.lower() == ".gz" else file
    form = _FORMS.get(name.suffix.lower())
    if form is None:
        raise TaskDataError(f"{file}: the ending {name.suffix!r} is not known; name it {', '.join(_FORMS)} (or ….gz)")
    return form


def read_text(file: Path, schema: str) -> str:
    """The whole text of a file, unpacked where it is gzipped. Errors: TaskDataError that says what is expected."""
    if not file.is_file():
        raise TaskDataError(f"{file} {'is a folder' if file.is_dir() else 'is not there'}; it should hold {schema}")
    try:
        raw = file.read_bytes()
        return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:  # what a cut or damaged gzip file can raise
        raise TaskDataError(f"{file} cannot be read: {error}\nexpected: {schema}") from error
    except UnicodeDecodeError as error:
        raise TaskDataError(f"{file} is no UTF-8 text ({error})\nexpected: {schema}") from error


def iter_rows(file: Path, schema: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line number and record of a table or of JSON lines; a text in the record's place says what is wrong with it.

    Args:
        file: of form TABLE or LINES.
        schema: for messages.
        columns: that a table must have.

    Raises:
        TaskDataError: the file cannot be read, or a table lacks a column.
    """
    text = read_text(file, schema)
    return _table(file, text, schema, columns) if form_of(file) == TABLE else _lines(text)


def _lines(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand in a caption
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, f"not JSON ({error})"
            continue
        yield number, record if isinstance(record, dict) else "not a JSON object"


def _table(file: Path, text: str, schema: str, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    header, _, body = text.partition("\n")
    separator = ";" if header.count(";") > header.count(",") else ","
    columns = next(csv.reader([header], delimiter=separator), [])
    if not set(needed) <= set(columns):
        refuse(file, [f"line 1: columns {', '.join(columns) or 'none'}"], schema)
    rows = csv.reader(io.StringIO(body, newline=""), delimiter=separator)
    try:
        for row in rows:
            if len(row) == len(columns):
                yield rows.line_num + 1, dict(zip(columns, row, strict=True))
            elif row:
                yield rows.line_num + 1, f"{len(row)} fields where the header has {len(columns)}"
    except csv.Error as error:
        refuse(file, [f"line {rows.line_num + 1}: not a text table ({error})"], schema)


def read_database(file: Path, schema: str) -> dict[str, dict[str, Any]]:
    """Entry by video id of a file in the form of COIN.json.

    Raises:
        TaskDataError: not JSON, a key twice in one object, no videos, or an entry that is no object.
    """

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one object")
        return table

    text = read_text(file, schema)
    try:
        document = json.loads(text, object_pairs_hook=no_twins)
    except ValueError as error:
        raise TaskDataError(f"{file}: not readable as JSON ({error})\nexpected: {schema}") from error
    database = document.get("database") if isinstance(document, dict) else None
    if not isinstance(database, dict) or not database:
        raise TaskDataError(f"{file}: no videos under the key `database`\nexpected: {schema}")
    refuse(file, [f"video {video}: not an object" for video, e in database.items() if not isinstance(e, dict)], schema)
    return database


def text_of(record: dict[str, Any], key: str) -> str:
    """A text that is not empty. Errors: ValueError that names the key."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is {value!r}, not a text")
    return value


def split_of(value: Any) -> int | None:
    """TRAIN, HELD_OUT or TEST; None for anything else than their names."""
    return SPLITS.get(value.strip().lower()) if isinstance(value, str) else None
