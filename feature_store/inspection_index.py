"""The index at one moment: whether its snapshots are sound, and what the commit records say (see inspection.py)."""

from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager

import numpy as np

from feature_store.arrays import check_column
from feature_store.caption_table import COLUMNS, CaptionTable
from feature_store.index import StoreIndex, array_groups, current_snapshot, snapshot_key
from feature_store.layout import CURRENT, SNAPSHOTS, StoreMeta
from feature_store.problem import Kind, Problem
from feature_store.published import SNAPSHOT_COPY, Location
from feature_store.snapshot import row_milliseconds, snapshot_names
from feature_store.snapshot_files import derived_files, told_files, wrong_file
from feature_store.tokenizer import load_tokenizer
from vlm_dist.errors import StoreUnreachableError, VlmDistError

Video = tuple[bytes, int, int, int, int]
"""Id, shard, row, n_rows and crc32c of a video in a commit record."""


class IndexInspection:
    """One pass over the snapshots that are there when it is made; changes nothing.

    It is made before the commit records are read: whatever a snapshot names was committed before it, so that an
    extraction at work makes no snapshot of it wrong.
    """

    def __init__(self, meta: StoreMeta, deep: bool, fresh: bool) -> None:
        self.meta = meta
        self.deep = deep
        self.fresh = fresh  # judge the store itself, not what this node keeps of it
        self.problems: list[Problem] = []
        self.bad: list[str] = []  # names of the damaged snapshots
        self.derived: dict[str, bytes] = {}  # what damaged files must hold that follow from others, by key
        self.bad_current = False
        self.deleted: set[str] = set()  # ids that the current snapshot leaves out on purpose
        self.disputed: set[int] = set()  # shards of which the records say something else
        self.unrecorded: set[str] = set()  # ids that readers are told of, and no commit record
        self._current = _current(meta)  # before the names: what it names is there already
        self._names = snapshot_names(meta)

    def run(self, videos: Collection[Video], bad_shards: Collection[int]) -> None:
        """Looks at CURRENT and at every snapshot.

        Args:
            videos: of the good commit records.
            bad_shards: whose videos are named already.
        """
        self._look_at_current()
        if not self._names:
            return
        newest = self._names[-1]
        opened = self._current if self._current in self._names else newest
        sizes = {} if self.deep else self.meta.storage.sizes(SNAPSHOTS)
        for name in self._names:
            before = len(self.problems)
            try:
                # Of the others quick looks at names and sizes: there may be many, each as large as the captions.
                if (self.deep or self._files(name, sizes)) and (self.deep or name in (newest, opened)):
                    with self._opened(name) as index:
                        self._tables(index)
                        if name == opened:  # by readers
                            self.deleted = {key.decode() for key in index.deleted()}
                            self._against_commits(index, videos, bad_shards)
            except StoreUnreachableError:
                raise
            except FileNotFoundError:
                self._wrong(name, "", "has lost its files")
            except (VlmDistError, KeyError, ValueError, UnicodeDecodeError) as error:
                self._wrong(name, "", error)
            if len(self.problems) > before and self._is_pruned(name):
                del self.problems[before:]
                self.bad = [bad for bad in self.bad if bad != name]

    def _files(self, name: str, sizes: Mapping[str, int]) -> bool:
        """Whether a snapshot has all files, by a listing, that no others tell; those that others tell are made anew."""
        told = told_files(self.meta, name)
        if wrong := wrong_file(self.meta, told.own, sizes):
            self._wrong(name, "", wrong)
        elif wrong_file(self.meta, told.derived, sizes) or told.copy_differs:
            with self._opened(name) as index:
                self._derived(index)
        return name not in self.bad

    def _look_at_current(self) -> None:
        """The first snapshot is there a moment before CURRENT is; a second one is made after it."""
        wrong = ""
        if isinstance(self._current, VlmDistError):
            wrong = str(self._current)
        elif not self._current:
            wrong = "is missing" if len(self._names) > 1 and self.meta.storage.size(CURRENT) is None else ""
        elif self._current not in self._names and _current(self.meta) == self._current:  # else pruned in between
            wrong = f"names snapshot {self._current}, which is not there"
        if wrong:
            self.bad_current = True
            self.problems.append(Problem(kind="index", where=CURRENT, message=wrong))

    def _wrong(self, name: str, part: str, message: object, kind: Kind = "index") -> None:
        """Something is wrong with a snapshot itself: a repair takes it out."""
        self.problems.append(Problem(kind=kind, where=f"snapshot {name}{part}", message=str(message)))
        if name not in self.bad:
            self.bad.append(name)

    def _is_pruned(self, name: str) -> bool:
        """Whether a snapshot was taken out since the pass began, and readers open another."""
        return name not in snapshot_names(self.meta) and _current(self.meta) != name

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

    def _against_commits(self, index: StoreIndex, videos: Collection[Video], bad_shards: Collection[int]) -> None:
        """Every video of the snapshot that readers open must be in a sound commit, as it was committed."""
        columns = (index.shard, index.row, index.n_rows, index.crc32c)
        told = zip(index.id_list(), *(column.tolist() for column in columns), strict=True)
        for key, *place in told:
            if (key, *place) not in videos and place[0] not in bad_shards:
                message = f"is in no commit record as shard, row, rows, crc {place}"
                where = f"index {index.name}, video {key.decode()}"
                self.problems.append(Problem(kind="video", where=where, message=message))
                self.disputed.add(place[0])
                self.unrecorded.add(key.decode())

    def _tables(self, index: StoreIndex) -> None:
        """Lengths, pointers, times and token ids of a snapshot; with `deep` every array's checksum."""
        limits = index.n_rows.astype(np.int64) * row_milliseconds(self.meta)
        pending = index.pending()
        pieces = index.details["captions"].get("tokenizer_pieces", 0)
        parts = [("", index.captions, len(index.n_rows), limits)]
        if pending:
            parts.append(("pending", pending[1], len(pending[0]), np.full(len(pending[0]), 2**40)))
        for part, table, videos, limit in parts:
            if wrong := wrong_captions(table, videos, limit, pieces):
                self._wrong(index.name, f" {part}".rstrip(), wrong, "captions")
        if not self.deep:
            return
        for part, arrays in array_groups(index.details).items():
            for name, info in arrays.items():
                if check_column(index.folder / part, name, info):
                    continue
                self._wrong(index.name, f", array {part}/{name}".replace(" /", " "), "crc32c differs")
                if name in COLUMNS and not part:
                    self._damaged_captions(index)
        self._derived(index)

    def _derived(self, index: StoreIndex) -> None:
        """Files that follow from others are made anew where they lie, and the snapshot stays."""
        folder = index.tokenizer_dir
        if folder and not folder.is_dir():
            self._wrong(index.name, ", tokenizer", "is missing")
            return
        if folder and load_tokenizer(str(folder)).sha256 != index.details["captions"]["tokenizer_sha256"]:
            self._wrong(index.name, ", tokenizer", "is not the one that made the tokens")
            return
        location = Location.of(self.meta.storage, snapshot_key(index.name))
        base = location.folder if location else snapshot_key(index.name)
        for name, data in derived_files(index).items():
            path = index.folder / name
            if not path.is_file() or path.read_bytes() != data:
                self.derived[f"{base}/{name}"] = data
                where = f"snapshot {index.name}, {name}"
                wrong = "differs from snapshot.json" if name == SNAPSHOT_COPY else "is not what belongs there"
                self.problems.append(Problem(kind="metadata", where=where, message=wrong))

    def _damaged_captions(self, index: StoreIndex) -> None:
        for video in range(index.num_videos):
            try:
                index.check_captions(video)
            except StoreUnreachableError:
                raise
            except VlmDistError as error:
                self._wrong(index.name, f", video {index.video_id(video)}", error, "captions")


def _current(meta: StoreMeta) -> str | VlmDistError:
    """What CURRENT names; empty where there is none, an error where it is damaged."""
    try:
        return current_snapshot(meta)
    except StoreUnreachableError:
        raise
    except VlmDistError as error:
        return error


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
