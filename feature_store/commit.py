"""The commit records, the one truth about what a store holds, and rolling them forward (videos → features).

Life of a shard: staged as `_staging/K.ATTEMPT/shard`, committed by the exclusive creation of `_commits/K.json`,
published by moving what is staged to `features/c/K/0`. A kill between the last two steps is mended by anyone who reads
the record: the move is idempotent. Two attempts at one shard can both be staged, never both committed.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

from feature_store.files import SCRATCH, seal, unseal_as
from feature_store.layout import COMMITS, StoreMeta, aside_key, shard_key
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
    origin: str = Field(default="", description="`Provenance.digest` of the features; empty in old records.")
    videos: tuple[VideoRecord, ...]


def commit_key(shard: int) -> str:
    """Where the record of a shard is."""
    return f"{COMMITS}/{shard:06d}.json"


def staging_name(shard: int, attempt: str) -> str:
    """The folder of one attempt at a shard, below `_staging`."""
    return f"{shard:06d}.{attempt}"


def staged_key(shard: int, attempt: str) -> str:
    """The staged object of one attempt at a shard."""
    return f"{SCRATCH}/{staging_name(shard, attempt)}/shard"


def create_record(meta: StoreMeta, commit: Commit) -> bool:
    """The commit point: True if this attempt's record is now the shard's, False if another's was there first.

    Raises:
        FileNotFoundError: what was staged is not there any more (another attempt won, and it was swept).
    """
    guard = staged_key(commit.shard, commit.attempt)
    return meta.storage.create(commit_key(commit.shard), _sealed(commit), guard)


def read_commit(meta: StoreMeta, shard: int) -> Commit:
    """Reads one record.

    Raises:
        FileNotFoundError: the shard is not committed.
        StoreError: the record is damaged.
    """
    return _parse(meta, shard, meta.storage.read(commit_key(shard)))


def _parse(meta: StoreMeta, shard: int, data: bytes) -> Commit:
    place = meta.place(commit_key(shard))
    commit = unseal_as("a commit record", data, place, Commit.model_validate)
    if commit.shard != shard:
        raise StoreError(f"{place} is the record of shard {commit.shard}: a file was copied or renamed. {REPAIR}")
    if commit.origin and commit.origin != meta.provenance.digest:
        raise StoreError(f"{place} is of another extractor's features: it was copied from another store. {REPAIR}")
    return commit


def committed_shards(meta: StoreMeta) -> list[int]:
    """Numbers of the committed shards, ascending: one listing, no record is read."""
    matches = (_RECORD.fullmatch(name) for name in meta.storage.names(COMMITS))
    return sorted(int(match[1]) for match in matches if match)


def iter_records(meta: StoreMeta, shards: Sequence[int] | None = None) -> Iterator[tuple[int, Commit | StoreError]]:
    """All records by shard number, a few in memory at a time; of a damaged one, what is wrong with it.

    Args:
        meta: the store.
        shards: those that are committed, where somebody has listed them before.
    """
    shards = committed_shards(meta) if shards is None else shards
    for shard, data in zip(shards, meta.storage.read_many([commit_key(shard) for shard in shards]), strict=True):
        try:
            yield shard, _parse(meta, shard, data)
        except StoreError as error:
            yield shard, error


def iter_commits(meta: StoreMeta) -> Iterator[Commit]:
    """All records by shard number, a few in memory at a time; StoreError at the first that is damaged."""
    for _, commit in iter_records(meta):
        if isinstance(commit, StoreError):
            raise commit
        yield commit


def roll_forward(meta: StoreMeta, commit: Commit, sizes: Mapping[str, int] | None = None) -> bool:
    """Makes sure that a committed shard is published; True if this call did it.

    Args:
        meta: the store.
        commit: the shard's record.
        sizes: of the published shards, where somebody has just listed them; else the place is asked.

    Raises:
        StoreError: the shard's file is neither published nor staged, or has another size than was committed.
    """
    if commit.size == 0:
        return False
    storage, final = meta.storage, shard_key(commit.shard)
    if sizes is not None and sizes.get(final) == commit.size:
        return False
    storage.sync(COMMITS)  # what is published must never be more durable than its record
    published = storage.move(staged_key(commit.shard, commit.attempt), final)
    if published:
        storage.remove(f"{SCRATCH}/{staging_name(commit.shard, commit.attempt)}")
    size = storage.size(final)
    if size is None:
        raise StoreError(f"shard {commit.shard} is committed, but {meta.place(final)} is missing. {REPAIR}")
    if size != commit.size:
        raise StoreError(
            f"shard {commit.shard}: {meta.place(final)} has {size:,} bytes, {commit.size:,} were committed. {REPAIR}"
        )
    if not published:  # whoever moved it was perhaps killed before the move was durable
        for folder in (final.rpartition("/")[0], "features/c", "features"):
            storage.sync(folder)
    return published


def shard_place(meta: StoreMeta, commit: Commit, sizes: Mapping[str, int]) -> tuple[str, int | None]:
    """Key and bytes of a committed shard's file: where it is published, or else staged; None where it is nowhere.

    Args:
        meta: the store.
        commit: the shard's record.
        sizes: of the published shards, as they were listed before.
    """
    final, staged = shard_key(commit.shard), staged_key(commit.shard, commit.attempt)
    if final in sizes:
        return final, sizes[final]
    for key in (final, staged, final):  # again: it may be published in between
        if (size := meta.storage.size(key)) is not None:
            return key, size
    return final, None


def roll_all_forward(meta: StoreMeta) -> Iterator[tuple[Commit, bool]]:
    """Every record, with its shard published, and whether that was done just now."""
    # An attempt's folder goes when its move is durable, so that of the others a listing is enough.
    moving = {shard for shard, *_ in staged_attempts(meta)}
    sizes = meta.storage.sizes("features/c")
    for commit in iter_commits(meta):
        yield commit, roll_forward(meta, commit, None if commit.shard in moving else sizes)


def void(meta: StoreMeta, shard: int) -> None:
    """Takes a shard out, aside to `_voided`; its videos are planned again, as another shard.

    An empty record stays in its place: the number is never used again, so that a reader of an older snapshot finds
    nothing there instead of another video's rows.
    """
    storage, key, aside = meta.storage, commit_key(shard), aside_key(f"{shard:06d}")
    storage.move(shard_key(shard), f"{aside}.shard")  # first: a record without data is voided again
    storage.replace(f"{aside}.json", storage.read(key))
    for staged, attempt, name in list(staged_attempts(meta)):  # committed and not published yet, perhaps
        if staged == shard:
            storage.move(f"{SCRATCH}/{name}/shard", f"{aside}.{attempt}.shard")
    storage.replace(key, _empty_record(shard))


def restore_record(meta: StoreMeta, commit: Commit) -> None:
    """Gives a published shard whose record is damaged or lost a new record; a damaged one goes aside to `_voided`."""
    storage, key = meta.storage, commit_key(commit.shard)
    with contextlib.suppress(FileNotFoundError):  # lost
        storage.replace(f"{aside_key(f'{commit.shard:06d}')}.json", storage.read(key))
    storage.replace(key, _sealed(commit))  # at once: no kill leaves a published shard without any record


def void_orphan(meta: StoreMeta, key: str) -> None:
    """Takes out a shard whose commit record is lost; its number is never used again either."""
    number = key.split("/")[2]
    meta.storage.move(key, f"{aside_key(f'orphan-{number}')}.shard")
    if number.isdigit():
        meta.storage.create(commit_key(int(number)), _empty_record(int(number)))


def _sealed(commit: Commit) -> bytes:
    return seal(commit.model_dump(mode="json", exclude_defaults=True))


def _empty_record(shard: int) -> bytes:
    return seal({"shard": shard, "attempt": "voided", "size": 0, "crc32c": 0, "rows": 0, "videos": []})


def staged_attempts(meta: StoreMeta) -> Iterator[tuple[int, str, str]]:
    """(shard, attempt, name) of everything staged."""
    for name in meta.storage.names(SCRATCH):
        if match := _ATTEMPT.fullmatch(name):
            yield int(match[1]), match[2], name
