"""A caption file → clean, de-duplicated, tokenised captions in a new index snapshot (captions → index).

A cheap step of its own: no feature is touched. The store keeps the cleaned text, so that another vocabulary needs no
caption file, and captions of videos that it has no features of, which join their video when its features come.
"""

import math
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from feature_store.at_work import at_work
from feature_store.caption_cleaning import clean_captions
from feature_store.caption_files import RawCaptions, iter_captions, require_caption_file
from feature_store.caption_table import CaptionTable, TableWriter, VideoCaptions
from feature_store.caption_tokens import Table, Texts, tokenise
from feature_store.config import CaptionConfig
from feature_store.draft import Captions, Draft
from feature_store.files import disk_guard, file_crc32c
from feature_store.index import StoreIndex, current_snapshot
from feature_store.layout import StoreMeta, open_store, scratch_name, store_exists
from feature_store.snapshot import (
    finalise,
    snapshot_captions,
    snapshot_marks,
    snapshot_videos,
    update_snapshot,
)
from feature_store.storage import Root
from feature_store.tokenizer import TRAIN_PREFIX, Tokenizer, load_tokenizer, train_wordpiece
from vlm_dist.errors import ConfigError, StoreError

NAMED = 5
_NEARLY = 0.9
_BERT = "bert-base-uncased"


class CaptionReport(BaseModel):
    """What became of the captions, and the corpus in the paper's figures (5.1.1)."""

    model_config = ConfigDict(frozen=True)

    snapshot: str
    changed: bool = Field(description="False where the store held exactly this already.")
    videos_with_captions: int
    videos_without_captions: int
    captions_without_video: int = Field(description="Videos that have captions and no features; kept for later.")
    captions_without_video_ids: tuple[str, ...] = Field(description="The first few of them.")
    dropped_text: int = Field(
        description="Captions of the file without text (empty, null, NaN, no string), or without a token."
    )
    dropped_times: int = Field(description="Captions of the file with a missing or negative end, or start >= end.")
    dropped_outside: int = Field(description="Captions that start after the end of their video.")
    perhaps_not_seconds: bool = Field(description="Whether these are nearly all of the file whose video is there.")
    cut: int = Field(description="Captions cut to max_chars or max_tokens, of those that were tokenised last.")
    clipped: int = Field(description="Captions that were cut at 0 or at the end of their video.")
    duplicates: int = Field(description="Captions that repeated words of the one before and were cut or dropped.")
    clips: int
    tokens: int
    tokens_per_s: float = Field(description="Tokens per second of the videos that have captions.")
    tokens_per_caption_s: float = Field(description="Tokens per second of captions.")
    captions_per_video: float = Field(description="Captions per video that has any.")
    tokenizer_pieces: int
    tokenizer_sha256: str
    tokenizer_kept: bool = Field(description="Whether the store's own was used, as no other was asked for.")


def write_captions(root: Root, file: Path | None, cfg: CaptionConfig, allow_pickle: bool = False) -> CaptionReport:
    """Writes a snapshot with the captions of a file; those of other videos stay. Does nothing where nothing changed.

    Args:
        root: the store; it may hold none, some or all of the videos yet.
        file: .json, .jsonl, .csv or .pkl (see `caption_files`); None tokenises the store's own captions again.
        cfg: cleaning and tokenising. Another tokenizer is applied to every caption of the store; where none is said,
            its own stays.
        allow_pickle: open a pickled file, restricted to data.

    Raises:
        ConfigError: no such file or tokenizer, or a pickle that is not allowed.
        StoreError: the file does not have the form (the video is named); None and the store has no captions.
    """
    meta = open_store(root)
    asked = _usable(_current(root), file, cfg, allow_pickle)
    with at_work(meta, "captions"):
        return _write(meta, file, asked, allow_pickle)


def _write(meta: StoreMeta, file: Path | None, asked: "_Asked", allow_pickle: bool) -> CaptionReport:
    root, cfg, tokenizer = meta.root, asked.cfg, asked.tokenizer
    finalise(root)
    before = StoreIndex(root)
    source = before.details["captions"].get("source_crc32c") if file is None else file_crc32c(file)
    if file is None:
        _require_text(before, cfg)
    raw = iter_captions(file, allow_pickle, asked.of_ids) if file else None
    if _unchanged(before, cfg, source, tokenizer):
        return caption_report(before, changed=False, kept=asked.kept)

    scratch = meta.storage.scratch(scratch_name("captions"))
    try:
        with disk_guard(scratch, 3 * (file.stat().st_size if file else before.captions.text.nbytes)):
            new, counts = _read_file(scratch / "text", raw, cfg) if raw else ([], before.details["captions"])
            build = _Builder(scratch, new, tokenizer, cfg, {**counts, "source_crc32c": source})
            name = update_snapshot(meta, build)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return caption_report(StoreIndex(root, name), changed=True, kept=asked.kept)


def check_caption_file(root: Root, file: Path, cfg: CaptionConfig, allow_pickle: bool = False) -> None:
    """Reads a caption file to its end, as `write_captions` will, and keeps nothing.

    For before hours of extraction: a million videos take a minute. The file that the captions of the store were read
    from is not read again.

    Args:
        root: the store; it need not be there yet.
        file, cfg, allow_pickle: as for `write_captions`, with its errors.
    """
    known = _current(root)
    asked = _usable(known, file, cfg, allow_pickle)
    if known and known.details["captions"].get("source_crc32c") == file_crc32c(file):
        return
    for video in iter_captions(file, allow_pickle, asked.of_ids):
        clean_captions(video, cfg.deduplicate, Counter())


def caption_report(index: StoreIndex, changed: bool, kept: bool = False) -> CaptionReport:
    """The report on the captions that a snapshot holds; `kept` is for `tokenizer_kept`."""
    details: dict[str, Any] = index.details["captions"]
    captioned = np.diff(index.clip_ptr) > 0
    row_s = index.meta.provenance.window / index.meta.provenance.fps
    seconds = float(index.n_rows[captioned].sum(dtype=np.int64)) * row_s
    caption_s = float((index.clip_end_ms - index.clip_start_ms).sum(dtype=np.int64)) / 1000
    pending = index.pending()
    waiting = pending[0] if pending else []
    return CaptionReport(
        snapshot=index.name,
        changed=changed,
        videos_with_captions=int(captioned.sum()),
        videos_without_captions=int((~captioned).sum()),
        captions_without_video=len(waiting),
        captions_without_video_ids=tuple(video_id.decode() for video_id in waiting[:NAMED]),
        dropped_text=details["no_text"],
        dropped_times=details["bad_times"],
        dropped_outside=details["outside"],
        perhaps_not_seconds=changed and details["outside"] >= _NEARLY * details.get("with_video", math.inf) > 0,
        cut=details.get("cut", 0),
        clipped=details["clipped"],
        duplicates=details["duplicates"],
        clips=index.num_clips,
        tokens=index.num_tokens,
        tokens_per_s=index.num_tokens / seconds if seconds else 0.0,
        tokens_per_caption_s=index.num_tokens / caption_s if caption_s else 0.0,
        captions_per_video=index.num_clips / max(1, int(captioned.sum())),
        tokenizer_pieces=details["tokenizer_pieces"],
        tokenizer_sha256=details["tokenizer_sha256"],
        tokenizer_kept=kept,
    )


class _Builder:
    """What `update_snapshot` calls with the newest snapshot, again if another builder was faster."""

    def __init__(
        self, scratch: Path, new: list[Table], tokenizer: Tokenizer | None, cfg: CaptionConfig, details: dict[str, Any]
    ) -> None:
        self.scratch, self.new, self.tokenizer, self.cfg, self.details = scratch, new, tokenizer, cfg, details
        self.calls = 0

    def __call__(self, parent: StoreIndex | None) -> Draft:
        assert parent is not None, "finalise has made one"
        self.calls += 1
        folder = self.scratch / str(self.calls)
        old = snapshot_captions(parent)
        merged = [*self.new, *old.tables]
        tokenizer = self.tokenizer or train_wordpiece(Texts(merged), _train_size(self.cfg.tokenizer))
        tokenizer.save(folder / "tokenizer")
        settings = {
            "tokenizer_sha256": tokenizer.sha256,
            "tokenizer_pieces": tokenizer.vocab_size,
            "max_chars": self.cfg.max_chars,
            "max_tokens": self.cfg.max_tokens,
        }
        keep = all(old.details.get(name) == value for name, value in settings.items())
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        table, empty, cut = tokenise(folder / "table", self.new if keep else merged, tokenizer, dtype, self.cfg)
        details: dict[str, Any] = {**self.details, **settings, "config": self.cfg.model_dump(mode="json")}
        details["no_text"] += empty
        details["cut"] = cut
        there = set(parent.id_list())
        of_video = (
            (key, n) for ids, new in self.new for key, n in zip(ids, np.diff(new.clip_ptr).tolist(), strict=True)
        )
        details["with_video"] = sum(n for key, n in of_video if key in there)
        tables: list[Table] = [table, *(old.tables if keep else ())]
        made = Captions(tables, folder / "tokenizer", dtype, details)
        return Draft(snapshot_videos(parent), made, snapshot_marks(parent))


class _Asked(NamedTuple):
    """What is to be done with captions: settings whose tokenizer has a name, and that tokenizer."""

    cfg: CaptionConfig
    tokenizer: Tokenizer | None
    """None is to be trained."""
    kept: bool = False
    """Whether it is the store's own, and not what would have been taken for another store."""

    @property
    def of_ids(self) -> Tokenizer | None:
        """That word-piece ids of a file are of: one of just this store is not known to be it, and has to be said."""
        return None if self.kept else self.tokenizer


def _usable(known: StoreIndex | None, file: Path | None, cfg: CaptionConfig, allow_pickle: bool) -> _Asked:
    """ConfigError where file or settings cannot be meant so."""
    if file is not None:
        require_caption_file(file, allow_pickle)
    if cfg.max_tokens > np.iinfo(np.uint16).max:
        raise ConfigError(f"max_tokens is {cfg.max_tokens}; a caption holds at most 65535")
    if known and known.tokenizer_dir and not cfg.tokenizer:
        name: str = known.details["captions"]["config"]["tokenizer"]
        own = load_tokenizer(str(known.tokenizer_dir))
        return _Asked(cfg.model_copy(update={"tokenizer": name}), own, kept=name != _BERT)
    cfg = cfg.model_copy(update={"tokenizer": cfg.tokenizer or _BERT})
    if cfg.tokenizer.startswith(TRAIN_PREFIX):
        _train_size(cfg.tokenizer)
        return _Asked(cfg, None)
    return _Asked(cfg, load_tokenizer(cfg.tokenizer))


def _current(root: Root) -> StoreIndex | None:
    return StoreIndex(root) if store_exists(root) and current_snapshot(open_store(root)) else None


def _read_file(folder: Path, raw: Iterable[RawCaptions], cfg: CaptionConfig) -> tuple[list[Table], Counter[str]]:
    """The cleaned captions of a file, on disk and without tokens; and what was dropped."""
    writer = TableWriter(folder, "uint16")
    counts: Counter[str] = Counter(no_text=0, bad_times=0, clipped=0, duplicates=0, outside=0)
    ids: list[bytes] = []
    for video in raw:
        captions = clean_captions(video, cfg.deduplicate, counts)
        texts = [caption.text.encode() for caption in captions]
        writer.append(
            VideoCaptions(
                np.array([caption.start for caption in captions], np.uint32),
                np.array([caption.end for caption in captions], np.uint32),
                np.zeros(len(captions), np.uint16),
                np.array([len(text) for text in texts], np.uint32),
                np.empty(0, np.uint16),
                np.frombuffer(b"".join(texts), np.uint8),
            )
        )
        ids.append(video.video_id.encode("utf-8", "replace"))
    arrays = writer.finish()
    return [(ids, CaptionTable.open(folder, arrays))], counts


def _require_text(index: StoreIndex, cfg: CaptionConfig) -> None:
    if index.tokenizer_dir is None:
        raise StoreError(f"{index.meta.root} has no captions yet; give a caption file")
    rule = index.details["captions"]["config"]["deduplicate"]
    if rule != cfg.deduplicate:
        raise StoreError(
            f"the captions in {index.meta.root} were de-duplicated by {rule!r}; for {cfg.deduplicate!r} give their file"
        )


def _unchanged(index: StoreIndex, cfg: CaptionConfig, source: int | None, tokenizer: Tokenizer | None) -> bool:
    """Whether the store's captions came from the same file in the same way."""
    if index.tokenizer_dir is None:
        return False
    details = index.details["captions"]
    before = dict(details["config"])
    if tokenizer and tokenizer.sha256 == details["tokenizer_sha256"]:
        before["tokenizer"] = cfg.tokenizer  # the same vocabulary under another name or path
    elif tokenizer:
        return False
    return before == cfg.model_dump(mode="json") and source == details["source_crc32c"]


def _train_size(name: str) -> int:
    size = name.removeprefix(TRAIN_PREFIX)
    if not size.isdigit():
        raise ConfigError(f"tokenizer {name}: give {TRAIN_PREFIX}N with a number of pieces, like {TRAIN_PREFIX}8000")
    return int(size)
