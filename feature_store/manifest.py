"""What the user typed → videos to extract: folders, files, and CSV or JSONL manifests (before planning).

All of these may lie in a bucket (s3://bucket/prefix), and a manifest on either side may name videos on the other.
"""

import csv
import io
import json
import os
import posixpath
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TextIO

from feature_store.plan import PlannedVideo
from feature_store.video_source import in_bucket, s3_address
from vlm_dist.errors import ConfigError

_NAMES = ("mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg", "wmv", "flv", "3gp", "ts", "mts", "ogv")
VIDEO_SUFFIXES = frozenset("." + name for name in _NAMES)
MANIFEST_SUFFIXES = frozenset([".csv", ".jsonl"])
COLUMNS = ("video_id", "path")
_OTHER_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash is what a Path leaves of two


def list_inputs(paths: Sequence[Path | str]) -> list[PlannedVideo]:
    """List the videos of folders, files and manifests, in the order given; a folder's in the order of their names.

    A folder, or what is below a prefix of a bucket, is searched with its sub-folders for files with a video suffix; a
    file's id is its name without suffix. A manifest has the columns video_id and path; a path is an s3:// address, an
    absolute path, or relative to where the manifest lies. A listed video that does not exist is kept, so that
    extraction records it as missing.

    Args:
        paths: local paths and s3://bucket/name; also as a Path, which leaves one slash of the two.

    Raises:
        ConfigError: a folder or manifest without videos, a path that is nothing, or a line that cannot be read.
        StoreUnreachableError: a bucket that is not there, does not answer, or gives no access.
    """
    videos: list[PlannedVideo] = []
    for given in paths:
        if address := s3_address(given):
            videos += _in_bucket(address)
            continue
        path = Path(given)
        suffix = path.suffix.lower()
        if os.path.isdir(path):
            videos += _in_folder(path)
        elif suffix in MANIFEST_SUFFIXES:
            videos += _in_manifest(str(path))
        elif os.path.exists(path) or (suffix in VIDEO_SUFFIXES and not _OTHER_SCHEME.match(str(given))):
            videos.append(PlannedVideo(video_id=path.stem, path=str(path.absolute())))
        else:
            raise ConfigError(
                f"{given}: no such file or folder; give videos, folders of videos, or a .csv/.jsonl list, "
                "each a local path or s3://bucket/name"
            )
    return videos


def _in_folder(folder: Path) -> list[PlannedVideo]:
    found: list[Path] = []
    seen: set[str] = set()  # links to folders are followed, and may lead in circles
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in names if _is_video(name)]
    if not found:
        raise ConfigError(f"{folder}: holds no videos (files ending in {_known()}); name other files one by one")
    return [PlannedVideo(video_id=path.stem, path=str(path.absolute())) for path in sorted(found)]


def _is_video(name: str) -> bool:
    # Hidden files are half-finished downloads and the like.
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def _known() -> str:
    return ", ".join(sorted(VIDEO_SUFFIXES))


def _in_bucket(address: str) -> list[PlannedVideo]:
    """One object, the lines of a manifest, or all videos below a prefix."""
    bucket, key = in_bucket(address)
    suffix = PurePosixPath(key).suffix.lower()
    if suffix in MANIFEST_SUFFIXES:
        return list(_in_manifest(address))
    if suffix in VIDEO_SUFFIXES:
        return [_object(address)]
    found = [name for name in bucket.sizes(key) if _is_visible_video(name.removeprefix(key))]
    if not found and key and bucket.tag(key):
        return [_object(address)]
    if not found:
        raise ConfigError(f"{address}: holds no videos (objects ending in {_known()}); name other objects one by one")
    return [_object(f"{bucket.address}/{name}") for name in sorted(found)]


def _is_visible_video(name: str) -> bool:
    *folders, last = name.strip("/").split("/")
    return _is_video(last) and not any(folder.startswith(".") for folder in folders)


def _object(address: str) -> PlannedVideo:
    return PlannedVideo(video_id=PurePosixPath(address).stem, path=address)


def _in_manifest(manifest: str) -> Iterator[PlannedVideo]:
    """The videos of a manifest at an absolute path or an s3:// address."""
    where = ""
    try:
        with _opened(manifest) as file:
            rows = _csv_rows(manifest, file) if manifest.lower().endswith(".csv") else _jsonl_rows(manifest, file)
            for where, row in rows:
                video_id, path = (_text(where, row, column) for column in COLUMNS)
                yield PlannedVideo(video_id=video_id, path=_resolved(where, manifest, path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{manifest}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not where:
        raise ConfigError(f"{manifest}: lists no video; give a line with video_id and path for each")


@contextmanager
def _opened(manifest: str) -> Generator[TextIO]:
    try:
        if s3_address(manifest):
            bucket, key = in_bucket(manifest)
            yield io.TextIOWrapper(io.BytesIO(bucket.read(key)), encoding="utf-8-sig", newline="")
        else:
            with open(manifest, encoding="utf-8-sig", newline="") as file:
                yield file
    except FileNotFoundError as error:
        raise ConfigError(f"{manifest}: no such manifest") from error
    except OSError as error:
        raise ConfigError(f"{manifest}: cannot be read ({error.strerror})") from error


def _resolved(where: str, manifest: str, path: str) -> str:
    """What a line's path stands for: an absolute path or an s3:// address."""
    if path.startswith("s3:/"):
        try:
            return s3_address(path) or ""
        except ConfigError as error:
            raise ConfigError(f"{where}: column path: {error}") from error
    if "://" in path and _OTHER_SCHEME.match(path):
        raise ConfigError(
            f"{where}: column path: videos are local files or objects at s3://bucket/name, not {path:.60}"
        )
    if not s3_address(manifest) or path.startswith("/"):
        return str((Path(manifest).parent / path).absolute())
    bucket, key = in_bucket(manifest)
    return bucket.address + posixpath.normpath(posixpath.join("/", posixpath.dirname(key), path))


def _text(where: str, row: Mapping[str, object], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ConfigError(f"{where}: column {column} must be a text that is not empty, not {value!r:.60}")
    return value


def _csv_rows(manifest: str, file: TextIO) -> Iterator[tuple[str, Mapping[str, object]]]:
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


def _jsonl_rows(manifest: str, file: TextIO) -> Iterator[tuple[str, Mapping[str, object]]]:
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
