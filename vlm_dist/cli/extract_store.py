"""Videos and captions -> the workspace's store, as a tracked run on Ray: what `extract` and the demo do."""

import csv
import io
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.cli.context import Context
from vlm_dist.cli.intake import (
    check_captions,
    of_listed,
    print_captions,
    print_failures,
    write_captions,
    write_tracked_captions,
)
from vlm_dist.cli.output import counted, duration, print_status, print_warning, progress
from vlm_dist.errors import ConfigError

if TYPE_CHECKING:
    from feature_store.extract import ExtractProgress, ExtractSummary
    from feature_store.plan import PlannedVideo
    from feature_store.records import VideoRecord

LOG_EVERY_S = 10.0  # between points of a throughput curve: extraction runs for days
REASONS = 3  # that the progress line names
SETTLED_S = 10.0  # before that, waiting is the first videos' opening


def extract_to_store(
    context: Context,
    paths: list[Path],
    random_seed: int | None,
    allow_pickle: bool = False,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Videos and captions -> the workspace's store, as a tracked run; prints what happened and returns it."""
    from feature_store.encoder import require_same_encoder
    from feature_store.info import failures, store_info
    from feature_store.layout import store_exists
    from feature_store.manifest import list_inputs
    from feature_store.plots import plot_decoded

    settings = context.settings
    videos = list_inputs(paths)
    weights = weights_file(context, random_seed)
    captions = Path(settings.captions_file) if settings.captions_file else None
    check_captions(context, captions, allow_pickle)
    if store_exists(context.store):
        require_same_encoder(context.store, settings.extract, random_seed=random_seed, weights=weights)
        if _all_done(context, videos, retry_failed):
            return _again(context, videos, captions, allow_pickle)
    elif not videos:
        raise ConfigError(f"there is no store at {context.store} whose failed videos could be tried again")
    with context.tracked("extract") as tracker:
        started = time.monotonic()
        with context.ray() as machines, progress("extract", len(videos), "videos") as bar:
            from feature_store.extract import extract_corpus  # imports ray, which the session prepares

            if (gpus := sum(node.gpus for node in machines)) and not settings.extract.gpus_per_worker:
                print_warning(f"{gpus:g} GPUs are there and S3D runs on CPUs; type --set extract.gpus_per_worker=1")
            if settings.extract.gpus_per_worker and settings.extract.precision == "float32":
                print_warning(
                    "S3D runs in float32; float16 is 3 to 6 times as fast on a GPU, its error 0.4 % of the distance of "
                    "neighbouring seconds: type --set extract.precision=float16, for a store of its own"
                )
            logged = time.monotonic()

            def show(state: "ExtractProgress") -> None:
                nonlocal logged
                bar.update(state.done, _progress_note(state), total=state.videos)
                if time.monotonic() - logged < LOG_EVERY_S and state.done < state.videos:
                    return
                logged = time.monotonic()
                tracker.metrics(
                    {
                        "extract/videos": state.done,
                        "extract/failed": state.tally.failed,
                        "extract/videos_per_s": state.videos_per_s,
                        "extract/video_seconds_per_s": state.video_seconds_per_s,
                        "extract/waiting_on_decode": state.waiting,
                        "extract/shards": state.shards_done,
                        "extract/worker_deaths": state.worker_deaths,
                    },
                    step=state.done,
                )

            summary = extract_corpus(
                context.store,
                videos,
                settings.extract,
                random_seed=random_seed,
                weights=weights,
                rows_per_shard=settings.store_layout.rows_per_shard,
                retry_failed=retry_failed,
                on_progress=show,
                on_calibration=announce_calibration,
            )
        report = write_captions(context, captions, allow_pickle)
        info = store_info(context.store)
        broken = failures(context.store)
        tracker.tags({"vlm_dist.store_fingerprint": info["fingerprint"], "vlm_dist.store": context.store})
        tracker.text("\n".join(record.model_dump_json() for record in broken), "failures.jsonl")
        tracker.text(_failure_table(broken), "failures.csv")
        tracker.picture(partial(plot_decoded, context.store), "decoded.png")
        listed = _of_this_call(broken, videos)
        _print_summary(summary, listed, time.monotonic() - started)
        print_captions(report)
        print_failures(context.store, listed, others=len(broken) - len(listed))
        return {
            "store": context.store, "ok": summary.tally.ok, "failed": len(listed),
            "nothing_to_do": summary.nothing_to_do, "fingerprint": info["fingerprint"], "run": tracker.run_id,
        }  # fmt: skip


def _all_done(context: Context, videos: list["PlannedVideo"], retry_failed: bool) -> bool:
    """Whether every video is through, so that neither Ray nor a run is needed; what was committed is published."""
    from feature_store.plan import anything_to_do
    from feature_store.snapshot import finalise

    if anything_to_do(context.store, videos, retry_failed):
        return False
    finalise(context.store)
    return True


def _again(context: Context, videos: list["PlannedVideo"], captions: Path | None, allow_pickle: bool) -> dict[str, Any]:
    """The same command once more: only captions may have changed."""
    from feature_store.info import failures, store_info

    what = f"{counted(len(videos), 'video')} listed, in the store already or failed before"
    print(f"Nothing to do: {what if videos else 'no video is to be tried again'}.")
    if captions:
        report, run = write_tracked_captions(context, captions, allow_pickle)
    else:
        report, run = write_captions(context, None, allow_pickle), None
    broken = failures(context.store)
    listed = _of_this_call(broken, videos)
    print_captions(report)
    print_failures(context.store, listed, others=len(broken) - len(listed))
    if any(record.reason != "duplicate" for record in listed):
        print("Where what made them fail is mended, the same command with --retry-failed tries them again.")
    info = store_info(context.store)
    return {"store": context.store, "ok": info["videos"]["ok"], "failed": len(listed),
            "nothing_to_do": True, "fingerprint": info["fingerprint"], "run": run}  # fmt: skip


def _of_this_call(broken: list["VideoRecord"], videos: list["PlannedVideo"]) -> list["VideoRecord"]:
    """Failures among the listed videos; without a list, every failed video was tried again."""
    return of_listed(broken, videos) if videos else [record for record in broken if record.reason != "duplicate"]


def _progress_note(state: "ExtractProgress") -> str:
    """What stands behind the bar: `3/8 shards, 1.2 videos/s, 27.3 s of video/s, 3 failed (2 corrupt, …)`."""
    parts = [
        f"{state.shards_done}/{counted(state.shards, 'shard')}",
        f"{state.videos_per_s:.2g} videos/s",
        f"{state.video_seconds_per_s:.1f} s of video/s",
    ]
    if state.elapsed_s > SETTLED_S and not state.workers and state.shards_done < state.shards:
        parts.append("no worker is there: Ray has no room for one, or it is being started")
    elif state.elapsed_s > SETTLED_S:
        parts.append(f"networks wait for decoding {100 * state.waiting:.0f} %")
    if state.tally.failed:
        reasons = Counter({reason: n for reason, n in state.tally.reasons.items() if reason != "overflow"})
        told = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common(REASONS))
        parts.append(f"{state.tally.failed} failed ({told}{', …' if len(reasons) > REASONS else ''})")
    return ", ".join(parts)


def _failure_table(broken: list["VideoRecord"]) -> str:
    """The failed videos as CSV, which MLflow's page shows as a table."""
    columns = ("video_id", "reason", "message", "decoded_s", "claimed_s", "attempts", "path")
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(columns)
    table.writerows([getattr(record, column) for column in columns] for record in broken)
    return text.getvalue()


def weights_file(context: Context, random_seed: int | None) -> Path | None:
    """The weights file, or None for random weights. A seed on the command line goes before a file in the settings."""
    from feature_store.weights import NO_WEIGHTS

    file, origin = context.settings.extract.weights, context.resolved.origins["extract.weights"]
    if random_seed is not None:
        if file and origin == "command line":
            raise ConfigError("--weights and --random-weights exclude each other: give one of them")
        return None
    if not file:
        raise ConfigError(NO_WEIGHTS)
    return Path(file)


def announce_calibration() -> None:
    """Say what the silence is that follows."""
    from feature_store.encode import CALIBRATION_CLIPS

    print_status(f"Calibrating random weights on up to {CALIBRATION_CLIPS} one-second clips …")


def _print_summary(summary: "ExtractSummary", broken: list["VideoRecord"], seconds: float) -> None:
    repeated = sum(record.reason == "duplicate" for record in broken)
    print(
        f"{counted(summary.tally.ok, 'video')} ({duration(summary.tally.seconds)} of video) extracted in "
        f"{duration(seconds)}, on {counted(summary.workers, 'worker')}; {len(broken) - repeated} failed"
        f"{f', {repeated} repeated an id' if repeated else ''}."
    )
