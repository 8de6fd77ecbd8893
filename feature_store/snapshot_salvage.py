"""The newest snapshot is damaged → the next one, of all that is sound of it (index → index; see verify.py).

Deletions, splits and captions are in no commit record: what a repair does not keep of them is lost. Each part is taken
from the damaged snapshot where it is sound, else from the newest older one that has it sound. The next snapshot is
published before the damaged one is taken out: after a kill in between a further repair finds it there.
"""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from feature_store.caption_table import CaptionTable, TableWriter, VideoCaptions
from feature_store.caption_tokens import with_tokens
from feature_store.draft import Captions, Draft, Marks, VideoColumns
from feature_store.files import disk_guard
from feature_store.layout import StoreMeta, scratch_name
from feature_store.snapshot import committed_videos, publish_draft, snapshot_names, told_number
from feature_store.snapshot_parts import SnapshotParts, opened_parts
from feature_store.tokenizer import Tokenizer

_NAMED = 5


@dataclass
class _Told:
    """What the repair says of it."""

    kept: list[str] = field(default_factory=list[str])
    lost: list[str] = field(default_factory=list[str])


def salvage_snapshot(meta: StoreMeta, bad: Sequence[str]) -> tuple[str, list[str]]:
    """Makes a new snapshot where the newest is damaged, and says what was kept and lost; takes nothing out.

    Makes none where the newest itself is gone, or its snapshot.json with the copy, and an older one is sound: all of it
    is lost.

    Args:
        meta: the store; all of its commit records are sound.
        bad: names of the damaged snapshots.

    Returns:
        The new snapshot's name, empty where none was made; and what to say.
    """
    names = snapshot_names(meta)
    done: list[str] = []
    if (gone := told_number(meta)) > max(map(int, names), default=0):
        done.append(_all_lost(f"{gone:06d}", "its folder is gone"))
    if not names or names[-1] not in bad:
        return "", done
    with ExitStack() as stack:
        sources: list[SnapshotParts] = []  # newest first, down to the first that is sound
        for name in reversed(names):
            if parts := stack.enter_context(opened_parts(meta, name)):
                sources.append(parts)
            elif not sources:
                done.append(_all_lost(name, "snapshot.json or LOCATION"))
            if name not in bad:
                break
        if not sources or sources[0].name not in bad:
            return "", done
        scratch = meta.storage.scratch(scratch_name("salvage"))
        try:
            name, lines = _rebuild(meta, sources, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return name, [*done, *lines]


def _rebuild(meta: StoreMeta, sources: Sequence[SnapshotParts], scratch: Path) -> tuple[str, list[str]]:
    first = sources[0]
    if not (first.count("deleted") or first.splits or first.tokenizer_sha256):
        return "", []  # the commit records tell all that it told
    told = _Told()
    committed = committed_videos(meta)
    deleted = _deleted(sources, committed, told)
    splits = _splits(sources, told)
    captions = _captions(sources, committed, deleted, scratch, told)
    name = publish_draft(meta, Draft(committed.without(deleted), captions, Marks(deleted, splits)))
    *most, last = told.kept or ["nothing"]
    kept = f"{', '.join(most)} and {last}" if most else last
    done = [f"kept {kept} of damaged snapshot {first.name} in snapshot {name}"]
    if told.lost:
        done.append(f"lost with snapshot {first.name}: {'; '.join(told.lost)}")
    return name, done


def _deleted(sources: Sequence[SnapshotParts], committed: VideoColumns, told: _Told) -> list[bytes]:
    first = sources[0]
    deleted = first.ids("deleted")
    if deleted is None and (listed := first.ids("")) is not None:  # what it left out of the committed videos
        gone = set(committed.ids).difference(listed)
        known = (gone.intersection([*(other.ids("") or ()), *(other.ids("deleted") or ())]) for other in sources[1:])
        deleted = next((ids for ids in map(sorted, (gone, *known)) if first.has("deleted", ids)), None)
    if deleted is not None:
        if deleted:
            told.kept.append(_number(len(deleted), "deletion"))
        return deleted
    what = f"its list of {_number(first.count('deleted'), 'deleted video')}"
    for older in sources[1:]:
        if deleted := older.ids("deleted"):
            told.lost.append(f"{what} (that of snapshot {older.name} with {len(deleted)} is used: delete the others)")
            return deleted
    told.lost.append(f"{what}, and no older one is left: they are read again; delete them again")
    return []


def _splits(sources: Sequence[SnapshotParts], told: _Told) -> dict[str, list[bytes]]:
    splits: dict[str, list[bytes]] = {}
    kept = 0
    for name in sources[0].splits:
        for source in sources:
            if (ids := source.ids(f"splits/{name}")) is None:
                continue
            splits[name] = ids
            kept += source is sources[0]
            if source is not sources[0]:
                told.lost.append(f"split {name} (that of snapshot {source.name} is used)")
            break
        else:
            told.lost.append(f"split {name}")
    if kept:
        told.kept.append(_number(kept, "split"))
    return splits


def _captions(
    sources: Sequence[SnapshotParts], committed: VideoColumns, deleted: list[bytes], scratch: Path, told: _Told
) -> Captions:
    """The captions of the newest snapshot whose tokenizer is left, and of older ones, by the same tokenizer."""
    for number, source in enumerate(sources):
        if not (sha256 := source.tokenizer_sha256):
            break  # from before there were captions
        same = [other for other in sources if other.tokenizer_sha256 == sha256]
        tokenizer = next((found for other in same if (found := other.tokenizer())), None)
        if tokenizer is None:
            continue
        tokenizer.save(scratch / "tokenizer")
        dtype = source.details["arrays"]["tokens"]["dtype"]
        if number:
            told.lost.append(f"its tokenizer, and with it its captions (those of snapshot {source.name} are used)")
        merge = _Merge(committed, deleted, tokenizer, source, dtype)
        with disk_guard(scratch, sum(path.stat().st_size for path in source.folder.rglob("*") if path.is_file())):
            table = merge.run(sources[number:], scratch / "table")
        merge.tell(told, kept=not number)
        return Captions([table] if table[0] else [], scratch / "tokenizer", dtype, source.details["captions"])
    if sources[0].tokenizer_sha256:
        told.lost.append("its tokenizer, and with it all captions: write them again")
    return Captions()


class _Merge:
    """The sound captions of several snapshots as one table; the first that has a video's counts.

    Where tokens are damaged, or another tokenizer's, and the text is sound, they are made anew.
    """

    def __init__(
        self, committed: VideoColumns, deleted: list[bytes], tokenizer: Tokenizer, source: SnapshotParts, dtype: str
    ) -> None:
        self.committed, self.deleted = committed, set(deleted)
        self.tokenizer, self.dtype = tokenizer, dtype
        self.limits = source.details["captions"]
        self.whole = 0  # videos with sound captions in the first snapshot
        self.broken: dict[bytes, bool] = {}  # ids whose captions there are damaged: whether older ones are used
        self.unknown = 0  # videos there whose ids are damaged
        self.older = 0  # videos with captions of older snapshots
        self.anew = 0  # videos in the first snapshot whose tokens were made from their text

    def run(self, sources: Sequence[SnapshotParts], folder: Path) -> tuple[list[bytes], CaptionTable]:
        """Writes the table, and gives it with its ids."""
        writer, ids = TableWriter(folder, self.dtype), list[bytes]()
        settled: set[bytes] = set()
        for source in sources:
            for part in ("", "pending"):
                listed = self._listed(part, source, sources)
                if listed is None:
                    self.unknown += source.count(part) if source is sources[0] else 0
                    continue
                for key, sound, captions in source.captions(part, listed) if listed else ():
                    lost = not sound and captions is None
                    if source is sources[0]:
                        self.whole += captions is not None
                        self.anew += not sound and not lost
                        self.broken |= {key: False} if lost else {}
                    if key in settled or lost:
                        continue
                    if captions is not None and (not sound or source.tokenizer_sha256 != self.tokenizer.sha256):
                        captions = self._tokenised(captions)
                    settled.add(key)
                    if captions is not None:
                        ids.append(key)
                        writer.append(captions)
                        if source is not sources[0]:
                            self.older += 1
                            self.broken |= {key: True} if key in self.broken else {}
        return ids, CaptionTable.open(folder, writer.finish())

    def _tokenised(self, captions: VideoCaptions) -> VideoCaptions:
        texts = [text[: self.limits["max_chars"]] for text in captions.texts()]
        pieces = [found[: self.limits["max_tokens"]] for found in self.tokenizer.encode_many(texts)]
        return with_tokens(captions, pieces, self.dtype)

    def _listed(self, part: str, source: SnapshotParts, sources: Sequence[SnapshotParts]) -> list[bytes] | None:
        """The ids of a part; where they are damaged, those that their checksums fit."""
        if (ids := source.ids(part)) is not None or part:
            return ids
        lists = (self.committed.ids, *(other.ids("") or () for other in sources if other is not source))
        tried = ([key for key in listed if key not in self.deleted] for listed in lists)
        return next((ids for ids in tried if source.has("", ids)), None)

    def tell(self, told: _Told, kept: bool) -> None:
        """Says what became of the captions."""
        whole = self.whole + len(self.broken) + self.unknown
        if kept and self.whole:
            anew = f" (the tokens of {self.anew} made anew from their text)" if self.anew else ""
            told.kept.append(f"the captions of {self.whole} of {_number(whole, 'video')}{anew}")
        for older, how in ((True, " (older ones are used)"), (False, "")):
            if ids := sorted(key for key, used in self.broken.items() if used == older):
                more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
                named = ", ".join(key.decode() for key in ids[:_NAMED])
                told.lost.append(f"captions of {named}{more}{how}")
        if self.unknown:
            used = f" (those of {_number(self.older, 'video')} in older snapshots are used)" if self.older else ""
            told.lost.append(f"captions of {_number(self.unknown, 'video')} whose ids are damaged{used}")


def _all_lost(name: str, why: str) -> str:
    return f"lost with snapshot {name}: what was deleted, split and said in it ({why})"


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
