"""Is a store sound, and if not, mend it (any store → a report): `vlm-dist store verify [--deep] [--repair]`."""

from pydantic import BaseModel, ConfigDict, Field

from feature_store.commit import committed_shards, roll_all_forward, void, void_orphan
from feature_store.files import SCRATCH
from feature_store.index import StoreIndex
from feature_store.inspection import Inspection, Problem
from feature_store.layout import open_store, set_shard_count
from feature_store.plan import planned_shards
from feature_store.plan_repair import rebuild_segments
from feature_store.snapshot import finalise, snapshot_names, void_snapshot
from feature_store.storage import Root


class VerifyReport(BaseModel):
    """What was looked at and what is wrong with it; after a repair, what is still wrong."""

    model_config = ConfigDict(frozen=True)

    problems: list[Problem]
    videos: int = Field(description="Videos with features, by the commit records.")
    shards: int = Field(description="Committed shards.")
    bytes_checked: int = Field(description="Bytes of features whose checksums were compared (deep).")
    repaired: list[str] = Field(description="What a repair did.")
    to_extract: list[str] = Field(description="Ids of videos in bad shards: what has to be extracted again.")


def verify_store(root: Root, deep: bool = False, repair: bool = False) -> VerifyReport:
    """Checks a whole store.

    Args:
        root: the store.
        deep: also reads every byte and compares all checksums.
        repair: mends what was found (see `repair_store`) and checks again. Only while nobody writes.

    Raises:
        StoreError: there is no store, or its zarr.json itself is damaged.
    """
    inspection = Inspection(open_store(root), deep, fresh=deep or repair)
    inspection.run()
    lost = sorted(inspection.lost - inspection.deleted)
    repaired = repair_store(inspection) if repair else []
    if repair:
        inspection = Inspection(inspection.meta, deep, fresh=True)
        inspection.run()
    return VerifyReport(
        problems=inspection.problems,
        videos=len({key for key, *_ in inspection.videos}),
        shards=len(committed_shards(inspection.meta)),
        bytes_checked=inspection.bytes_checked,
        repaired=repaired,
        to_extract=lost,
    )


def repair_store(inspection: Inspection) -> list[str]:
    """Mends what an inspection found, and says what it did. Only while nobody writes to the store.

    Nothing is deleted but unfinished attempts: what is taken out lies in `_voided`, and its videos are given out again
    by the next extraction. Captions of videos that are taken out wait for them.
    """
    meta = inspection.meta
    done: list[str] = []
    if inspection.bad_segments:  # first: voided shards are planned anew
        done.extend(rebuild_segments(meta, inspection.bad_segments, inspection.ids))
    for shard in inspection.bad_shards:
        void(meta, shard)
        done.append(f"voided shard {shard}: extract again to make its videos anew")
    for key in inspection.orphans:
        void_orphan(meta, key)
        done.append(f"took out {meta.place(key)}, which no commit record names: extract again to make its videos anew")
    for name in inspection.bad_snapshots:
        void_snapshot(meta, name)
        done.append(f"took out damaged snapshot {name}")
    if inspection.bad_snapshots:
        left = [name for name in snapshot_names(meta) if StoreIndex(meta.root, name).tokenizer_dir]
        done.append(f"captions are those of snapshot {left[-1]}" if left else "no captions are left: write them again")
    done.extend(f"published shard {commit.shard}" for commit, now in roll_all_forward(meta) if now)
    for name in meta.storage.names(SCRATCH):
        meta.storage.remove(f"{SCRATCH}/{name}")
        done.append(f"removed unfinished {name}")
    if any(problem.kind == "metadata" for problem in inspection.problems) or inspection.bad_segments:
        set_shard_count(meta, planned_shards(meta))
        done.append("wrote features/zarr.json anew")
    before = snapshot_names(meta)
    if (name := finalise(meta.root)) not in before:
        done.append(f"wrote snapshot {name}")
    return done
