"""Index snapshot → who, where, when and what was said: memory-mapped columns over all videos and captions.

Opening reads one small JSON file and maps the arrays, whatever the size of the corpus; private memory stays small.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from feature_store.arrays import ArrayInfo, check_column, open_column
from feature_store.caption_table import CaptionTable, VideoCaptions, unpack_ids
from feature_store.files import crc32c, descriptor_guard, read_file, unseal_as
from feature_store.layout import CURRENT, SNAPSHOTS, StoreMeta, open_store
from feature_store.published import SNAPSHOT_COPY, SNAPSHOT_JSON, Tree
from feature_store.storage import Root
from vlm_dist.errors import StoreError, StoreUnreachableError

VIDEO_COLUMNS = ("shard", "row", "n_rows", "crc32c", "status")
STATUS_OK = 0
_NAMED = 5
_POINTERS = ("clip_ptr", "tok_ptr", "text_ptr", "caption_crc32c")
_TOLD = {"arrays", "captions", "failed", "fingerprint", "pending"}  # in every snapshot.json, and in no other file
Found = TypeVar("Found")
_CHECKED_AT_ONCE = ("video_id", "video_id_ptr", *VIDEO_COLUMNS, *_POINTERS)


class StoreIndex:
    """One immutable snapshot of a store; holds the V videos that have features, sorted by the bytes of their id.

    Attributes:
        name: of the snapshot.
        shard, row, n_rows, crc32c: (V,) u32; where a video's rows are, their number (seconds), their checksum.
        status: (V,) u8; 0 is ok. Videos without features are in the commit records (see `info.failures`).
        clip_ptr, tok_ptr: (V+1,) i64; the video's captions in the clip columns, its tokens in `tokens`.
        clip_start_ms, clip_end_ms: (C,) u32, start < end <= length of the video, starts ascend within a video.
        clip_ntok: (C,) u16. tokens: (T,) u16 or u32, without special tokens.
        fingerprint: of ids, features, captions, tokens and provenance; not of time, place or sharding.
        details: the rest of snapshot.json (captions, failed, parent, ...).
    """

    def __init__(self, root: Root, snapshot: str = "", folder: Path | None = None, checked: bool = False) -> None:
        """Opens a snapshot.

        Args:
            root: the store.
            snapshot: of that name; empty takes the one that CURRENT names.
            folder: where the caller has it, as `Storage.copied` gives it; else the store's own, or what the node keeps.
            checked: compare the columns with their checksums before the first id is told; opening itself reads none.

        Raises:
            StoreError: no store, no snapshot yet, or a damaged one.
        """
        self.meta: StoreMeta = open_store(root)
        self.name = snapshot or current_snapshot(self.meta)
        if not self.name:
            if sum(name.isdigit() for name in self.meta.storage.names(SNAPSHOTS)) > 1:  # one is there before CURRENT
                raise StoreError(f"{root} has lost {CURRENT}: run `vlm-dist store verify --repair` on it")
            raise StoreError(
                f"{root} has no index yet: type the `vlm-dist extract` or `store import` that began it again"
            )
        self._unchecked = checked
        self._tree = Tree(folder) if folder else self._find()
        self._sound(self._map)

    def _find(self) -> Tree:
        try:
            with descriptor_guard(self.meta.place(snapshot_key(self.name))):
                return self.meta.storage.tree(snapshot_key(self.name))
        except FileNotFoundError:
            raise self._missing() from None

    def _map(self) -> None:
        """Maps the columns."""
        path = self.folder / SNAPSHOT_JSON
        try:
            self.details: dict[str, Any] = snapshot_details(read_file(path), path, self.name)
        except FileNotFoundError:
            raise self._missing() from None
        self.fingerprint: str = self.details["fingerprint"]
        arrays = self.details["arrays"]
        self._ids = open_column(self.folder, "video_id", arrays["video_id"])
        self._id_ptr = open_column(self.folder, "video_id_ptr", arrays["video_id_ptr"])
        columns = (open_column(self.folder, name, arrays[name]) for name in VIDEO_COLUMNS)
        self.shard, self.row, self.n_rows, self.crc32c, self.status = columns
        self.captions = CaptionTable.open(self.folder, arrays)
        self.clip_ptr, self.tok_ptr = self.captions.clip_ptr, self.captions.tok_ptr
        self.clip_start_ms, self.clip_end_ms = self.captions.clip_start_ms, self.captions.clip_end_ms
        self.clip_ntok, self.tokens = self.captions.clip_ntok, self.captions.tokens

    def _sound(self, look: Callable[[], Found]) -> Found:
        """What `look` finds; where it meets damage in a copy that this node keeps, it looks at a new copy, once."""
        with descriptor_guard(self.folder):
            if not self._tree.current:  # others found it damaged
                self._renew()
            try:
                return look()
            except StoreUnreachableError:
                raise
            except StoreError:
                if not self._tree.drop():
                    raise
            self._renew()
            return look()

    def _renew(self) -> None:
        self._tree = self._find()
        self._map()

    def _missing(self) -> StoreError:
        missing = f"{self.meta.root} has no index snapshot {self.name}"
        there = [name for name in self.meta.storage.names(SNAPSHOTS) if name.isdigit()]
        lost = self.name in there  # its folder is there, and empty
        with suppress(StoreError):
            lost = lost or current_snapshot(self.meta) == self.name
        if lost:
            return StoreError(f"{missing}; run `vlm-dist store verify --repair` on it")
        newest = ", ".join(sorted(there, key=int)[-_NAMED:]) or "none"
        return StoreError(f"{missing} (the newest are: {newest}): it was pruned, or its name is another")

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, None, bool]]:
        return type(self), (self.meta.root, self.name, None, self._unchecked)

    @property
    def folder(self) -> Path:
        """Where its files are now; what is opened below it later must be held by this index."""
        return self._tree.folder

    @property
    def num_videos(self) -> int:
        """V, videos with features."""
        return len(self.n_rows)

    @property
    def num_clips(self) -> int:
        """C, captions of those videos."""
        return len(self.clip_ntok)

    @property
    def num_tokens(self) -> int:
        """T, tokens of those captions."""
        return len(self.tokens)

    @property
    def tokenizer_dir(self) -> Path | None:
        """Folder of the tokenizer that made the tokens; None before there are captions."""
        if not self.details["captions"]:
            return None
        return self._sound(lambda: self.folder / "tokenizer")

    def video_id(self, video: int) -> str:
        """Id of a video by number."""
        self.require_checked()
        return self._id_bytes(video).decode()

    def find(self, video_id: str) -> int:
        """Number of a video by id; -1 where the snapshot has no features of it."""
        self.require_checked()
        key = video_id.encode("utf-8", "replace")
        at = bisect_left(range(self.num_videos), key, key=self._id_bytes)
        return at if at < self.num_videos and self._id_bytes(at) == key else -1

    def find_many(self, video_ids: Sequence[str]) -> np.ndarray:
        """(n,) int64 numbers of videos, -1 where absent."""
        if len(video_ids) * 64 < self.num_videos:
            return np.fromiter(map(self.find, video_ids), np.int64, len(video_ids))
        numbers = {key: number for number, key in enumerate(self.id_list())}
        keys = (video_id.encode("utf-8", "replace") for video_id in video_ids)
        return np.fromiter((numbers.get(key, -1) for key in keys), np.int64, len(video_ids))

    def id_list(self) -> list[bytes]:
        """All ids as UTF-8, in order: a Python object per video, so for work on the whole store only."""
        self.require_checked()
        return unpack_ids(self._ids, self._id_ptr)

    def clip_text(self, clip: int) -> str:
        """Text of one caption by its number in the clip columns (cleaned, de-duplicated, not cut)."""
        video = int(np.searchsorted(self.clip_ptr, clip, "right")) - 1
        captions = self.captions.video(video)
        before = clip - int(self.clip_ptr[video])
        start = int(captions.ntext[:before].sum(dtype=np.int64))
        return captions.text[start : start + int(captions.ntext[before])].tobytes().decode()

    def require_checked(self) -> None:
        """`check_columns`, once, where the index was opened so; StoreError as long as one differs."""
        if self._unchecked:
            self.check_columns()
            self._unchecked = False

    def check_columns(self) -> None:
        """Compares the columns with an entry a video (who is where) with their checksums; StoreError if one differs.

        About 100 bytes a video are read; the columns over clips and tokens are compared a video at a time.
        """
        self._sound(lambda: self._require("", {name: self.details["arrays"][name] for name in _CHECKED_AT_ONCE}))

    def check_captions(self, video: int) -> VideoCaptions:
        """Captions of a video whose checksum is compared; StoreError names the video where it differs."""
        return self._sound(lambda: self._sound_captions(video))

    def _sound_captions(self, video: int) -> VideoCaptions:
        captions = self.captions.video(video)
        if captions.crc32c() != self.captions.caption_crc32c[video]:
            raise StoreError(
                f"captions of video {self.video_id(video)} are damaged in {self.folder} (crc32c differs); "
                "run `vlm-dist store verify --deep --repair` on the store"
            )
        return captions

    def pending(self) -> tuple[list[bytes], CaptionTable] | None:
        """Ids and captions that wait for features, if there are any."""
        return self._sound(self._open_pending)

    def _open_pending(self) -> tuple[list[bytes], CaptionTable] | None:
        arrays = self.details["pending"]
        if not arrays:
            return None
        folder = self.folder / "pending"
        raw, ptr = (open_column(folder, name, arrays[name]) for name in ("video_id", "video_id_ptr"))
        return unpack_ids(raw, ptr), CaptionTable.open(folder, arrays)

    def deleted(self) -> list[bytes]:
        """Ids of the videos that were deleted from this snapshot; their rows stay where they are."""
        return self._sound(lambda: self._marked("deleted", self.details["deleted"]))

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return sorted(self.details["splits"])

    def split_ids(self, name: str) -> list[bytes]:
        """Ids of a named split, sorted; they need not be in the store (yet).

        Raises:
            StoreError: there is no such split; those that are there are named.
        """
        if name not in self.details["splits"]:
            there = ", ".join(self.splits) or "none"
            raise StoreError(f"{self.meta.root} has no split {name!r} (there is: {there}); make it with `store split`")
        return self._sound(lambda: self._marked(f"splits/{name}", self.details["splits"][name]))

    def _marked(self, folder: str, arrays: dict[str, ArrayInfo]) -> list[bytes]:
        if not arrays:
            return []
        self._require(folder, arrays)
        raw, ptr = (open_column(self.folder / folder, name, arrays[name]) for name in ("video_id", "video_id_ptr"))
        return unpack_ids(raw, ptr)

    def check_all(self) -> bool:
        """Compares every column with its checksum, as it must be before anything is copied into another snapshot.

        Returns:
            False where a copy that this node keeps was damaged, and is mapped anew: what was taken from the columns
            before is not to be used.

        Raises:
            StoreError: names the first that differs.
        """
        before = self._tree
        self._sound(self._require_all)
        return self._tree is before

    def _require_all(self) -> None:
        self._require_copy()
        for folder, arrays in array_groups(self.details).items():
            self._require(folder, arrays)

    def _require_copy(self) -> None:
        """Where both are whole and differ, one is another snapshot's: of old ones, that do not tell their name."""
        path = self.folder / SNAPSHOT_COPY
        try:
            copied = snapshot_details(read_file(path), path, self.name)
        except (FileNotFoundError, StoreError):  # nothing is read from it; a repair makes it anew
            return
        if copied != self.details:
            raise StoreError(
                f"{self.folder / SNAPSHOT_JSON} and {SNAPSHOT_COPY} beside it differ: a file was copied or renamed; "
                "run `vlm-dist store verify --repair` on the store"
            )

    def _require(self, folder: str, arrays: dict[str, ArrayInfo]) -> None:
        for name, info in arrays.items():
            if not check_column(self.folder / folder, name, info):
                raise StoreError(
                    f"index array {name} in {self.folder / folder} is damaged (crc32c differs); "
                    "run `vlm-dist store verify --deep --repair` on the store"
                )

    def _id_bytes(self, video: int) -> bytes:
        return self._ids[self._id_ptr[video] : self._id_ptr[video + 1]].tobytes()


def snapshot_key(name: str) -> str:
    """Where a snapshot is published."""
    return f"{SNAPSHOTS}/{name}"


def snapshot_details(data: bytes, where: Path | str, name: str) -> dict[str, Any]:
    """What the snapshot.json of that snapshot says; StoreError where it is damaged, or another's.

    Snapshots of before it told their own name have none in it.
    """
    details = unseal_as("the snapshot.json of a snapshot", data, where, _details)
    if (own := details.get("name", name)) != name:
        raise StoreError(
            f"{where} is that of snapshot {own}: a file was copied or renamed; "
            "run `vlm-dist store verify --repair` on the store"
        )
    return details


def _details(body: dict[str, Any]) -> dict[str, Any]:
    marks: dict[str, Any] = {"deleted": {}, "splits": {}}  # snapshots of schema 1 have none
    details = marks | body
    if lacking := _TOLD - details.keys():
        raise KeyError(*lacking)
    # `files` are those of no array, with their bytes where they are known. Before it was told, a tokenizer had these.
    tokenizer = ("vocab.txt", "tokenizer.json", "tokenizer_config.json") if details["captions"] else ()
    return {"files": {f"tokenizer/{name}": None for name in tokenizer}} | details


def array_groups(details: dict[str, Any]) -> dict[str, dict[str, ArrayInfo]]:
    """All arrays of a snapshot, by their folder in it."""
    marks = {f"splits/{name}": arrays for name, arrays in details["splits"].items()}
    return {"": details["arrays"], "pending": details["pending"], "deleted": details["deleted"]} | marks


def current_snapshot(meta: StoreMeta) -> str:
    """Name of the snapshot that readers open; empty before the first; StoreError where CURRENT is damaged."""
    try:
        line = meta.storage.read(CURRENT)
    except FileNotFoundError:
        return ""
    name = line.partition(b" ")[0].decode("ascii", "replace")
    if line != current_line(name):
        raise StoreError(f"{meta.place(CURRENT)} is damaged; run `vlm-dist store verify --repair` on the store")
    return name


def current_line(name: str) -> bytes:
    """What CURRENT holds: the snapshot's name and the name's checksum."""
    return f"{name} {crc32c(name.encode()):08x}\n".encode()
