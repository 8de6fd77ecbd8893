"""What the user typed → videos to extract: folders, files, and CSV or JSONL manifests (before planning)."""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from feature_store.plan import PlannedVideo
from vlm_dist.errors import ConfigError

_NAMES = ("mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg", "wmv", "flv", "3gp", "ts", "mts", "ogv")
VIDEO_SUFFIXES = frozenset("." + name for name in _NAMES)
MANIFEST_SUFFIXES = frozenset([".csv", ".jsonl"])
COLUMNS = ("video_id", "path")


def list_inputs(paths: Sequence[Path | str]) -> list[PlannedVideo]:
    """List the videos of folders, files and manifests, in the order given; a folder's in the order of their names.

    A folder is searched with its sub-folders for files with a video suffix; a file's id is its name without suffix.
    A manifest has the columns video_id and path; relative paths start at the manifest's folder. A listed video that
    does not exist is kept, so that extraction records it as missing.

    Raises:
        ConfigError: a folder or manifest without videos, a path that is nothing, or a line that cannot be read.
    """
    videos: list[PlannedVideo] = []
    for path in map(Path, paths):
        suffix = path.suffix.lower()
        if path.is_dir():
            videos += _in_folder(path)
        elif suffix in MANIFEST_SUFFIXES:
            videos += _in_manifest(path)
        elif path.exists() or suffix in VIDEO_SUFFIXES:
            videos.append(PlannedVideo(video_id=path.stem, path=str(path.absolute())))
        else:
            raise ConfigError(f"{path}: no such file or folder; give videos, folders of videos, or a .csv/.jsonl list")
    return videos


def _in_folder(folder: Path) -> list[PlannedVideo]:
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in names if _is_video(name)]
    if not found:
        known = ", ".join(sorted(VIDEO_SUFFIXES))
        raise ConfigError(f"{folder}: holds no videos (files ending in {known}); name other files one by one")
    return [PlannedVideo(video_id=path.stem, path=str(path.absolute())) for path in sorted(found)]


def _is_video(name: str) -> bool:
    # Hidden files are half-finished downloads and the like.
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def _in_manifest(manifest: Path) -> Iterator[PlannedVideo]:
    if not manifest.is_file():
        raise ConfigError(f"{manifest}: no such manifest")
    rows = _csv_rows(manifest) if manifest.suffix.lower() == ".csv" else _jsonl_rows(manifest)
    where = ""
    try:
        for where, row in rows:
            video_id, path = (_text(where, row, column) for column in COLUMNS)
            yield PlannedVideo(video_id=video_id, path=str((manifest.parent / path).absolute()))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{manifest}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not where:
        raise ConfigError(f"{manifest}: lists no video; give a line with video_id and path for each")


def _text(where: str, row: Mapping[str, object], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ConfigError(f"{where}: column {column} must be a text that is not empty, not {value!r:.60}")
    return value


def _csv_rows(manifest: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    with manifest.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            header = reader.fieldnames or []
            missing = [column for column in COLUMNS if column not in header]
            if missing:
                have = ", ".join(header) or "nothing"
                raise ConfigError(f"{manifest}: line 1 must name the columns video_id and path; it has {have}")
            for row in reader:
                where = f"{manifest}: line {reader.line_num}"
                if None in row:
                    raise ConfigError(f"{where}: more fields than columns; quote a path that holds a comma")
                yield where, row
        except csv.Error as error:
            raise ConfigError(f"{manifest}: line {reader.reader.line_num}: {error}") from error


def _jsonl_rows(manifest: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    with manifest.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{manifest}: line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{where}: no JSON ({error})") from error
            if not isinstance(row, dict):
                raise ConfigError(f'{where}: must be an object such as {{"video_id": "a", "path": "a.mp4"}}')
            yield where, row
