"""The commit records, the one truth about what a store holds, and rolling them forward (videos → features).

Life of a shard: staged in `_staging/K.ATTEMPT/shard`, committed by the exclusive creation of `_commits/K.json`,
published by renaming the staged file to `features/c/K/0`. A kill between the last two steps is mended by anyone who
reads the record: the rename is idempotent. Two attempts at one shard can both be staged, never both committed.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from feature_store.files import create_exclusive, disk_guard, fsync_dir, seal, unseal
from feature_store.layout import StoreMeta
from feature_store.records import VideoRecord
from feature_store.shard import REPAIR
from vlm_dist.errors import StoreError

_RECORD = re.compile(r"(\d{6,})\.json")
_ATTEMPT = re.compile(r"(\d{6,})\.([0-9a-f]{32})")


class Commit(BaseModel):
    """One shard's record."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: int
    attempt: str = Field(description="The attempt whose staged file this is.")
    size: int = Field(description="Bytes of the shard file; 0 where no video of it has features and there is no file.")
    crc32c: int = Field(description="CRC-32C of the shard file.")
    rows: int = Field(description="Rows that are filled.")
    videos: tuple[VideoRecord, ...]


def commit_path(meta: StoreMeta, shard: int) -> Path:
    """Where the record of a shard is."""
    return meta.commits / f"{shard:06d}.json"


def staging_path(meta: StoreMeta, shard: int, attempt: str) -> Path:
    """The folder of one attempt at a shard."""
    return meta.staging / f"{shard:06d}.{attempt}"


def create_record(meta: StoreMeta, commit: Commit) -> bool:
    """The commit point: True if this attempt's record is now the shard's, False if another's was there first."""
    body = commit.model_dump(mode="json", exclude_defaults=True)
    scratch = staging_path(meta, commit.shard, commit.attempt)
    return create_exclusive(commit_path(meta, commit.shard), seal(body), scratch)


def read_commit(meta: StoreMeta, shard: int) -> Commit:
    """Reads one record.

    Raises:
        FileNotFoundError: the shard is not committed.
        StoreError: the record is damaged.
    """
    path = commit_path(meta, shard)
    body = unseal(path)
    try:
        commit = Commit.model_validate(body)
    except ValidationError as error:
        raise StoreError(f"{path} is not a commit record that this version understands: {error}") from error
    if commit.shard != shard:
        raise StoreError(f"{path} is the record of shard {commit.shard}: a file was copied or renamed. {REPAIR}")
    return commit


def committed_shards(meta: StoreMeta) -> list[int]:
    """Numbers of the committed shards, ascending: one listing, no file is read."""
    matches = (_RECORD.fullmatch(path.name) for path in meta.commits.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def iter_commits(meta: StoreMeta) -> Iterator[Commit]:
    """All records by shard number, one in memory at a time."""
    for shard in committed_shards(meta):
        yield read_commit(meta, shard)


def roll_forward(meta: StoreMeta, commit: Commit) -> bool:
    """Makes sure that a committed shard is published; True if this call did it.

    Raises:
        StoreError: the shard's file is neither published nor staged, or has another size than was committed.
    """
    if commit.size == 0:
        return False
    final = meta.shard_path(commit.shard)
    staged = staging_path(meta, commit.shard, commit.attempt) / "shard"
    published = False
    if staged.exists():
        with disk_guard(final, 4096):
            final.parent.mkdir(parents=True, exist_ok=True)
        try:
            staged.replace(final)
            published = True
        except FileNotFoundError:  # someone else rolled it forward just now
            pass
        for folder in (final.parent, final.parent.parent, final.parent.parent.parent):
            fsync_dir(folder)
        shutil.rmtree(staged.parent, ignore_errors=True)
    try:
        size = final.stat().st_size
    except FileNotFoundError:
        raise StoreError(f"shard {commit.shard} is committed, but its file {final} is missing. {REPAIR}") from None
    if size != commit.size:
        raise StoreError(f"shard {commit.shard}: {final} has {size:,} bytes, {commit.size:,} were committed. {REPAIR}")
    return published


def void(meta: StoreMeta, shard: int) -> None:
    """Takes a shard's file and record out, aside to `_voided`, so that the plan gives its videos out again."""
    record, data = commit_path(meta, shard), meta.shard_path(shard)
    number = len(list(meta.voided.glob(f"{record.stem}.*.json")))
    for path, ending in ((data, "shard"), (record, "json")):  # data first: a record without data is voided again
        if path.exists():
            path.replace(meta.voided / f"{record.stem}.{number}.{ending}")
            fsync_dir(path.parent)
    fsync_dir(meta.voided)


def staged_attempts(meta: StoreMeta) -> Iterator[tuple[int, str, Path]]:
    """(shard, attempt, folder) of everything staged."""
    for path in sorted(meta.staging.iterdir()):
        if match := _ATTEMPT.fullmatch(path.name):
            yield int(match[1]), match[2], path


def sweep_staging(meta: StoreMeta) -> None:
    """Deletes staged attempts at committed shards: losers can never win any more, winners are published."""
    committed = set(committed_shards(meta))
    for shard, attempt, folder in staged_attempts(meta):
        if shard not in committed:
            continue  # perhaps at work
        commit = read_commit(meta, shard)
        if commit.attempt == attempt:
            roll_forward(meta, commit)
        shutil.rmtree(folder, ignore_errors=True)
