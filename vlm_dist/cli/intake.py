"""What `extract` and `import` share: captions beside the features, and the list of what gave none."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_dist.cli.context import Context
from vlm_dist.cli.output import print_table, print_warning

if TYPE_CHECKING:
    from feature_store.captions import CaptionReport
    from feature_store.records import VideoRecord

STRICT_EXIT = 3
_SHOWN = 20


def check_captions(context: Context, captions: Path | None, allow_pickle: bool) -> None:
    """Find out before hours of work that the captions or their tokenizer cannot be read."""
    from feature_store.captions import check_caption_file

    if captions is not None:
        check_caption_file(context.store, captions, context.settings.captions, allow_pickle)


def write_captions(context: Context, captions: Path | None, allow_pickle: bool) -> "CaptionReport | None":
    """Captions of the file -> the workspace's store; None where there is no file."""
    from feature_store import captions as store_captions

    if captions is None:
        return None
    return store_captions.write_captions(context.store, captions, context.settings.captions, allow_pickle)


def write_tracked_captions(
    context: Context, captions: Path | None, allow_pickle: bool
) -> tuple["CaptionReport", str | None]:
    """Captions of the file (or the store's own) -> the store, as a run of its own where that changes anything.

    The store's fingerprint changes with its captions: what is trained on it finds its origin among the runs.

    Returns:
        What became of them, and the id of the run.
    """
    from feature_store import captions as store_captions
    from feature_store.index import StoreIndex

    report = store_captions.write_captions(context.store, captions, context.settings.captions, allow_pickle)
    if not report.changed:
        return report, None
    with context.tracked("extract") as tracker:
        fingerprint = StoreIndex(context.store).fingerprint
        tracker.tags({"vlm_dist.store_fingerprint": fingerprint, "vlm_dist.store": context.store})
        tracker.metrics({"extract/captions": report.clips}, 0)
        return report, tracker.run_id


def print_captions(report: "CaptionReport | None") -> None:
    """What became of the captions; a warning where there are none."""
    if report is None:
        print_warning("no captions: pre-training needs them; run the same command with --captions FILE")
    else:
        print(_caption_line(report))
        for count, what in _caption_losses(report):
            print(f"  {count} {what}")


def print_failures(broken: list["VideoRecord"]) -> None:
    """A table of the first of them."""
    if broken:
        reasons = Counter(record.reason for record in broken)
        rows = [(r.video_id, r.reason, r.message) for r in broken[:_SHOWN]]
        print_table(("video", "reason", "what happened"), rows, title=f"{len(broken)} videos without features")
        if len(broken) > _SHOWN:
            print(f"… and {len(broken) - _SHOWN} more ({dict(reasons)}): `vlm-dist store failures` lists them all")


def _caption_line(report: "CaptionReport") -> str:
    if not report.changed:
        return f"Captions are as they were: {report.clips} captions of {report.videos_with_captions} videos."
    return (
        f"{report.clips} captions ({report.tokens} tokens, {report.tokens_per_s:.2f} a second) of "
        f"{report.videos_with_captions} videos, {report.captions_per_video:.1f} a video; "
        f"vocabulary of {report.tokenizer_pieces} word pieces."
    )


def _caption_losses(report: "CaptionReport") -> list[tuple[int, str]]:
    """What did not become tokens, counted; only what happened."""
    absent = ", ".join(report.captions_without_video_ids[:3])
    counts = [
        (report.videos_without_captions, "videos have no captions and will not be pre-trained on"),
        (report.captions_without_video, f"videos have captions and no features ({absent} …); kept for later"),
        (report.dropped_text, "captions without text were dropped"),
        (report.dropped_times, "captions whose end is not after their start were dropped"),
        (report.dropped_outside, "captions start after the end of their video and were dropped"),
        (report.clipped, "captions were cut at the end of their video"),
        (report.duplicates, "captions repeated the one before and were cut or dropped"),
    ]
    return [(count, what) for count, what in counts if count]
