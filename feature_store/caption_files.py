"""Caption files → one video's captions after the other, without holding the file in memory (captions → tokens).

HowTo100M's raw_caption.json is one object of a million videos; it is parsed a value at a time.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

from feature_store.caption_parquet import iter_parquet
from feature_store.files import no_plain_file
from feature_store.pickles import SUFFIXES, PickledArray, as_text, load_pickle, require_allowed
from feature_store.tokenizer import Tokenizer
from vlm_dist.errors import ConfigError, StoreError

_BLOCK = 1 << 20
_CSV_MISSING = ("NaN", "nan")  # as pandas writes what is missing; CSV cannot tell it from the word
_SLACK = 32  # an error this far before the end of what was read is not for lack of the rest, but for an open string
FORMS = (
    'raw_caption.json {"ID": {"start": [s], "end": [s], "text": ["..."]}}, '
    'JSONL lines {"video_id": "ID", "start": [s], "end": [s], "text": ["..."]}, '
    "CSV or Parquet with the columns video_id, start, end, text (Parquet also as `store export` writes it), "
    "or a pickled {ID: as in raw_caption.json, or that as a JSON string}"
)
_TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv")
_PARQUET = ".parquet"


class RawCaptions(NamedTuple):
    """The captions of one video as a file has them: seconds (any JSON value) and text (any JSON value)."""

    video_id: str
    starts: list[Any]
    ends: list[Any]
    texts: list[Any]


def require_caption_file(file: Path, allow_pickle: bool = False) -> None:
    """ConfigError unless the file is there, its ending says what is in it, and it is no pickle or an allowed one."""
    if wrong := no_plain_file(file):
        raise ConfigError(f"caption file {file} {wrong}; give {FORMS}")
    if file.suffix.lower() not in (*_TEXT_SUFFIXES, _PARQUET, *SUFFIXES):
        raise ConfigError(f"caption file {file}: the ending {file.suffix!r} is not known; give {FORMS}")
    if file.suffix.lower() in SUFFIXES:
        require_allowed(file, allow_pickle)


def iter_captions(file: Path, allow_pickle: bool = False, tokenizer: Tokenizer | None = None) -> Iterator[RawCaptions]:
    """Every video of a caption file (.json, .jsonl, .csv, .parquet or .pkl), in the file's order.

    Args:
        file: HowTo100M's raw_caption.json, one of the other forms of `FORMS`, or one of HowTo100M's pickles.
        allow_pickle: open a pickle, restricted to data; it is in memory whole.
        tokenizer: whose word pieces the ids of a pickle are that holds no text (`cap`).

    Raises:
        ConfigError: no such file, an ending that says nothing, or a pickle that is not allowed or needs a tokenizer.
        StoreError: the content does not have the form; names the video or the line.
    """
    require_caption_file(file, allow_pickle)
    if file.suffix.lower() in SUFFIXES:
        yield from _iter_pickle(file, load_pickle(file, allow_pickle), tokenizer)
        return
    seen: set[str] = set()
    for captions in _iter_parquet(file) if file.suffix.lower() == _PARQUET else _iter_text(file):
        if captions.video_id in seen:
            raise StoreError(
                f"{file}: video {captions.video_id} occurs twice; put its captions together "
                "(a table sorted by video_id does that)"
            )
        seen.add(captions.video_id)
        yield captions


def _iter_parquet(file: Path) -> Iterator[RawCaptions]:
    return (RawCaptions(*video) for video in iter_parquet(file))


def _iter_text(file: Path) -> Iterator[RawCaptions]:
    reader = {".json": _iter_json, ".csv": _iter_csv}.get(file.suffix.lower(), _iter_jsonl)
    with file.open(encoding="utf-8-sig", newline="") as text:
        try:
            yield from reader(file, text)
        except UnicodeDecodeError as error:
            raise StoreError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None


def _iter_json(file: Path, text: TextIO) -> Iterator[RawCaptions]:
    decoder = json.JSONDecoder()
    buffer, at, last = "", 0, "the beginning"

    def peek() -> str:
        """The next character that is no space; empty at the end of the file."""
        nonlocal buffer, at
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n":
                at += 1
            if at < len(buffer):
                return buffer[at]
            buffer, at = text.read(_BLOCK), 0
            if not buffer:
                return ""

    def mark(wanted: str) -> str:
        """The next punctuation mark, which must be one of `wanted`."""
        nonlocal at
        found = peek()
        if not found or found not in wanted:
            raise _bad_json(file, f"{' or '.join(wanted)} after {last}", None)
        at += 1
        return found

    def parse(what: str) -> Any:
        """The next JSON value; reads on while it may merely be cut off where the buffer ends."""
        nonlocal buffer, at
        peek()
        block = _BLOCK
        while True:
            error, open_string = None, False
            try:
                value, end = decoder.raw_decode(buffer, at)
                if end < len(buffer):  # a number at the very end may go on
                    at = end
                    return value
            except json.JSONDecodeError as failure:
                error, open_string = failure, failure.msg.startswith("Unterminated string")
            except (ValueError, RecursionError) as failure:  # a number of thousands of digits, thousands of brackets
                raise _bad_json(file, f"{what} after {last}", failure) from None
            more = text.read(block) if error is None or open_string or error.pos > len(buffer) - _SLACK else ""
            if not more:
                raise _bad_json(file, f"{what} after {last}", error)
            buffer, at, block = buffer[at:] + more, 0, block * 2

    mark("{")
    after = mark("}") if peek() == "}" else ","
    while after == ",":
        video_id = parse("video id")
        mark(":")
        value = parse(f"captions of video {video_id}")
        if video_id == "video_id" and isinstance(value, str):
            raise StoreError(f"{file} has one object per line: name it .jsonl")
        last = f"video {video_id}"
        yield _checked(file, str(video_id), value)
        after = mark(",}")
        if at > _BLOCK:
            buffer, at = buffer[at:], 0
    if peek():
        raise StoreError(f"{file} goes on after its closing brace; if it has one object per line, name it .jsonl")


def _iter_jsonl(file: Path, text: TextIO) -> Iterator[RawCaptions]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{file}, line {number} is not JSON ({error}); each line must be one object") from None
        video_id = cast("dict[str, Any]", value).get("video_id") if isinstance(value, dict) else None
        if not isinstance(video_id, str):
            raise StoreError(f"{file}, line {number} has no video_id; give {FORMS}")
        yield _checked(file, video_id, value)


def _iter_csv(file: Path, text: TextIO) -> Iterator[RawCaptions]:
    rows = csv.DictReader(text, strict=True)
    current: RawCaptions | None = None
    try:
        missing = {"video_id", "start", "end", "text"} - set(rows.fieldnames or ())
        if missing:
            raise StoreError(
                f"{file} has no column {', '.join(sorted(missing))}; its first line must name the columns, "
                "separated by commas"
            )
        for row in rows:
            if None in row or None in row.values():
                what = "more" if None in row else "fewer"
                raise StoreError(
                    f"{file}, line {rows.line_num} has {what} fields than columns; quote texts with commas"
                )
            if current is None or row["video_id"] != current.video_id:
                if current:
                    yield current
                current = RawCaptions(row["video_id"], [], [], [])
            current.starts.append(row["start"])
            current.ends.append(row["end"])
            current.texts.append(None if row["text"].strip() in _CSV_MISSING else row["text"])
    except csv.Error as error:
        line = rows.reader.line_num
        raise StoreError(f"{file}, line {line}: {error}; quote texts that hold commas or quotes") from None
    if current:
        yield current


def _iter_pickle(file: Path, content: object, tokenizer: Tokenizer | None) -> Iterator[RawCaptions]:
    """The reference's pickles: captions as a JSON string or an object, or with word-piece ids in place of texts."""
    if not isinstance(content, dict):
        raise StoreError(f"{file} holds a {type(content).__name__}; give {FORMS}")
    for key, value in cast("dict[object, object]", content).items():
        video_id = as_text(key)
        if video_id is None:
            raise StoreError(f"{file} has the key {key!r}; the keys must be video ids")
        text = as_text(value)
        if text is not None:
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise StoreError(f"{file}: the captions of video {video_id} are not JSON ({error.msg})") from None
        elif isinstance(value, dict):
            value = {as_text(name): _plain(part) for name, part in cast("dict[object, object]", value).items()}
            if "cap" in value and "text" not in value:
                value["text"] = _texts_of_ids(file, video_id, value["cap"], tokenizer)
        yield _checked(file, video_id, value)


def _plain(value: object) -> object:
    """A list of Python values where it is an array; its strings of Python 2 as text."""
    if isinstance(value, PickledArray):
        value = value.values()
    if isinstance(value, list):
        return [as_text(part) if isinstance(part, bytes) else part for part in cast("list[object]", value)]
    return value


def _texts_of_ids(file: Path, video_id: str, captions: object, tokenizer: Tokenizer | None) -> list[str]:
    """Words of word-piece ids: cut again by the same tokenizer they give the same ids; unknown words are left out."""
    if tokenizer is None:
        raise ConfigError(f"{file} holds word-piece ids: give the tokenizer that made them, like bert-base-uncased")
    pieces = tokenizer.pieces
    texts: list[str] = []
    for ids in cast("list[object]", captions) if isinstance(captions, list) else ():
        numbers = ids.values() if isinstance(ids, PickledArray) else ids
        if not isinstance(numbers, list) or not all(
            isinstance(n, int) and 0 <= n < len(pieces) for n in cast("list[object]", numbers)
        ):
            raise StoreError(
                f"{file}: a caption of video {video_id} is not ids below {len(pieces)}, the tokenizer's pieces"
            )
        known = (pieces[number] for number in cast("list[int]", numbers) if number != tokenizer.unk_id)
        texts.append(" ".join(known).replace(" ##", ""))
    return texts


def _checked(file: Path, video_id: str, value: Any) -> RawCaptions:
    """Three lists of one length, or an error that names the video."""
    if not isinstance(value, dict):
        raise StoreError(f"{file}: the captions of video {video_id} are not an object with start, end and text")
    entry = cast("dict[str, Any]", value)
    for key in ("start", "end", "text"):
        if not isinstance(entry.get(key), list):
            raise StoreError(f"{file}: the captions of video {video_id} have no list {key!r}; give {FORMS}")
    starts, ends, texts = entry["start"], entry["end"], entry["text"]
    if not len(starts) == len(ends) == len(texts):
        raise StoreError(
            f"{file}: video {video_id} has {len(starts)} starts, {len(ends)} ends and {len(texts)} texts; "
            "give as many of each"
        )
    return RawCaptions(video_id, starts, ends, texts)


def _bad_json(file: Path, wanted: str, error: Exception | None) -> StoreError:
    detail = f" ({getattr(error, 'msg', error)})" if error else ""
    return StoreError(f"{file} is not the JSON that is expected: no {wanted}{detail}. Give {FORMS}")
