"""Is a store sound, and if not, mend it (any store → a report): `vlm-dist store verify [--deep] [--repair]`."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

from feature_store.at_work import REPAIR, at_work, require_no_writers
from feature_store.commit import Commit, committed_shards, roll_all_forward, void, void_orphan
from feature_store.files import SCRATCH
from feature_store.index import StoreIndex, snapshot_key
from feature_store.inspection import Inspection
from feature_store.layout import (
    CURRENT,
    StoreMeta,
    open_store,
    recover_metadata,
    set_shard_count,
    shard_key,
    wrong_metadata,
)
from feature_store.plan import array_fits, planned_shards
from feature_store.plan_repair import (
    missing_segments,
    planned_paths,
    rebuild_segments,
    restore_segments,
    retire_misplaced,
)
from feature_store.problem import Problem
from feature_store.restore import restore_records
from feature_store.salvage import salvage_shard, settled_elsewhere
from feature_store.snapshot import finalise, snapshot_names, void_snapshot
from feature_store.snapshot_json import recover_snapshots
from feature_store.snapshot_salvage import salvage_snapshot
from feature_store.storage import Root


class VerifyReport(BaseModel):
    """What was looked at and what is wrong with it; after a repair, what is still wrong."""

    model_config = ConfigDict(frozen=True)

    problems: list[Problem]
    videos: int = Field(description="Videos with features, by the commit records.")
    shards: int = Field(description="Committed shards.")
    snapshot: str = Field(description="Name of the snapshot that readers open; empty where there is none (yet).")
    bytes_checked: int = Field(description="Bytes of features whose checksums were compared (deep).")
    repaired: list[str] = Field(description="What a repair did.")
    to_extract: list[str] = Field(
        description="Ids of videos that no shard has whole: what has to be extracted again. Before a repair, all that "
        "was planned for a shard whose commit record is damaged or lost: a repair may save them."
    )


def verify_store(root: Root, deep: bool = False, repair: bool = False, writers_gone: bool = False) -> VerifyReport:
    """Checks a whole store.

    Args:
        root: the store.
        deep: also reads every byte and compares all checksums.
        repair: mends what was found (see `repair_store`) and checks again.
        writers_gone: repair although a writer gave a sign of life within the last minute: it was killed.

    Raises:
        StoreError: there is no store, its zarr.json itself is damaged, or a repair was asked for while somebody writes.
    """
    recovered = repair and recover_metadata(root)
    meta = open_store(root)
    if not repair:
        inspection = Inspection(meta, deep, fresh=deep)
        inspection.run()
        return _report(inspection, inspection.lost - inspection.deleted, [])
    with at_work(meta, REPAIR) as note:
        _require_no_writers(meta, note, writers_gone)
        repaired = ["made zarr.json anew from the store's second copy"] if recovered else []
        repaired += [*restore_segments(meta)[1], *recover_snapshots(meta)]
        inspection = Inspection(meta, deep, fresh=True)
        inspection.run()
        left = [name for name in meta.storage.names(SCRATCH) if name != note]  # before the look at who is writing
        _require_no_writers(meta, note, writers_gone)  # again: a deep inspection takes hours
        repaired += repair_store(inspection, left)
        lost = inspection.lost - inspection.deleted
        inspection = Inspection(meta, deep, fresh=True)
        inspection.run()
        return _report(inspection, lost, repaired)


def _report(inspection: Inspection, lost: set[str], repaired: list[str]) -> VerifyReport:
    return VerifyReport(
        problems=inspection.problems,
        videos=len({key for key, *_ in inspection.videos}),
        shards=inspection.shards,
        snapshot=next(reversed(snapshot_names(inspection.meta)), ""),
        bytes_checked=inspection.bytes_checked,
        repaired=repaired,
        to_extract=sorted(lost - inspection.sound_ids()),
    )


def _require_no_writers(meta: StoreMeta, note: str, writers_gone: bool) -> None:
    if not writers_gone:
        require_no_writers(meta, note, hint=" (or say `--writers-gone`, if you are sure of it)")


def repair_store(inspection: Inspection, left: Sequence[str]) -> list[str]:
    """Mends what an inspection found, and says what it did. Only while nobody writes to the store.

    Nothing is deleted but unfinished attempts: what is taken out lies in `_voided`. Videos that are whole are kept
    wherever a record or a snapshot says which they are; the others are given out again by the next extraction. Captions
    of videos that are taken out wait for them. What is sound of a damaged newest snapshot is in the next one.

    Args:
        inspection: has looked at everything.
        left: names in `_staging` of what nobody is at work on.
    """
    meta = inspection.meta
    back, done = restore_segments(meta, inspection.bad_segments) if inspection.bad_segments else ([], [])
    without = _doubtful(inspection)
    bad_segments = {*inspection.bad_segments, *missing_segments(meta)}.difference(back)
    paths = planned_paths(meta, {*inspection.bad_shards, *without}, bad_segments)
    good = [name for name in snapshot_names(meta) if name not in inspection.bad_snapshots]
    restored = restore_records(meta, without, good if without else [], paths)
    done += [_restored_line(commit, name, paths) for commit, name in restored.values()]
    for key in inspection.orphans:
        if key not in map(shard_key, restored):
            void_orphan(meta, key)
            done.append(
                f"took out {meta.place(key)}, which no commit record names: extract again to make its videos anew"
            )
    if inspection.lost_segment is not None:
        done.append(f"plan segment {inspection.lost_segment} is lost: give the videos to extract again")
    bad_segments = {*inspection.bad_segments, *missing_segments(meta)}.difference(back)  # records of orphans are new
    if bad_segments:  # before shards are voided: it is their records that say what was planned
        ids = {shard: inspection.ids.get(shard, []) for shard in committed_shards(meta)}
        ids |= {shard: [record.video_id for record in commit.videos] for shard, (commit, _) in restored.items()}
        done.extend(rebuild_segments(meta, sorted(bad_segments), ids, inspection.uncommitted))
    done.extend(_take_out(inspection, [shard for shard in inspection.bad_shards if shard not in restored], paths))
    done.extend(f"published shard {commit.shard}" for commit, now in roll_all_forward(meta) if now)
    salvaged, lines = salvage_snapshot(meta, inspection.bad_snapshots)  # a kill before they are taken out loses nothing
    done.extend(lines)
    for name in inspection.bad_snapshots:
        void_snapshot(meta, name)
        done.append(f"took out damaged snapshot {name}")
    if inspection.bad_snapshots and not salvaged:
        newest_first = reversed(snapshot_names(meta))
        told = next((name for name in newest_first if StoreIndex(meta.root, name).tokenizer_dir), "")
        done.append(f"captions are those of snapshot {told}" if told else "no captions are left: write them again")
    for name in left:
        meta.storage.remove(f"{SCRATCH}/{name}")
        done.append(f"removed unfinished {name}")
    retire_misplaced(meta)
    if bad_segments or not array_fits(meta, planned_shards(meta)):
        set_shard_count(meta, planned_shards(meta))
        done.append("wrote features/zarr.json anew")
    taken_out = tuple(f"{snapshot_key(name)}{end}" for name in inspection.bad_snapshots for end in ("/", "."))
    for key, data in (wrong_metadata(meta) | inspection.derived).items():
        if key.startswith(taken_out):  # nothing of a snapshot that is gone may come back
            continue
        meta.storage.replace(key, data)
        done.append(f"wrote {key} anew")
    before = snapshot_names(meta)
    if (name := finalise(meta.root)) not in before:
        done.append(f"wrote snapshot {name}")
    if inspection.bad_current:
        done.append(f"wrote {CURRENT} anew: it names snapshot {name}")
    return done


def _doubtful(inspection: Inspection) -> dict[int, int]:
    """Shards that are published and whose record is damaged, lost or not that of the file, with the file's bytes."""
    orphans = {shard_key(int(number)) for key in inspection.orphans if (number := key.split("/")[2]).isdigit()}
    keys = {*map(shard_key, [*inspection.bad_records, *inspection.damaged]), *orphans.intersection(inspection.orphans)}
    return {int(key.split("/")[2]): size for key, size in inspection.published.items() if key in keys}


def _restored_line(commit: Commit, name: str, paths: Mapping[int, Mapping[str, str]]) -> str:
    planned = max(len(commit.videos), len(paths.get(commit.shard, ())))
    return (
        f"kept {len(commit.videos)} of {planned} videos of shard {commit.shard}: "
        f"made its commit record anew from snapshot {name}"
    )


def _take_out(inspection: Inspection, shards: Sequence[int], paths: Mapping[int, Mapping[str, str]]) -> list[str]:
    """Voids bad shards; what is whole of those whose record is sound is kept first."""
    meta = inspection.meta
    done: list[str] = []
    settled = settled_elsewhere(meta, inspection.damaged, shards) if inspection.damaged else {}
    committed = set(committed_shards(meta))
    waiting = {shard: ids for shard, ids in inspection.planned.items() if shard not in committed}
    for shard in shards:
        if shard in inspection.damaged:
            done.extend(salvage_shard(meta, shard, paths.get(shard, {}), waiting, settled))
        else:
            void(meta, shard)
            done.append(f"voided shard {shard}: extract again to make its videos anew")
    return done
