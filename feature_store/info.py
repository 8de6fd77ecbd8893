"""What a store holds, in numbers, and which videos it could not take (any store → a summary)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from feature_store.captions import caption_report
from feature_store.commit import iter_commits, shard_place
from feature_store.index import StoreIndex, current_snapshot
from feature_store.layout import StoreMeta, open_store
from feature_store.plan import Segment, read_plan
from feature_store.records import VideoRecord
from feature_store.snapshot import snapshot_names
from feature_store.storage import Root


def store_info(root: Root) -> dict[str, Any]:
    """Counts, coverage, provenance and identity of a store, as plain JSON values.

    `videos` counts ids: planned = ok + failed + open + deleted. `bytes` and `shards` are those of the commit records;
    rows, hours, clips and tokens those of the current snapshot, 0 where there is none yet.

    `damage` says what the counts may be wrong for: shards or records that are gone (nothing else is looked at).

    Raises:
        StoreError: no store, or a damaged one; the columns of the snapshot with an entry a video are compared.
    """
    meta = open_store(root)
    index = StoreIndex(root) if current_snapshot(meta) or len(snapshot_names(meta)) > 1 else None
    if index:
        index.check_columns()
    plan = read_plan(meta)
    planned = {video.video_id for segment in plan for task in segment.tasks for video in task.videos}
    deleted = {video_id.decode() for video_id in index.deleted()} if index else set[str]()
    published = meta.storage.sizes("features/c")  # before the records, which an extraction may be writing
    ok, failed, size, shards, gone = _committed(meta, published)
    repeated = _repeated(plan)
    reasons = Counter(record.reason for record in [*failed.values(), *repeated])
    row_s = meta.provenance.window / meta.provenance.fps
    rows = int(index.n_rows.sum(dtype=np.int64)) if index else 0
    damage = [f"the files of {len(gone)} committed shards are missing, the first of shard {gone[0]}"] if gone else []
    if index and (unknown := sum(key.decode() not in ok for key in index.id_list())):
        damage.append(f"{unknown} videos of the index are in no commit record")
    captions = caption_report(index, changed=False) if index and index.tokenizer_dir else None
    return {
        "path": str(root),
        "damage": damage,
        "videos": {
            "planned": len(planned | ok),
            "ok": len(ok - deleted),
            "failed": len(failed),
            "open": len(planned - ok - failed.keys() - deleted),
            "deleted": len(deleted),
        },
        "coverage": len(ok) / max(1, len(planned | ok)),
        "failures": dict(reasons.most_common()),
        "shards": {"planned": sum(len(segment.tasks) for segment in plan), "committed": shards},
        "rows": rows,
        "hours": rows * row_s / 3600,
        "feature_dim": meta.feature_dim,
        "rows_per_shard": meta.rows_per_shard,
        "bytes": size,
        "clips": captions.clips if captions else 0,
        "tokens": captions.tokens if captions else 0,
        "tokens_per_s": captions.tokens_per_s if captions else 0.0,
        "captions_per_video": captions.captions_per_video if captions else 0.0,
        "videos_with_captions": captions.videos_with_captions if captions else 0,
        "captions_without_video": captions.captions_without_video if captions else 0,
        "tokenizer": {"pieces": captions.tokenizer_pieces, "sha256": captions.tokenizer_sha256} if captions else None,
        "splits": {name: len(index.split_ids(name)) for name in index.splits} if index else {},
        "provenance": meta.provenance.model_dump(mode="json"),
        "fingerprint": index.fingerprint if index else None,
        "snapshot": index.name if index else None,
    }


def failures(root: Root) -> list[VideoRecord]:
    """Videos that have no features, by id: those whose every attempt failed, and inputs that repeated an id."""
    meta = open_store(root)
    _, failed, *_ = _committed(meta, None)
    return sorted([*failed.values(), *_repeated(read_plan(meta))], key=lambda record: record.video_id)


def _committed(
    meta: StoreMeta, published: Mapping[str, int] | None
) -> tuple[set[str], dict[str, VideoRecord], int, int, list[int]]:
    """Ids with features, the last record of each id that has none, the bytes of all shards, and their number.

    Last, the shards whose file is nowhere, where the published ones are given by key.
    """
    ok: set[str] = set()
    failed: dict[str, VideoRecord] = {}
    size = shards = 0
    gone: list[int] = []
    for commit in iter_commits(meta):
        if published is not None and commit.size and shard_place(meta, commit, published)[1] is None:
            gone.append(commit.shard)
        size += commit.size
        shards += 1
        ok.update(record.video_id for record in commit.videos if record.status == "ok")
        failed.update((record.video_id, record) for record in commit.videos if record.status == "failed")
    return ok, {video_id: record for video_id, record in failed.items() if video_id not in ok}, size, shards, gone


def _repeated(plan: Sequence[Segment]) -> list[VideoRecord]:
    return [
        VideoRecord(
            video_id=video.video_id,
            path=video.path,
            status="failed",
            reason="duplicate",
            message="another input has this id and came first",
        )
        for segment in plan
        for video in segment.duplicates
    ]
