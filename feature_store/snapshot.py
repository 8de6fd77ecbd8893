"""Commit records and captions → a new immutable index snapshot, and the swap of CURRENT (features, captions → index).

A snapshot is numbered, names its parent, is built aside and appears by one rename that only one builder can win; who
loses builds again on the winner's, so that no update is lost. Captions of videos that have no features (yet) are kept
in the snapshot's `pending` part and join their video as soon as its features are committed.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from feature_store.arrays import ArrayInfo, write_column
from feature_store.at_work import SNAPSHOT, at_work
from feature_store.caption_table import CaptionTable, TableWriter, pack_ids
from feature_store.commit import roll_all_forward
from feature_store.draft import Captions, Draft, Marks, VideoColumns
from feature_store.files import disk_guard, fsync_dir, seal, write_durable
from feature_store.index import STATUS_OK, StoreIndex, current_line, snapshot_key
from feature_store.layout import CURRENT, GROUP_JSON, SNAPSHOTS, VOIDED, StoreMeta, open_store, scratch_name
from feature_store.leftovers import VOIDED_SNAPSHOT, sweep
from feature_store.published import SNAPSHOT_COPY, SNAPSHOT_JSON
from feature_store.storage import Root
from vlm_dist.errors import StoreError

_SHARDING = {"shard", "row"}  # where rows lie does not change what they are: not in the fingerprint


def finalise(root: Root) -> str:
    """Publishes every committed shard and writes a snapshot of all of it, with the captions of the one before.

    Safe to run again, by several at once and while an extraction is at work; does nothing where nothing changed.

    Returns:
        The name of the snapshot that CURRENT names now.

    Raises:
        StoreError: a damaged record or snapshot, or a committed shard that is missing; a full disk.
    """
    meta = open_store(root)

    def build(parent: StoreIndex | None) -> Draft | None:
        marks = snapshot_marks(parent)
        # Read after the parent was chosen, so that it holds all that the parent does.
        videos = committed_videos(meta).without(marks.deleted)
        if parent and videos.same(snapshot_videos(parent)):
            return None
        return Draft(videos, snapshot_captions(parent), marks)

    name = update_snapshot(meta, build)
    sweep(meta)
    return name


def update_snapshot(meta: StoreMeta, build: Callable[[StoreIndex | None], Draft | None]) -> str:
    """Writes what `build` makes of the newest snapshot as the next one; None keeps the newest.

    Raises:
        StoreError: damage in what is copied, a full disk, or the store is being repaired.
    """
    # From before the number is chosen: a prune must not free one that a builder is going to take.
    with at_work(meta, SNAPSHOT):
        return _update(meta, build)


def _update(meta: StoreMeta, build: Callable[[StoreIndex | None], Draft | None]) -> str:
    while True:
        name = f"{_last_number(meta) + 1:06d}"  # before the parent is chosen: a snapshot in between takes this number
        newest = point_current(meta)
        parent = StoreIndex(meta.root, newest) if newest else None
        draft = build(parent)
        if draft is None:
            return newest
        if parent and not parent.check_all():  # what is copied gets new checksums: damage would be sealed with them
            continue
        if _publish(meta, name, newest, draft):
            return point_current(meta)
        # Another builder took the number: build on its snapshot.


def publish_draft(meta: StoreMeta, draft: Draft) -> str:
    """Writes a draft as the next snapshot, whatever is in the newest, which is damaged: for a repair only.

    Raises:
        StoreError: a full disk, or another repair is at work.
    """
    with at_work(meta, SNAPSHOT):
        while True:
            names = snapshot_names(meta)
            if _publish(meta, f"{_last_number(meta) + 1:06d}", names[-1] if names else "", draft):
                return point_current(meta)


def _publish(meta: StoreMeta, name: str, parent: str, draft: Draft) -> bool:
    """Builds a snapshot aside and publishes it; False where another builder took the number."""
    staged = meta.storage.scratch(scratch_name("snapshot"))
    try:
        with disk_guard(staged, _size(draft)):
            _write(meta, staged, name, parent, draft)
            return meta.storage.publish(staged, snapshot_key(name))
    except FileNotFoundError:
        if staged.exists():
            raise
        raise StoreError(
            f"{staged}, in which a snapshot was made, was deleted meanwhile: run no repair while somebody writes "
            "to the store, and type the same command again"
        ) from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def point_current(meta: StoreMeta) -> str:
    """Makes CURRENT name the newest snapshot (a kill or a race may have left an older name); its name, or empty."""
    while True:
        now, told = _told(meta)  # before the names, which then hold what it tells of
        names = snapshot_names(meta)
        if not names or now == current_line(names[-1]):
            return names[-1] if names else ""
        if told > int(names[-1]):  # lost: a witness, so that its number is never used again
            aside = f"{VOIDED_SNAPSHOT}{told:06d}"
            if aside not in meta.storage.names(VOIDED):
                meta.storage.create(f"{VOIDED}/{aside}", b"lost\n")
        meta.storage.swap(CURRENT, now, current_line(names[-1]))


def told_number(meta: StoreMeta) -> int:
    """The number of the snapshot that CURRENT names, be it there or not; 0 where CURRENT is damaged or not there."""
    return _told(meta)[1]


def _told(meta: StoreMeta) -> tuple[bytes | None, int]:
    """What is in CURRENT, and the number that it names; 0 where it is damaged or not there."""
    try:
        line = meta.storage.read(CURRENT)
    except FileNotFoundError:
        return None, 0
    name = line.partition(b" ")[0].decode("ascii", "replace")
    return line, int(name) if name.isdigit() and line == current_line(name) else 0


def snapshot_names(meta: StoreMeta) -> list[str]:
    """Names of all snapshots, oldest first."""
    return sorted((name for name in meta.storage.names(SNAPSHOTS) if name.isdigit()), key=int)


def committed_videos(meta: StoreMeta) -> VideoColumns:
    """Rolls every commit forward and collects its videos; of a video in two shards the later one counts."""
    ids: list[bytes] = []
    parts: list[np.ndarray] = []
    reasons: dict[bytes, str] = {}
    for commit, _ in roll_all_forward(meta):
        ok = [record for record in commit.videos if record.status == "ok"]
        ids.extend(record.video_id.encode() for record in ok)
        parts.append(np.array([(commit.shard, r.row, r.n_rows, r.crc32c) for r in ok], np.uint32).reshape(-1, 4))
        reasons.update((r.video_id.encode(), r.reason) for r in commit.videos if r.status == "failed")
    latest = {video_id: number for number, video_id in enumerate(ids)}
    order = sorted(latest)
    rows = np.concatenate([*parts, np.empty((0, 4), np.uint32)])[[latest[video_id] for video_id in order]]
    failed = Counter(reason for video_id, reason in reasons.items() if video_id not in latest)
    return VideoColumns(order, *rows.T.copy(), failed=dict(sorted(failed.items())))


def row_milliseconds(meta: StoreMeta) -> int:
    """Time that one feature row covers (1,000 ms at 30 frames per row and 30 fps)."""
    return round(1000 * meta.provenance.window / meta.provenance.fps)


def void_snapshot(meta: StoreMeta, name: str) -> None:
    """Takes a snapshot out, aside to `_voided`; its number is never used again."""
    meta.storage.move(snapshot_key(name), f"{VOIDED}/{VOIDED_SNAPSHOT}{name}")


def snapshot_videos(index: StoreIndex) -> VideoColumns:
    """The videos of a snapshot."""
    return VideoColumns(
        index.id_list(), index.shard, index.row, index.n_rows, index.crc32c, failed=index.details["failed"]
    )


def snapshot_captions(index: StoreIndex | None) -> Captions:
    """The captions of a snapshot, to be carried over."""
    if index is None or index.tokenizer_dir is None:
        return Captions()
    pending = index.pending()
    tables = [(index.id_list(), index.captions), *([pending] if pending else [])]
    return Captions(tables, index.tokenizer_dir, index.tokens.dtype.name, index.details["captions"])


def snapshot_marks(index: StoreIndex | None) -> Marks:
    """What a snapshot says of videos by id, to be carried over."""
    if index is None:
        return Marks()
    return Marks(index.deleted(), {name: index.split_ids(name) for name in index.splits})


def _write(meta: StoreMeta, folder: Path, name: str, parent: str, draft: Draft) -> None:
    """Writes a whole snapshot, durably, into a folder of its own."""
    videos, captions = draft.videos, draft.captions
    (folder / "pending").mkdir()
    write_durable(folder / "zarr.json", GROUP_JSON)
    row_ms = row_milliseconds(meta)
    place = {
        key: (t, row) for t, (keys, _) in reversed(list(enumerate(captions.tables))) for row, key in enumerate(keys)
    }
    counts: Counter[str] = Counter()

    writer = TableWriter(folder, captions.token_dtype)
    for key, n_rows in zip(videos.ids, videos.n_rows.tolist(), strict=True):
        found = place.pop(key, None)
        given = captions.tables[found[0]][1].video(found[1]) if found else None
        kept = given.within(n_rows * row_ms) if given else None
        if given and kept is not None and kept is not given:
            counts["outside"] += len(given.start_ms) - len(kept.start_ms)
            counts["clipped"] += int((given.end_ms > n_rows * row_ms).sum()) - (
                len(given.start_ms) - len(kept.start_ms)
            )
        writer.append(kept)
    arrays = writer.finish() | _write_ids(folder, videos.ids)
    for array, column in (("shard", videos.shard), ("row", videos.row), ("n_rows", videos.n_rows)):
        arrays[array] = write_column(folder, array, column)
    arrays["crc32c"] = write_column(folder, "crc32c", videos.crc32c)
    arrays["status"] = write_column(folder, "status", np.full(len(videos.ids), STATUS_OK, np.uint8))

    pending: dict[str, ArrayInfo] = {}
    waiting = sorted(key for key, (t, row) in place.items() if _has_captions(captions.tables[t][1], row))
    if waiting:
        writer = TableWriter(folder / "pending", captions.token_dtype)
        for key in waiting:
            table, row = place[key]
            writer.append(captions.tables[table][1].video(row))
        pending = writer.finish() | _write_ids(folder / "pending", waiting)
        write_durable(folder / "pending" / "zarr.json", GROUP_JSON)
        fsync_dir(folder / "pending")
    else:
        (folder / "pending").rmdir()

    deleted = _write_marks(folder, "deleted", draft.marks.deleted) if draft.marks.deleted else {}
    splits = {split: _write_marks(folder, f"splits/{split}", ids) for split, ids in draft.marks.splits.items()}

    details = dict(captions.details)
    files: dict[str, int | None] = {SNAPSHOT_COPY: None}
    if captions.tokenizer:
        shutil.copytree(captions.tokenizer, folder / "tokenizer")
        for path in (folder / "tokenizer").iterdir():
            write_durable(path, path.read_bytes())
            files[f"tokenizer/{path.name}"] = path.stat().st_size
        fsync_dir(folder / "tokenizer")
        details |= {what: details.get(what, 0) + counts[what] for what in ("outside", "clipped")}
    body = {
        "name": name,
        "parent": parent or None,
        "arrays": arrays,
        "pending": pending,
        "deleted": deleted,
        "splits": splits,
        "failed": videos.failed,
        "captions": details,
        "files": files,
        "fingerprint": _fingerprint(meta, arrays, details.get("tokenizer_sha256", "")),
    }
    for file in (SNAPSHOT_COPY, SNAPSHOT_JSON):
        write_durable(folder / file, seal(body))
    fsync_dir(folder)


def _has_captions(table: CaptionTable, row: int) -> bool:
    return bool(table.clip_ptr[row + 1] > table.clip_ptr[row])


def _write_marks(folder: Path, name: str, ids: Sequence[bytes]) -> dict[str, ArrayInfo]:
    """The ids of a mark in a folder of their own."""
    (folder / name).mkdir(parents=True)
    arrays = _write_ids(folder / name, ids)
    for path in (folder / name, (folder / name).parent):
        fsync_dir(path)
    return arrays


def _write_ids(folder: Path, ids: Sequence[bytes]) -> dict[str, ArrayInfo]:
    raw, ptr = pack_ids(ids)
    return {
        "video_id": write_column(folder, "video_id", raw),
        "video_id_ptr": write_column(folder, "video_id_ptr", ptr),
    }


def _fingerprint(meta: StoreMeta, arrays: dict[str, ArrayInfo], tokenizer_sha256: str) -> str:
    """Hash of what the snapshot says: the arrays' checksums, provenance and tokenizer."""
    content = {name: info for name, info in arrays.items() if name not in _SHARDING}
    told = [content, meta.provenance.model_dump(mode="json"), tokenizer_sha256]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def _last_number(meta: StoreMeta) -> int:
    """The highest number that a snapshot has or had (the newest may be lost, or taken out by a repair)."""
    gone = [
        name.removeprefix(VOIDED_SNAPSHOT) for name in meta.storage.names(VOIDED) if name.startswith(VOIDED_SNAPSHOT)
    ]
    return max(told_number(meta), *map(int, [*snapshot_names(meta), *gone]), 0)


def _size(draft: Draft) -> int:
    """Bytes that a snapshot needs, roughly: its columns, and a block for each of its files and folders."""
    videos, tables = draft.videos, draft.captions.tables
    columns = (column for _, table in tables for column in (table.clip_start_ms, table.tokens, table.text))
    return sum(map(len, videos.ids)) + 64 * len(videos.ids) + 4 * sum(column.nbytes for column in columns) + 64 * 4096
