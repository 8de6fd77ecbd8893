"""What a store holds, in numbers, and which videos it could not take (any store → a summary)."""

from collections import Counter
from typing import Any

from feature_store.captions import caption_report
from feature_store.commit import committed_shards, iter_commits
from feature_store.index import StoreIndex, current_snapshot
from feature_store.layout import open_store
from feature_store.plan import planned_shards, read_plan
from feature_store.records import VideoRecord
from feature_store.storage import Root


def store_info(root: Root) -> dict[str, Any]:
    """Counts, coverage, provenance and identity of a store, as plain JSON values.

    `videos` counts ids: planned = ok + failed + open. Hours, rows, clips and tokens are those of the current snapshot;
    where there is none yet, they are 0 and `snapshot` is None.
    """
    meta = open_store(root)
    planned = {video.video_id for segment in read_plan(meta) for task in segment.tasks for video in task.videos}
    failed = failures(root)
    reasons = Counter(record.reason for record in failed)
    index = StoreIndex(root) if current_snapshot(meta) else None
    ok: set[str] = set()
    rows = size = 0
    for commit in iter_commits(meta):
        size += commit.size
        rows += commit.rows
        ok.update(record.video_id for record in commit.videos if record.status == "ok")
    broken = {record.video_id for record in failed if record.reason != "duplicate"}
    row_s = meta.provenance.window / meta.provenance.fps
    captions = caption_report(index, changed=False) if index and index.tokenizer_dir else None
    return {
        "path": str(root),
        "videos": {
            "planned": len(planned | ok),
            "ok": len(ok),
            "failed": len(broken),
            "open": len(planned - ok - broken),
        },
        "coverage": len(ok) / max(1, len(planned | ok)),
        "failures": dict(reasons.most_common()),
        "shards": {"planned": planned_shards(meta), "committed": len(committed_shards(meta))},
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
        "provenance": meta.provenance.model_dump(mode="json"),
        "fingerprint": index.fingerprint if index else None,
        "snapshot": index.name if index else None,
    }


def failures(root: Root) -> list[VideoRecord]:
    """Videos that have no features, by id: those whose every attempt failed, and inputs that repeated an id."""
    meta = open_store(root)
    failed: dict[str, VideoRecord] = {}
    ok: set[str] = set()
    for commit in iter_commits(meta):
        for record in commit.videos:
            if record.status == "ok":
                ok.add(record.video_id)
            elif record.status == "failed":
                failed[record.video_id] = record
    repeated = [
        VideoRecord(
            video_id=video.video_id,
            path=video.path,
            status="failed",
            reason="duplicate",
            message="another input has this id and came first",
        )
        for segment in read_plan(meta)
        for video in segment.duplicates
    ]
    listed = [record for video_id, record in failed.items() if video_id not in ok]
    return sorted([*listed, *repeated], key=lambda record: record.video_id)
