"""What `extract` and `import` share: captions beside the features, and the list of what gave none."""

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_dist.cli.context import Context
from vlm_dist.cli.output import counted, print_table, print_warning

if TYPE_CHECKING:
    from feature_store.captions import CaptionReport
    from feature_store.plan import PlannedVideo
    from feature_store.records import VideoRecord

STRICT_EXIT = 3
_SHOWN = 20


def check_captions(context: Context, captions: Path | None, allow_pickle: bool) -> None:
    """Find out before hours of work that the captions or their tokenizer cannot be read."""
    from feature_store.captions import check_caption_file

    if captions is not None:
        check_caption_file(context.store, captions, context.settings.captions, allow_pickle)


def write_captions(context: Context, captions: Path | None, allow_pickle: bool) -> "CaptionReport | None":
    """Captions of the file, if there is one -> the workspace's store; None where it holds none afterwards."""
    from feature_store import captions as store_captions

    if captions is None:
        return _held_captions(context)
    return store_captions.write_captions(context.store, captions, context.settings.captions, allow_pickle)


def _held_captions(context: Context) -> "CaptionReport | None":
    from feature_store.captions import caption_report
    from feature_store.index import StoreIndex

    index = StoreIndex(context.store)
    return caption_report(index, changed=False) if index.tokenizer_dir else None


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
        for count, noun, what in _caption_losses(report):
            print(f"  {counted(count, noun)} {what}")


def print_failures(store: str, broken: list["VideoRecord"], others: int = 0) -> None:
    """A table of the first of the broken videos and repeated inputs, and how many others the store has."""
    command = f"vlm-dist store failures {shlex.quote(store)}"
    if broken:
        reasons = Counter(record.reason for record in broken)
        rows = [(r.video_id, r.reason, r.message) for r in broken[:_SHOWN]]
        title = f"{counted(len(broken), 'video')} without features"
        if repeated := reasons["duplicate"]:  # whose id may have features, from the file that came first
            title += f": {len(broken) - repeated} failed, {repeated} repeated the id of another"
        print_table(("video", "reason", "what happened"), rows, title=title)
        if len(broken) > _SHOWN:
            told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            print(f"… and {len(broken) - _SHOWN} more ({told} in all): `{command}` lists them all")
    if others:
        print(f"The store has {counted(others, 'other video')} without features: `{command}` lists all.")


def of_listed(broken: list["VideoRecord"], videos: list["PlannedVideo"]) -> list["VideoRecord"]:
    """Failures among the listed videos, repeated inputs included: equal in equal runs."""
    from feature_store.records import clean_text

    inputs = {(clean_text(video.video_id), clean_text(video.path)) for video in videos}
    ids = {video_id for video_id, _ in inputs}
    return [r for r in broken if ((r.video_id, r.path) in inputs if r.reason == "duplicate" else r.video_id in ids)]


def _caption_line(report: "CaptionReport") -> str:
    captions, videos = counted(report.clips, "caption"), counted(report.videos_with_captions, "video")
    if not report.changed:
        return f"Captions are as they were: {captions} of {videos}."
    own = ", the store's own" if report.tokenizer_kept else ""
    return (
        f"{captions} ({report.tokens} tokens, {report.tokens_per_s:.2f} a second) of "
        f"{videos}, {report.captions_per_video:.1f} a video; "
        f"vocabulary of {report.tokenizer_pieces} word pieces{own}."
    )


def _caption_losses(report: "CaptionReport") -> list[tuple[int, str, str]]:
    """What did not become tokens, counted; only what happened."""
    absent = ", ".join(map(repr, report.captions_without_video_ids[:3]))
    hint = " (nearly all of the file: are its times seconds, or milliseconds?)" if report.perhaps_not_seconds else ""
    counts = [
        (report.videos_without_captions, "video", "without captions: not pre-trained on"),
        (report.captions_without_video, "video", f"with captions and without features ({absent} …): kept for later"),
        (report.dropped_text, "caption", "without text: dropped"),
        (report.dropped_times, "caption", "without times, or with an end that is not after the start: dropped"),
        (report.dropped_outside, "caption", f"from after the end of the video: dropped{hint}"),
        (report.clipped, "caption", "reaching beyond the video: cut"),
        (report.cut, "caption", "longer than captions.max_chars or captions.max_tokens: cut"),
        (report.duplicates, "caption", "repeating the one before: cut or dropped"),
    ]
    return [(count, noun, what) for count, noun, what in counts if count]
