"""One look at a whole store: what is not as the records say, and where (any store → its problems).

Quick: plan, commit records, shard files (size), index snapshots and captions fit each other. Deep: every checksum too.
States that a kill can leave (a staged attempt, a commit that is not published yet) are no problems.
"""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from feature_store.arrays import check_column
from feature_store.caption_table import COLUMNS, CaptionTable
from feature_store.commit import Commit, commit_key, committed_shards, iter_records, shard_place
from feature_store.index import StoreIndex, array_groups, current_snapshot, snapshot_key
from feature_store.layout import CURRENT, FEATURES_JSON, SNAPSHOTS, StoreMeta, shard_key
from feature_store.plan import array_fits, read_segment, segment_numbers
from feature_store.plan_repair import missing_segments
from feature_store.shard import shard_bytes
from feature_store.shard_check import broken_videos, check_shard
from feature_store.snapshot import row_milliseconds, snapshot_names
from feature_store.snapshot_files import wrong_file
from feature_store.storage import fetched
from feature_store.tokenizer import load_tokenizer
from vlm_dist.errors import StoreError, StoreUnreachableError, VlmDistError

Kind = Literal["metadata", "plan", "commit", "shard", "chunk", "video", "index", "captions", "stray"]


class Problem(BaseModel):
    """One thing that is wrong."""

    model_config = ConfigDict(frozen=True)

    kind: Kind
    where: str = Field(description="The file, and shard, chunk or video.")
    message: str


class Inspection:
    """One pass over a store; changes nothing. Beside `problems` it remembers what a repair has to take out."""

    def __init__(self, meta: StoreMeta, deep: bool, fresh: bool) -> None:
        self.meta = meta
        self.deep = deep
        self.fresh = fresh  # judge the store itself, not what this node keeps of it
        self.planned: dict[int, set[str]] = {}
        self.problems: list[Problem] = []
        self.bytes_checked = 0
        self.bad_segments: list[int] = []
        self.shards = 0  # records
        self.bad_shards: list[int] = []
        self.bad_records: list[int] = []  # of these, those whose record cannot be read
        self.damaged: list[int] = []  # of these, those whose record is sound, and the file is not
        self.bad_snapshots: list[str] = []
        self.lost: set[str] = set()  # ids that bad shards and orphans do not have whole
        self.deleted: set[str] = set()  # ids that the current snapshot leaves out on purpose
        self.orphans: list[str] = []  # keys
        self.published: dict[str, int] = {}  # bytes of every published shard, by key
        self.ids: dict[int, list[str]] = {}  # of each good commit
        self.videos: set[tuple[bytes, int, int, int, int]] = set()  # id, shard, row, n_rows, crc32c of good commits

    def run(self) -> None:
        """Looks at everything."""
        # Before the records: what an extraction at work publishes meanwhile is no stray.
        self.published = self.meta.storage.sizes("features/c")
        self.planned = self._plan()
        for shard, commit in iter_records(self.meta):
            self._commit(shard, commit)
        self._orphans()
        self._current()
        self._snapshots()

    def _report(self, kind: Kind, where: Path | str, message: object) -> None:
        self.problems.append(Problem(kind=kind, where=str(where), message=str(message)))

    def _plan(self) -> dict[int, set[str]]:
        """Planned ids by shard; checks that segments follow each other and that the array has room for them."""
        planned: dict[int, set[str]] = {}
        for number in missing_segments(self.meta):
            self.bad_segments.append(number)
            self._report("plan", f"plan segment {number}", "is missing")
        for number in segment_numbers(self.meta):
            try:
                segment = read_segment(self.meta, number)
            except StoreUnreachableError:
                raise
            except VlmDistError as error:
                self.bad_segments.append(number)
                self._report("plan", f"plan segment {number}", error)
                continue
            if not self.bad_segments and segment.first_shard != len(planned):
                self._report(
                    "plan", f"plan segment {number}", f"begins at shard {segment.first_shard}, not {len(planned)}"
                )
            planned |= {task.shard: {video.video_id for video in task.videos} for task in segment.tasks}
        shards = max(planned, default=-1) + 1
        if not self.bad_segments and not array_fits(self.meta, shards):
            self._report("metadata", self.meta.place(FEATURES_JSON), f"is not the metadata of {shards} planned shards")
        return planned

    def _commit(self, shard: int, commit: Commit | StoreError) -> None:
        self.shards += 1
        if isinstance(commit, StoreError):
            self._report("commit", self.meta.place(commit_key(shard)), commit)
            self.bad_shards.append(shard)
            self.bad_records.append(shard)
            self.lost.update(self.planned.get(shard, ()))  # it tells nothing; perhaps all that was planned is lost
            return
        before = len(self.problems)
        row = 0
        for record in commit.videos:
            where = f"shard {shard}, video {record.video_id}"
            if not self.bad_segments and record.video_id not in self.planned.get(shard, ()):
                self._report("commit", where, "is not planned for this shard")
            if record.status == "ok":
                if record.row != row or not record.n_rows:
                    self._report("commit", where, f"{record.n_rows} rows from {record.row}, expected from {row}")
                row = record.row + record.n_rows
        if row != commit.rows or commit.size != (shard_bytes(self.meta, row) if row else 0):
            self._report("commit", self.meta.place(commit_key(shard)), f"{commit.size} bytes do not fit {row} rows")
        ok = [record for record in commit.videos if record.status == "ok"]
        self.ids[shard] = [record.video_id for record in commit.videos]
        self.videos.update((r.video_id.encode(), shard, r.row, r.n_rows, r.crc32c) for r in ok)
        if len(self.problems) > before:
            self.bad_shards.append(shard)
            self.lost.update(self.ids[shard])
        elif not self._shard(commit):
            self.bad_shards.append(shard)
            self.damaged.append(shard)

    def _shard(self, commit: Commit) -> bool:
        """Whether the file of a sound record is as it says; else its videos that are not whole are lost."""
        if not commit.size:
            return True
        before = len(self.problems)
        key, size = shard_place(self.meta, commit, self.published)
        where = f"shard {commit.shard} ({self.meta.place(key)})"
        if size is None:
            self._report("shard", where, "is committed, but the file is missing")
            self.lost.update(record.video_id for record in commit.videos if record.status == "ok")
            return False
        if size == commit.size and not self.deep:
            return True
        with fetched(self.meta.storage, key) as path:
            if size != commit.size:
                self._report("shard", where, f"has {size:,} bytes, {commit.size:,} were committed")
            else:
                self.bytes_checked += size
                for kind, which, what in check_shard(self.meta, commit, path):
                    self._report(kind, f"{where}{which}", what)
            if len(self.problems) > before:
                self.lost.update(record.video_id for record in broken_videos(self.meta, commit, path))
        return len(self.problems) == before

    def sound_ids(self) -> set[str]:
        """Ids of the videos that some shard has whole."""
        bad = set(self.bad_shards)
        return {key.decode() for key, shard, *_ in self.videos if shard not in bad}

    def _orphans(self) -> None:
        committed = {shard_key(shard) for shard in committed_shards(self.meta)}
        for key in sorted(self.published.keys() - committed):
            self.orphans.append(key)
            number = key.split("/")[2]
            self.lost.update(self.planned.get(int(number), ()) if number.isdigit() else ())
            self._report("stray", self.meta.place(key), "is a shard whose commit record is lost")

    def _current(self) -> None:
        """The first snapshot is there a moment before CURRENT is; a second one is made after it."""
        if len(snapshot_names(self.meta)) > 1 and self.meta.storage.size(CURRENT) is None:
            self._report("index", CURRENT, "is missing")

    def _snapshots(self) -> None:
        names = snapshot_names(self.meta)
        try:
            current = current_snapshot(self.meta)
            if current and current not in names:
                self._report("index", CURRENT, f"names snapshot {current}, which is not there")
        except StoreUnreachableError:
            raise
        except VlmDistError as error:
            self._report("index", CURRENT, error)
            current = names[-1] if names else ""
        # Of the others quick looks at names and sizes: there may be many, each as large as the captions.
        looked_at = names if self.deep else {*names[-1:], current}
        sizes = {} if self.deep else self.meta.storage.sizes(SNAPSHOTS)
        for name in names:
            before = len(self.problems)
            try:
                if name in looked_at:
                    self._snapshot(name, counts=name == max(names[-1], current))
                elif wrong := wrong_file(self.meta, name, sizes):
                    self._report("index", f"snapshot {name}", wrong)
            except StoreUnreachableError:
                raise
            except FileNotFoundError:
                self._report("index", f"snapshot {name}", "has lost its files")
            except (VlmDistError, KeyError, ValueError, UnicodeDecodeError) as error:
                self._report("index", f"snapshot {name}", error)
            if any(problem.where.startswith("snapshot") for problem in self.problems[before:]):
                self.bad_snapshots.append(name)

    def _snapshot(self, name: str, counts: bool) -> None:
        """A whole snapshot; where it `counts`, as the one that readers open, also against the commits."""
        with self._opened(name) as index:
            self._tables(index)
            if counts:
                self.deleted = {key.decode() for key in index.deleted()}
                self._against_commits(index)

    @contextmanager
    def _opened(self, name: str) -> Generator[StoreIndex]:
        """A snapshot as the store has it."""
        if self.fresh:
            with self.meta.storage.copied(snapshot_key(name)) as folder:
                yield StoreIndex(self.meta.root, name, folder)
        else:
            index = StoreIndex(self.meta.root, name)
            if self.meta.storage.local("") is None:
                index.check_all()  # a damaged copy of this node is not judged, but fetched again
            yield index

    def _against_commits(self, index: StoreIndex) -> None:
        """Every video of the snapshot that readers open must be in a sound commit, as it was committed."""
        columns = (index.shard, index.row, index.n_rows, index.crc32c)
        told = zip(index.id_list(), *(column.tolist() for column in columns), strict=True)
        for key, *place in told:
            if (key, *place) not in self.videos and place[0] not in self.bad_shards:
                message = f"is in no commit record as shard, row, rows, crc {place}"
                self._report("video", f"index {index.name}, video {key.decode()}", message)

    def _tables(self, index: StoreIndex) -> None:
        """Lengths, pointers, times and token ids of a snapshot; with `deep` every array's checksum."""
        where = f"snapshot {index.name}"
        limits = index.n_rows.astype(np.int64) * row_milliseconds(self.meta)
        pending = index.pending()
        pieces = index.details["captions"].get("tokenizer_pieces", 0)
        parts = [("", index.captions, len(index.n_rows), limits)]
        if pending:
            parts.append(("pending", pending[1], len(pending[0]), np.full(len(pending[0]), 2**40)))
        for part, table, videos, limit in parts:
            if wrong := wrong_captions(table, videos, limit, pieces):
                self._report("captions", f"{where} {part}".strip(), wrong)
        if not self.deep:
            return
        for part, arrays in array_groups(index.details).items():
            for name, info in arrays.items():
                if check_column(index.folder / part, name, info):
                    continue
                self._report("index", f"{where}, array {part}/{name}".replace(" /", " "), "crc32c differs")
                if name in COLUMNS and not part:
                    self._damaged_captions(index)
        folder = index.tokenizer_dir
        if folder and load_tokenizer(str(folder)).sha256 != index.details["captions"]["tokenizer_sha256"]:
            self._report("index", f"{where}, tokenizer", "is not the one that made the tokens")

    def _damaged_captions(self, index: StoreIndex) -> None:
        for video in range(index.num_videos):
            try:
                index.check_captions(video)
            except StoreUnreachableError:
                raise
            except VlmDistError as error:
                self._report("captions", f"snapshot {index.name}, video {index.video_id(video)}", error)


def wrong_captions(table: CaptionTable, videos: int, limits_ms: np.ndarray, pieces: int) -> str:
    """What does not fit in a caption table of so many videos; empty where all does."""
    sizes = (("clip_ptr", len(table.clip_start_ms)), ("tok_ptr", len(table.tokens)), ("text_ptr", len(table.text)))
    for name, size in sizes:
        pointers: np.ndarray = getattr(table, name)
        if len(pointers) != videos + 1 or pointers[0] != 0 or pointers[-1] != size or (np.diff(pointers) < 0).any():
            return f"{name} does not lead through {videos} videos and {size} entries"
    for pointers, counts in ((table.tok_ptr, table.clip_ntok), (table.text_ptr, table.clip_ntext)):
        if not np.array_equal(np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])[table.clip_ptr], pointers):
            return "the captions' lengths do not add up to the videos' pointers"
    if (table.clip_start_ms >= table.clip_end_ms).any():
        return "a caption starts at or after its end"
    if (table.clip_end_ms > np.repeat(limits_ms, np.diff(table.clip_ptr))).any():
        return "a caption ends after its video"
    if len(table.tokens) and int(table.tokens.max()) >= pieces:
        return f"a token is not one of the tokenizer's {pieces} pieces"
    return ""
