"""The formats that are read against each other: one class each, which writes a corpus and reads whole videos.

A class opens in the process that reads; it imports its library only there, since some live in another environment.
`read` gives a fresh (seconds, 512) float16 array.
"""

import sys
import types
from pathlib import Path
from typing import ClassVar

import numpy as np

from store_bench.corpus import WIDTH, Corpus, video_id, write_store


class FlatMemmap:
    """One memory-mapped file of all rows, the corpus itself: the limit, since a copy of the bytes is all it does."""

    package: ClassVar = "numpy"

    def __init__(self, folder: Path) -> None:
        self.corpus = Corpus.open(folder)
        self.ptr = self.corpus.ptr.tolist()

    def read(self, video: int) -> np.ndarray:
        return np.array(self.corpus.rows[self.ptr[video] : self.ptr[video + 1]])


class Npy:
    """A `.npy` file for each video."""

    folder: ClassVar = "npy"
    package: ClassVar = "numpy"

    @staticmethod
    def write(folder: Path, corpus: Corpus) -> None:
        folder.mkdir()
        for video, rows in enumerate(corpus):
            np.save(folder / f"{video_id(video)}.npy", rows)

    def __init__(self, folder: Path) -> None:
        self.prefix = f"{folder}/"

    def read(self, video: int) -> np.ndarray:
        return np.load(f"{self.prefix}{video_id(video)}.npy")


class Ours:
    """Our store through our reader; ids ascend with the corpus's numbers, so that the index numbers are the same."""

    folder: ClassVar = "store"
    package: ClassVar = "vlm-dist"
    check: ClassVar = "off"
    mapped: ClassVar = False
    write = staticmethod(write_store)

    def __init__(self, folder: Path) -> None:
        from feature_store.reader import FeatureReader

        self.read = FeatureReader(folder, check=self.check, mapped=self.mapped).read


class OursSampled(Ours):
    check: ClassVar = "sampled"


class OursAlways(Ours):
    check: ClassVar = "always"


class OursMapped(Ours):
    mapped: ClassVar = True


class OursMappedAlways(OursMapped):
    check: ClassVar = "always"


class _OurRows(Ours):
    """Another library on our store: it checks the crc32c of every chunk that it decodes."""

    def __init__(self, folder: Path) -> None:
        from feature_store.index import StoreIndex

        index = StoreIndex(folder)
        first = index.shard.astype(np.int64) * index.meta.rows_per_shard + index.row
        self.rows = [(row, row + n) for row, n in zip(first.tolist(), index.n_rows.tolist(), strict=True)]
        self.path = str(folder / "features")


class ZarrPython(_OurRows):
    package: ClassVar = "zarr"

    def __init__(self, folder: Path) -> None:
        import zarr

        super().__init__(folder)
        self.array = zarr.open_array(self.path, mode="r")

    def read(self, video: int) -> np.ndarray:
        first, last = self.rows[video]
        return self.array[first:last]


class TensorStore(_OurRows):
    package: ClassVar = "tensorstore"

    def __init__(self, folder: Path) -> None:
        import tensorstore

        super().__init__(folder)
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": self.path}}
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 16 << 20}})  # keeps the shard indices
        self.array = tensorstore.open(spec, read=True, context=context).result()

    def read(self, video: int) -> np.ndarray:
        first, last = self.rows[video]
        return self.array[first:last].read().result()


class Hdf5:
    """One contiguous HDF5 dataset of all rows, without checksums (HDF5 has them for chunks only)."""

    folder: ClassVar = "hdf5"
    package: ClassVar = "h5py"
    options: ClassVar[dict] = {}

    @classmethod
    def write(cls, folder: Path, corpus: Corpus) -> None:
        import h5py

        folder.mkdir()
        with h5py.File(folder / "rows.h5", "w") as file:
            file.create_dataset("features", data=corpus.rows, **cls.options)
        np.save(folder / "ptr.npy", corpus.ptr)

    def __init__(self, folder: Path) -> None:
        import h5py

        self.rows = h5py.File(folder / "rows.h5", "r")["features"]
        self.ptr = np.load(folder / "ptr.npy").tolist()

    def read(self, video: int) -> np.ndarray:
        return self.rows[self.ptr[video] : self.ptr[video + 1]]


class Hdf5Checked(Hdf5):
    """HDF5 in chunks of 256 rows, as our store's, each with its fletcher32."""

    folder: ClassVar = "hdf5-checked"
    options: ClassVar[dict] = {"chunks": (256, WIDTH), "fletcher32": True}


class Lmdb:
    folder: ClassVar = "lmdb"
    package: ClassVar = "lmdb"

    @staticmethod
    def write(folder: Path, corpus: Corpus) -> None:
        import lmdb

        with lmdb.open(str(folder), map_size=2 * corpus.rows.nbytes + (64 << 20)) as database:
            for video, rows in enumerate(corpus):
                with database.begin(write=True) as transaction:
                    transaction.put(video_id(video).encode(), rows.tobytes())

    def __init__(self, folder: Path) -> None:
        import lmdb

        self.transaction = lmdb.open(str(folder), readonly=True, lock=False, readahead=False).begin()

    def read(self, video: int) -> np.ndarray:
        return np.frombuffer(self.transaction.get(video_id(video).encode()), np.float16).reshape(-1, WIDTH)


class Mosaic:
    """mosaicml-streaming; its hash is of a whole shard and compared when a shard is fetched, so not here."""

    folder: ClassVar = "mosaic"
    package: ClassVar = "mosaicml-streaming"

    @staticmethod
    def write(folder: Path, corpus: Corpus) -> None:
        streaming = _import_streaming()
        with streaming.MDSWriter(out=str(folder), columns={"features": "bytes"}, hashes=["xxh64"]) as writer:
            for rows in corpus:
                writer.write({"features": rows.tobytes()})

    def __init__(self, folder: Path) -> None:
        self.dataset = _import_streaming().LocalDataset(str(folder))

    def read(self, video: int) -> np.ndarray:
        return np.frombuffer(self.dataset[video]["features"], np.float16).reshape(-1, WIDTH)


class LitData:
    """litdata's loader for tracks of which windows are read: its fastest way to one record."""

    folder: ClassVar = "litdata"
    package: ClassVar = "litdata"

    @staticmethod
    def write(folder: Path, corpus: Corpus) -> None:
        import litdata
        from litdata.streaming.cache import Cache

        cache = Cache(str(folder), chunk_bytes="64MB", item_loader=litdata.TemporalArrayLoader())
        for video, rows in enumerate(corpus):
            cache[video] = {"features": np.array(rows)}
        cache.done()
        cache.merge()

    def __init__(self, folder: Path) -> None:
        import litdata

        self.dataset = litdata.StreamingDataset(str(folder), item_loader=litdata.TemporalArrayLoader())
        self.frames = [int(n) for n in self.dataset.frame_counts]

    def read(self, video: int) -> np.ndarray:
        return self.dataset.read_window(video, 0, self.frames[video])["features"]


def _import_streaming() -> types.ModuleType:
    """mosaicml-streaming imports torchvision, of which no build beside a CPU torch is at hand; nothing here uses it."""
    import transformers.feature_extraction_utils  # noqa: F401  (asks for torchvision, so before the stand-in)

    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    sys.modules.update({name: types.ModuleType(name) for name in names})
    sys.modules["torchvision.datasets"].VisionDataset = object
    sys.modules["torchvision.transforms.functional"].to_tensor = None
    import streaming

    return streaming


HERE = {
    "flat memmap": FlatMemmap,
    "ours, no check": Ours,
    "ours, sampled": OursSampled,
    "ours, always": OursAlways,
    "ours, mapped, no check": OursMapped,
    "ours, mapped, always": OursMappedAlways,
    "zarr-python": ZarrPython,
    "tensorstore": TensorStore,
    ".npy per video": Npy,
}
PEERS = {
    "HDF5 fletcher32": Hdf5Checked,
    "HDF5 contiguous": Hdf5,
    "LMDB": Lmdb,
    "mosaicml LocalDataset": Mosaic,
    "litdata read_window": LitData,
}
FORMATS = HERE | PEERS
