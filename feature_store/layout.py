"""Where everything of a feature store lies, and how one is created and opened (videos → features).

zarr.json            Zarr v3 group; its attributes hold schema version, shape and provenance
features/            float16 (rows, F); shard k is features/c/k/0: rows of whole videos, chunks of 256 rows + crc32c
index/000001/        immutable snapshots: videos, captions, tokens; see snapshot.py
CURRENT              name of the snapshot that readers open
_plan/plan-000.json  which videos belong to which shard; see plan.py
_commits/000123.json the truth about shard 123; see commit.py
_staging/            attempts that are not published (yet), scratch files
_voided/             commit records and snapshots that a repair took out
"""

import json
import uuid
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from feature_store.files import crc32c, create_exclusive, disk_guard, replace_file
from feature_store.records import Provenance
from vlm_dist.errors import StoreError

SCHEMA_VERSION = 1
CHUNK_ROWS = 256
MAX_SHARD_BYTES = 64 << 20
CRC_BYTES = 4
_FOLDERS = ("features", "index", "_plan", "_commits", "_staging", "_voided")
_GROUP = {"zarr_format": 3, "node_type": "group"}


class StoreMeta(BaseModel):
    """An opened store: its place, its shape (F = feature_dim) and what made its features."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Path
    rows_per_shard: int
    provenance: Provenance

    @property
    def feature_dim(self) -> int:
        """Width F of a row."""
        return self.provenance.feature_dim

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one float16 row."""
        return self.feature_dim * 2

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk without its checksum."""
        return CHUNK_ROWS * self.row_bytes

    @cached_property
    def chunks_per_shard(self) -> int:
        """Chunks of 256 rows in one shard."""
        return self.rows_per_shard // CHUNK_ROWS

    @property
    def plans(self) -> Path:
        """Folder of the plan segments."""
        return self.root / "_plan"

    @property
    def commits(self) -> Path:
        """Folder of the commit records."""
        return self.root / "_commits"

    @property
    def staging(self) -> Path:
        """Folder of unpublished attempts and scratch files, on the store's own file system."""
        return self.root / "_staging"

    @property
    def voided(self) -> Path:
        """Folder of what repairs took out."""
        return self.root / "_voided"

    @property
    def snapshots(self) -> Path:
        """Folder of the index snapshots."""
        return self.root / "index"

    def shard_path(self, shard: int) -> Path:
        """The published file of a shard (absent where all its videos failed)."""
        return self.root / "features" / "c" / str(shard) / "0"


def default_rows_per_shard(feature_dim: int) -> int:
    """The most rows, in whole chunks, that keep a full shard's features within 64 MiB (65,536 at F = 512)."""
    return max(1, MAX_SHARD_BYTES // (CHUNK_ROWS * feature_dim * 2)) * CHUNK_ROWS


def create_store(root: Path, provenance: Provenance, rows_per_shard: int = 0) -> StoreMeta:
    """Makes an empty store, or opens the one that is there if its provenance is the same.

    Args:
        root: folder of the store; absent, empty, or already a store.
        provenance: what will make the features.
        rows_per_shard: a multiple of 256; 0 takes the most that stay within 64 MiB.

    Raises:
        StoreError: another provenance or shard size (the fields are named), or a folder with other files in it.
    """
    root = Path(root)
    rows = rows_per_shard or default_rows_per_shard(provenance.feature_dim)
    if rows % CHUNK_ROWS:
        raise StoreError(f"rows_per_shard is {rows}; it must be a multiple of {CHUNK_ROWS}, the rows of one chunk")
    if not (root / "zarr.json").exists():
        _require_vacant(root)
        with disk_guard(root / "zarr.json", 64 << 10):
            for name in _FOLDERS:
                (root / name).mkdir(parents=True, exist_ok=True)
        create_exclusive(root / "zarr.json", _group_json(rows, provenance), root / "_staging")
    meta = open_store(root)
    _require_same(meta, provenance, rows if rows_per_shard else meta.rows_per_shard)
    if not (root / "index" / "zarr.json").exists():
        replace_file(root / "index" / "zarr.json", json.dumps(_GROUP, indent=2).encode(), meta.staging)
    if not (root / "features" / "zarr.json").exists():
        set_shard_count(meta, 0)
    return meta


def open_store(root: Path) -> StoreMeta:
    """Opens a store.

    Raises:
        StoreError: nothing is there, it is not a store, its attributes are damaged, or its schema version is another.
    """
    root = Path(root)
    path = root / "zarr.json"
    try:
        attributes = json.loads(path.read_bytes())["attributes"]
        store = attributes["vlm_dist"]
        version = store["schema_version"]
    except (FileNotFoundError, NotADirectoryError):
        hint = "there is nothing" if not root.exists() else "this is not a feature store (it has no zarr.json)"
        raise StoreError(f"{root}: {hint}; give a store's folder, or make one with `vlm-dist extract`") from None
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{root} is not a feature store: its zarr.json is not one that vlm-dist wrote") from None
    if version != SCHEMA_VERSION:
        other = "a newer vlm-dist" if isinstance(version, int) and version > SCHEMA_VERSION else "an older vlm-dist"
        raise StoreError(
            f"{root} has schema version {version}, and this vlm-dist reads version {SCHEMA_VERSION}: "
            f"open it with {other}, or extract into a new folder"
        )
    try:
        if attributes["vlm_dist_crc32c"] != _attributes_crc(store):
            raise ValueError("checksum")
        return StoreMeta(
            root=root,
            rows_per_shard=store["rows_per_shard"],
            provenance=Provenance.model_validate(store["provenance"]),
        )
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise StoreError(f"{path} is damaged: restore it from a copy (its attributes do not fit their crc)") from error


def features_json(meta: StoreMeta, shards: int) -> bytes:
    """The features array's metadata for a number of shards, as any Zarr v3 reader understands it."""
    shape = [shards * meta.rows_per_shard, meta.feature_dim]
    little, checked = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
    sharding = {
        "chunk_shape": [CHUNK_ROWS, meta.feature_dim],
        "codecs": [little, checked],
        "index_codecs": [little, checked],
        "index_location": "end",
    }
    codec = {"name": "sharding_indexed", "configuration": sharding}
    return array_json(shape, [meta.rows_per_shard, meta.feature_dim], "float16", [codec])


def array_json(shape: list[int], chunk: list[int], dtype: str, codecs: list[dict[str, Any]]) -> bytes:
    """A Zarr v3 array's zarr.json."""
    array = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if dtype.startswith("float") else 0,
        "codecs": codecs,
        "attributes": {},
    }
    return json.dumps(array, indent=2).encode()


def set_shard_count(meta: StoreMeta, shards: int) -> None:
    """Gives the features array room for `shards` shards; only the plan step (and a repair) calls this."""
    replace_file(meta.root / "features" / "zarr.json", features_json(meta, shards), meta.staging)


def scratch_name(stem: str) -> str:
    """A name in `_staging` that nobody else uses."""
    return f"{stem}.{uuid.uuid4().hex}"


def _attributes_crc(store: dict[str, Any]) -> str:
    return f"{crc32c(json.dumps(store, separators=(',', ':'), sort_keys=True).encode()):08x}"


def _group_json(rows_per_shard: int, provenance: Provenance) -> bytes:
    store = {
        "schema_version": SCHEMA_VERSION,
        "rows_per_shard": rows_per_shard,
        "provenance": provenance.model_dump(mode="json"),
    }
    attributes = {"vlm_dist": store, "vlm_dist_crc32c": _attributes_crc(store)}
    return json.dumps({**_GROUP, "attributes": attributes}, indent=2).encode()


def _require_vacant(root: Path) -> None:
    """A folder of ours that a killed `create_store` left half-made passes; anybody else's files do not."""
    if root.exists() and not root.is_dir():
        raise StoreError(f"{root} is a file; a store is a folder, so give another path")
    foreign = sorted(p.name for p in root.iterdir() if p.name not in (*_FOLDERS, "lost+found")) if root.exists() else []
    if foreign:
        raise StoreError(
            f"{root} is not a feature store and not empty ({foreign[0]} is in it): give a new or an empty folder"
        )


def _require_same(meta: StoreMeta, provenance: Provenance, rows_per_shard: int) -> None:
    mine = {"rows_per_shard": meta.rows_per_shard, **meta.provenance.model_dump()}
    asked = {"rows_per_shard": rows_per_shard, **provenance.model_dump()}
    differing = [f"{name} is {mine[name]!r}, not {asked[name]!r}" for name in mine if mine[name] != asked[name]]
    if differing:
        raise StoreError(
            f"{meta.root} was made otherwise: {'; '.join(differing)}. Features of two extractors are never mixed: "
            "use the same settings, or another folder"
        )
