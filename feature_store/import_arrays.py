"""Features that others made → a feature store, checked and committed as extracted ones are (arrays → features).

The same command may be killed and typed again at any moment: what was committed stays, and is not read again. An array
that cannot be a feature is recorded with its reason and stops nothing.
"""

# pyright: reportUnknownMemberType=false
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from feature_store.at_work import at_work
from feature_store.config import ImportConfig
from feature_store.import_rows import OVERFLOW, RowRules, is_unit
from feature_store.import_sources import ArraySources
from feature_store.layout import create_store, default_rows_per_shard, open_store, store_exists
from feature_store.plan import PlannedVideo, ShardTask, plan_videos
from feature_store.records import Provenance, VideoRecord
from feature_store.s3d import FEATURE_DIM, S3D
from feature_store.snapshot import finalise
from feature_store.storage import Root
from feature_store.weights import load_s3d
from feature_store.writer import ShardAttempt
from vlm_dist.errors import ExtractionError, StoreError

_UNKNOWN = "unknown"
_SAMPLE = 32  # arrays that are looked at to see what a new store will hold
_LAYERS = {width: layer for layer, width in FEATURE_DIM.items()}


@dataclass
class ImportState:
    """How far an import is, or what one call of `import_arrays` did."""

    videos: int = 0
    """Videos of this call: those that the store did not have yet."""
    ok: int = 0
    rows: int = 0
    bytes_read: int = 0
    shards: int = 0
    reasons: Counter[str] = field(default_factory=Counter[str])
    """Arrays that gave no features, by reason; those that wait for a further shard are not counted."""
    elapsed_s: float = 0.0

    @property
    def failed(self) -> int:
        """Arrays that gave no features."""
        return self.reasons.total()

    @property
    def mb_per_s(self) -> float:
        """Megabytes of arrays a second, everything counted."""
        return self.bytes_read / 1e6 / max(self.elapsed_s, 1e-9)


def import_arrays(
    root: Root,
    sources: ArraySources,
    cfg: ImportConfig,
    *,
    weights: Path | None = None,
    retry_failed: bool = False,
    on_progress: Callable[[ImportState], None] = lambda state: None,
) -> ImportState:
    """Import arrays into a store, made or continued, in this process.

    Only the arrays of `sources` are touched: what another import or an older one has planned is left to it.

    Args:
        root: the store.
        sources: the arrays.
        cfg: normalisation and names.
        weights: S3D weights, through whose `fc` 1024-d mixed_5c rows become normalised 512-d video embeddings.
        retry_failed: try those of the arrays again that failed before.
        on_progress: called after every video.

    Returns:
        What this call did; `shards` is 0 where everything was in the store before.

    Raises:
        ExtractionError: wrong weights.
        StoreError: the store is of another provenance, a damaged store, a full disk, or no array at all is usable.
    """
    start = time.monotonic()
    rules = prepare_store(root, sources, cfg, weights)
    state = ImportState()
    with at_work(open_store(root), "store import"):
        _import_all(root, sources, rules, state, start, retry_failed, on_progress)
    state.elapsed_s = time.monotonic() - start
    return state


def prepare_store(root: Root, sources: ArraySources, cfg: ImportConfig, weights: Path | None) -> RowRules:
    """Make the store for an import, or refuse to go on with one of another provenance; see `import_arrays`."""
    provenance, rules = _origin(root, sources, cfg, weights)
    meta = create_store(root, provenance, cfg.rows_per_shard)
    return replace(rules, most_rows=meta.rows_per_shard)


def _import_all(
    root: Root,
    sources: ArraySources,
    rules: RowRules,
    state: ImportState,
    start: float,
    retry_failed: bool,
    on_progress: Callable[[ImportState], None],
) -> None:
    finalise(root)  # publishes what an interrupted import had committed
    mine = {video.path for video in sources.videos}
    while tasks := [task for task in plan_videos(root, sources.videos, 1, retry_failed) if _any_of(task, mine)]:
        retry_failed = False  # only what overflowed its shard is left to plan
        state.videos = state.ok + state.failed + sum(video.path in mine for task in tasks for video in task.videos)
        for task in tasks:
            with ShardAttempt(root, task.shard) as attempt:
                room = rules.most_rows
                for video in task.videos:
                    if video.path not in mine:
                        continue  # without a record it is planned again, for those who have its source
                    record = _import_one(attempt, sources, video, replace(rules, room=room), state)
                    room -= record.n_rows
                    _count(state, record)
                    state.elapsed_s = time.monotonic() - start
                    on_progress(state)
                attempt.commit()
            state.shards += 1
        finalise(root)


def _import_one(
    attempt: ShardAttempt, sources: ArraySources, video: PlannedVideo, rules: RowRules, state: ImportState
) -> VideoRecord:
    start = time.monotonic()
    known: dict[str, object] = {"video_id": video.video_id, "path": video.path}
    try:
        array = sources.load(video, rules)
        state.bytes_read += array.nbytes
        try:
            rows = rules.rows(array)
        except ExtractionError as error:
            raise ExtractionError(f"{video.path}: {error}", error.reason) from None
    except ExtractionError as error:
        if error.reason == OVERFLOW:
            return attempt.add(VideoRecord.model_validate({**known, "status": "overflow"}), None)
        known |= {"status": "failed", "reason": error.reason, "message": str(error)}
        return attempt.add(VideoRecord.model_validate(known), None)
    return attempt.add(VideoRecord.model_validate({**known, "seconds": time.monotonic() - start}), rows)


def _count(state: ImportState, record: VideoRecord) -> None:
    if record.status == "ok":
        state.ok += 1
        state.rows += record.n_rows
    elif record.status == "failed":
        state.reasons[record.reason] += 1


def _any_of(task: ShardTask, paths: set[str]) -> bool:
    return any(video.path in paths for video in task.videos)


def _origin(root: Root, sources: ArraySources, cfg: ImportConfig, weights: Path | None) -> tuple[Provenance, RowRules]:
    """What the store says of its features, and what is asked of each array (the rows of a shard are set later)."""
    known = open_store(root).provenance if store_exists(root) else None
    if weights is not None:
        model, sha256 = load_s3d(weights)
        rules = RowRules(FEATURE_DIM["mixed_5c"], 0, normalise=True, project=_through_fc(model))
        described = Provenance(extractor=cfg.extractor, weights=weights.name, weights_sha256=sha256, normalised=True)
        return described, rules
    if sources.exported and cfg == ImportConfig(rows_per_shard=cfg.rows_per_shard):
        return sources.exported, RowRules(sources.exported.feature_dim, 0)
    width, unit = (known.feature_dim, known.normalised) if known else _sample(sources, cfg.rows_per_shard)
    described = Provenance(
        extractor=cfg.extractor,
        weights=_UNKNOWN,
        weights_sha256="",
        layer=_LAYERS.get(width, _UNKNOWN),
        normalised=unit or cfg.normalise,
        feature_dim=width,
    )
    return described, RowRules(width, 0, unit=unit, normalise=cfg.normalise)


def _sample(sources: ArraySources, rows_per_shard: int) -> tuple[int, bool]:
    """Width, and whether rows have length 1: what most of some arrays over the whole list are.

    The others are then recorded as failed, as mixtures: the store says one thing of all its rows.
    """
    count = len(sources.videos)
    spread = sorted({count * k // _SAMPLE for k in range(_SAMPLE)})
    first = ""
    widths: Counter[int] = Counter()
    unit: Counter[int] = Counter()
    rules = RowRules(0, rows_per_shard or default_rows_per_shard(FEATURE_DIM["video_embedding"]))
    for video in chain((sources.videos[number] for number in spread), _rest(sources, widths)):
        try:
            array = sources.load(video, rules)
            rules.rows(array)
        except ExtractionError as error:
            first = first or f"{video.video_id}: {error}"
            continue
        widths[array.shape[1]] += 1
        unit[array.shape[1]] += is_unit(array)
    if not widths:
        raise StoreError(f"none of the {count} arrays can be features, so no store was made. The first, {first}")
    width = widths.most_common(1)[0][0]
    return width, 2 * unit[width] > widths[width]


def _rest(sources: ArraySources, widths: Counter[int]) -> Iterator[PlannedVideo]:
    """All videos until one was good."""
    for video in sources.videos:
        if widths:
            return
        yield video


def _through_fc(model: S3D) -> Callable[[np.ndarray], np.ndarray]:
    """mixed_5c rows, float32 (n, 1024) → video embeddings, float32 (n, 512)."""

    @torch.inference_mode()
    def project(rows: np.ndarray) -> np.ndarray:
        return model.fc(torch.from_numpy(rows)).numpy()

    return project
