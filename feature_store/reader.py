"""Store → features of a video, at the speed of the disk (index → features → clips).

A shard's chunk index is read and checked once; after that a video is one `preadv` (or one ranged GET) that scatters its
rows around the chunk checksums straight into the result. The store is plain Zarr, so zarr-python and tensorstore read
it as well.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self, get_args

import numpy as np

from feature_store.config import StoreConfig
from feature_store.files import crc32c
from feature_store.index import StoreIndex
from feature_store.layout import CHUNK_ROWS, CRC_BYTES, shard_key
from feature_store.node_cache import ShardCache
from feature_store.shard import REPAIR, bad_chunks
from feature_store.shard_source import Buffers, ShardSource, open_shard, scatter
from feature_store.storage import Root, fetched
from vlm_dist.errors import ConfigError, StoreError

SAMPLE_EVERY = 16
_MOST_CHUNKS = 512  # of one run: with the checksums in between they stay below IOV_MAX, 1024 buffers
_CHECKSUM = np.empty(CRC_BYTES, np.uint8)  # where the checksums between chunks go, which nobody reads

Check = Literal["off", "sampled", "always"]


class _Run(NamedTuple):
    """A contiguous piece of a shard: where it begins, its bytes, and the buffers that it fills."""

    offset: int
    length: int
    buffers: Buffers


class _Read(NamedTuple):
    """One video's read: its rows to be, and the pieces that they come from."""

    video: int
    features: np.ndarray
    shard: ShardSource
    runs: list[_Run]
    checked: bool


class FeatureReader:
    """Reads whole videos. Picklable (reopens the same snapshot), safe in spawned processes, and after fork where the
    store is a folder.

    With a check, the columns that say which rows are whose are compared with their checksums once, before the first
    id is told or video read; then features and captions of a video with theirs.

    Args:
        root: the store.
        check: whether a video's crc32c is compared: never, on every 16th read, or on every read.
        snapshot: of that name; empty takes the one that CURRENT names now.
        max_open: shards that are kept open.
        cache_bytes: of whole shards of a store in a bucket that are kept on this node; 0 reads every video by a GET.
        mapped: map the shards of a store in a folder, for stores that fit into memory.

    Raises:
        ConfigError: another check, no shard that may be open, or a negative cache.
        StoreError: no store, no such snapshot, or a damaged one.
    """

    def __init__(
        self,
        root: Root,
        check: Check = "sampled",
        snapshot: str = "",
        max_open: int = 256,
        cache_bytes: int = 0,
        mapped: bool = False,
    ) -> None:
        if check not in get_args(Check):
            raise ConfigError(f"check is {check!r}; it must be one of {', '.join(map(repr, get_args(Check)))}")
        for name, value, least in (("max_open", max_open, 1), ("cache_bytes", cache_bytes, 0)):
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be {least} or more")
        self.index = StoreIndex(root, snapshot, checked=check != "off")
        self.meta = self.index.meta
        self._check: Check = check
        self._max_open = max_open
        self._cache = ShardCache(cache_bytes) if cache_bytes else None
        self._mapped = mapped
        self._open: OrderedDict[int, ShardSource] = OrderedDict()
        self._reads = 0

    @classmethod
    def of(cls, root: Root, cfg: StoreConfig, snapshot: str = "") -> Self:
        """A reader as the settings say."""
        return cls(root, cfg.check, snapshot, cache_bytes=int(cfg.cache_gib * 2**30), mapped=cfg.mapped)

    def __reduce__(self) -> tuple[type[Self], tuple[str, Check, str, int, int, bool]]:
        budget = self._cache.budget if self._cache else 0
        return type(self), (self.meta.root, self._check, self.index.name, self._max_open, budget, self._mapped)

    def read(self, video: int) -> np.ndarray:
        """Features of a video by its number in the index.

        Returns:
            (n_rows, F) float16, a fresh array.

        Raises:
            StoreError: names video, shard and chunk where a shard is missing, cut short or damaged.
        """
        read = self._plan(video)
        return self._complete(read, self._fill([read])[0])

    def read_many(self, videos: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Features of several videos; the disk is told of all of them before the first is read."""
        group = max(1, self._max_open // 2)  # its shards stay open until it is read, beside those that are kept
        parts = (videos[start : start + group] for start in range(0, len(videos), group))
        return [features for part in parts for features in self._read(part)]

    def _read(self, videos: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        reads = [self._plan(int(video)) for video in videos]
        if len(reads) > 1:
            for read in reads:
                for run in read.runs:
                    read.shard.advise(run.offset, run.length)
        return [self._complete(read, got) for read, got in zip(reads, self._fill(reads), strict=True)]

    def close(self) -> None:
        """Closes all shards; the next read opens them again."""
        self._open.clear()

    def _plan(self, video: int) -> _Read:
        self.index.require_checked()
        if not 0 <= video < self.index.num_videos:
            raise IndexError(f"there is no video {video}: the snapshot has {self.index.num_videos} (`find` gives -1)")
        n, first = int(self.index.n_rows[video]), int(self.index.row[video])
        if first + n > self.meta.rows_per_shard:
            raise StoreError(f"the index in {self.index.folder} is damaged: {self._name(video)} has rows {first} + {n}")
        number = int(self.index.shard[video])
        shard = self._open.pop(number, None) or open_shard(self.meta, number, self._cache, self._mapped)
        self._open[number] = shard
        if len(self._open) > self._max_open:
            self._open.popitem(last=False)
        features = np.empty((n, self.meta.feature_dim), np.float16)
        self._reads += 1
        checked = self._check == "always" or (self._check == "sampled" and self._reads % SAMPLE_EVERY == 1)
        return _Read(video, features, shard, self._runs(video, shard, features, first), checked)

    def _runs(self, video: int, shard: ShardSource, features: np.ndarray, first: int) -> list[_Run]:
        """Every contiguous piece of a video's rows; there is one where the shard is as we write it."""
        row_bytes = self.meta.row_bytes
        runs: list[_Run] = []
        done, n = 0, len(features)
        while done < n:
            chunk, within = divmod(first + done, CHUNK_ROWS)
            ahead = shard.stops[chunk] - chunk
            if ahead <= 0:
                raise StoreError(
                    f"{self._name(video)}, chunk {chunk}: {shard.where} does not hold this chunk. {REPAIR}"
                )
            rows = min(n - done, min(ahead, _MOST_CHUNKS) * CHUNK_ROWS - within)
            part = features[done : done + rows]
            buffers = [part[: CHUNK_ROWS - within]]
            for row in range(CHUNK_ROWS - within, rows, CHUNK_ROWS):
                buffers += (_CHECKSUM, part[row : row + CHUNK_ROWS])
            length = rows * row_bytes + len(buffers) // 2 * CRC_BYTES
            runs.append(_Run(shard.offsets[chunk] + within * row_bytes, length, buffers))
            done += rows
        return runs

    def _fill(self, reads: Sequence[_Read]) -> list[int]:
        """Reads all pieces: how many bytes each video is short of."""
        if reads[0].shard.ranged:
            return self._fetch(reads)
        return [sum([run.length - read.shard.read(run.buffers, run.offset) for run in read.runs]) for read in reads]

    def _fetch(self, reads: Sequence[_Read]) -> list[int]:
        """The same from a bucket, which is asked for all pieces at once, as each takes a while."""
        keys = [shard_key(int(self.index.shard[read.video])) for read in reads]
        ranges = [(key, run.offset, run.length) for key, read in zip(keys, reads, strict=True) for run in read.runs]
        pieces = self.meta.storage.read_ranges(ranges)
        try:
            return [
                sum([run.length - scatter(np.frombuffer(next(pieces), np.uint8), run.buffers) for run in read.runs])
                for read in reads
            ]
        except FileNotFoundError:  # taken out by a repair since its chunk index was read
            gone = next((key for key in keys if self.meta.storage.size(key) is None), keys[0])
            raise StoreError(f"{self.meta.place(gone)} is missing. {REPAIR}") from None

    def _complete(self, read: _Read, short: int) -> np.ndarray:
        """Features of a read that is filled.

        Where something is wrong with them they are read again, once, before the store is blamed: what this node keeps
        of the shard or of the snapshot may be what is damaged.
        """
        if (short or read.checked) and self._wrong(read, short):
            read.shard.drop()
            self._open.pop(int(self.index.shard[read.video]), None)
            self.index.check_columns()
            read = self._plan(read.video)._replace(checked=read.checked)
            (short,) = self._fill([read])
            if wrong := self._wrong(read, short):
                raise StoreError(f"{self._name(read.video)}: {wrong}{'' if short else self._blame(read)}. {REPAIR}")
        if read.checked:
            self.index.check_captions(read.video)
        return read.features

    def _wrong(self, read: _Read, short: int) -> str:
        """What is wrong with a read; empty where nothing is, or nobody compares."""
        if short:
            length = sum(run.length for run in read.runs)
            return f"{read.shard.where} ends early ({length - short} of {length} bytes)"
        if read.checked and crc32c(read.features) != self.index.crc32c[read.video]:
            return "the bytes differ from those committed"
        return ""

    def _name(self, video: int) -> str:
        return f"video {self.index.video_id(video)}, shard {int(self.index.shard[video])}"

    def _blame(self, read: _Read) -> str:
        """Which chunks of a video that was read whole fail their own checksum."""
        first = int(self.index.row[read.video])
        last = first + int(self.index.n_rows[read.video]) - 1
        chunks = range(first // CHUNK_ROWS, last // CHUNK_ROWS + 1)
        with fetched(self.meta.storage, shard_key(int(self.index.shard[read.video]))) as path:
            bad = [str(chunk) for chunk, _ in bad_chunks(self.meta, path) if chunk in chunks]
        whole = f"chunks {chunks.start} to {chunks.stop - 1} hold others"
        return f" (chunk {', '.join(bad)} is damaged)" if bad else f" ({whole})"
