"""Store → features of a video, at the speed of the disk (index → features → clips).

A shard's chunk index is read and checked once; after that a video is one `preadv` that scatters its rows around the
chunk checksums straight into the result. The store is plain Zarr, so zarr-python and tensorstore read it as well.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np

from feature_store.files import crc32c
from feature_store.index import StoreIndex
from feature_store.layout import CHUNK_ROWS, CRC_BYTES, StoreMeta
from feature_store.shard import ABSENT, REPAIR, bad_chunks, index_bytes, parse_index
from vlm_dist.errors import StoreError

SAMPLE_EVERY = 16
_MAX_BUFFERS = 1024  # IOV_MAX

Check = Literal["off", "sampled", "always"]


class _Shard:
    """An open shard: descriptor and chunk index. Closes when nobody holds it: eviction spares a read at work."""

    def __init__(self, meta: StoreMeta, shard: int) -> None:
        self.path = meta.shard_path(shard)
        try:
            self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise StoreError(f"shard {shard}: {self.path} is missing. {REPAIR}") from None
        size = os.fstat(self.fd).st_size
        raw = os.pread(self.fd, index_bytes(meta), max(0, size - index_bytes(meta)))
        self.offsets = parse_index(meta, raw, self.path)[:, 0].tolist()

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class FeatureReader:
    """Reads whole videos. Picklable (reopens the same snapshot), safe after fork and in spawned processes.

    Args:
        root: the store.
        check: whether a video's crc32c is compared: never, on every 16th read, or on every read.
        snapshot: of that name; empty takes the one that CURRENT names now.
        max_open: shards that are kept open.
    """

    def __init__(self, root: Path, check: Check = "sampled", snapshot: str = "", max_open: int = 256) -> None:
        self.index = StoreIndex(root, snapshot)
        self.meta = self.index.meta
        self._check: Check = check
        self._max_open = max_open
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._reads = 0

    def __reduce__(self) -> tuple[type[Self], tuple[Path, Check, str, int]]:
        return type(self), (self.meta.root, self._check, self.index.name, self._max_open)

    def read(self, video: int) -> np.ndarray:
        """Features of a video by its number in the index.

        Returns:
            (n_rows, F) float16, a fresh array.

        Raises:
            StoreError: names video, shard and chunk where a shard is missing, cut short or damaged.
        """
        n, first = int(self.index.n_rows[video]), int(self.index.row[video])
        features = np.empty((n, self.meta.feature_dim), np.float16)
        shard = self._shard(video)
        for offset, buffers in self._pieces(video, shard, features, first):
            wanted = sum(map(len, buffers))
            if (got := os.preadv(shard.fd, buffers, offset)) != wanted:
                raise StoreError(f"{self._name(video)}: {shard.path} ends early ({got} of {wanted} bytes). {REPAIR}")
        self._reads += 1
        due = self._check == "always" or (self._check == "sampled" and self._reads % SAMPLE_EVERY == 1)
        if due and crc32c(features) != self.index.crc32c[video]:
            raise StoreError(
                f"{self._name(video)}: the bytes differ from those committed ({self._blame(video)}). {REPAIR}"
            )
        return features

    def read_many(self, videos: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Features of several videos; the disk is told of all of them before the first is read."""
        for video in videos:
            shard = self._shard(int(video))
            first, n = int(self.index.row[video]), int(self.index.n_rows[video])
            offset = shard.offsets[first // CHUNK_ROWS]
            if offset != ABSENT:
                length = (n + 2 * CHUNK_ROWS) * self.meta.row_bytes
                os.posix_fadvise(shard.fd, offset, length, os.POSIX_FADV_WILLNEED)
        return [self.read(int(video)) for video in videos]

    def close(self) -> None:
        """Closes all shards; the next read opens them again."""
        self._open.clear()

    def _shard(self, video: int) -> _Shard:
        number = int(self.index.shard[video])
        shard = self._open.pop(number, None) or _Shard(self.meta, number)
        self._open[number] = shard
        if len(self._open) > self._max_open:
            self._open.popitem(last=False)
        return shard

    def _pieces(
        self, video: int, shard: _Shard, features: np.ndarray, first: int
    ) -> list[tuple[int, list[memoryview | bytearray]]]:
        """(file offset, buffers) of every contiguous run: slices of `features`, 4 spare bytes per checksum."""
        flat = features.reshape(-1).view(np.uint8).data
        row_bytes, chunk_bytes = self.meta.row_bytes, self.meta.chunk_bytes
        runs: list[tuple[int, list[memoryview | bytearray]]] = []
        done, expected = 0, -1
        while done < len(flat):
            chunk, within = divmod(first + done // row_bytes, CHUNK_ROWS)
            offset = shard.offsets[chunk]
            if offset == ABSENT:
                raise StoreError(f"{self._name(video)}, chunk {chunk}: {shard.path} does not hold this chunk. {REPAIR}")
            take = min(chunk_bytes - within * row_bytes, len(flat) - done)
            if offset == expected and len(runs[-1][1]) < _MAX_BUFFERS - 1:
                runs[-1][1].append(bytearray(CRC_BYTES))
            else:
                runs.append((offset + within * row_bytes, []))
            runs[-1][1].append(flat[done : done + take])
            expected = offset + chunk_bytes + CRC_BYTES
            done += take
        return runs

    def _name(self, video: int) -> str:
        return f"video {self.index.video_id(video)}, shard {int(self.index.shard[video])}"

    def _blame(self, video: int) -> str:
        """Which chunks of the video fail their own checksum."""
        first = int(self.index.row[video])
        last = first + int(self.index.n_rows[video]) - 1
        chunks = range(first // CHUNK_ROWS, last // CHUNK_ROWS + 1)
        path = self.meta.shard_path(int(self.index.shard[video]))
        bad = [str(chunk) for chunk, _ in bad_chunks(self.meta, path) if chunk in chunks]
        return (
            f"chunk {', '.join(bad)} is damaged" if bad else f"chunks {chunks.start} to {chunks.stop - 1} hold others"
        )
