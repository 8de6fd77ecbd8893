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
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from feature_store.files import SCRATCH, VOIDED, crc32c, seal, unseal_as
from feature_store.records import Provenance
from feature_store.storage import Root, Storage, open_storage
from vlm_dist.errors import StoreError, StoreUnreachableError

SCHEMA_VERSION = 2
CHUNK_ROWS = 256
MAX_SHARD_BYTES = 64 << 20
CRC_BYTES = 4
PLANS, COMMITS, SNAPSHOTS, CURRENT = "_plan", "_commits", "index", "CURRENT"
FEATURES_JSON, SNAPSHOTS_JSON = "features/zarr.json", f"{SNAPSHOTS}/zarr.json"
COPY = f"{PLANS}/store.json"  # of what zarr.json says: without it a store of years could not be opened
_FOLDERS = ("features", SNAPSHOTS, PLANS, COMMITS, SCRATCH, VOIDED)
_GROUP = {"zarr_format": 3, "node_type": "group"}
GROUP_JSON = json.dumps(_GROUP).encode()  # of a snapshot and of its groups


@dataclass(frozen=True)
class StoreMeta:
    """An opened store: its place, its shape (F = feature_dim) and what made its features."""

    storage: Storage
    rows_per_shard: int
    provenance: Provenance

    @property
    def root(self) -> str:
        """The store's address; `open_store` of it opens the same store."""
        return self.storage.address

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

    def place(self, key: str) -> str:
        """Where an object of the store is, for messages."""
        return f"{self.root}/{key}"


def shard_key(shard: int) -> str:
    """The published object of a shard (absent where all its videos failed)."""
    return f"features/c/{shard}/0"


def default_rows_per_shard(feature_dim: int) -> int:
    """The most rows, in whole chunks, that keep a full shard's features within 64 MiB (65,536 at F = 512)."""
    return max(1, MAX_SHARD_BYTES // (CHUNK_ROWS * feature_dim * 2)) * CHUNK_ROWS


def create_store(root: Root, provenance: Provenance, rows_per_shard: int = 0) -> StoreMeta:
    """Makes an empty store, or opens the one that is there if its provenance is the same.

    Args:
        root: a folder that is absent, empty, or already a store; or s3://bucket/prefix likewise.
        provenance: what will make the features.
        rows_per_shard: a multiple of 256; 0 takes the most that stay within 64 MiB.

    Raises:
        StoreError: another provenance or shard size (the fields are named), or a folder with other files in it.
    """
    storage = open_storage(root)
    rows = rows_per_shard or default_rows_per_shard(provenance.feature_dim)
    if rows % CHUNK_ROWS:
        raise StoreError(f"rows_per_shard is {rows}; it must be a multiple of {CHUNK_ROWS}, the rows of one chunk")
    if storage.size("zarr.json") is None and not recover_metadata(root):
        if _is_rest(storage):
            open_store(root)  # says what is to be done
        _require_vacant(storage)
        storage.prepare(_FOLDERS)
        storage.create("zarr.json", _group_json(rows, provenance))
    meta = open_store(root)
    _require_same(meta, provenance, rows if rows_per_shard else meta.rows_per_shard)
    if storage.size(SNAPSHOTS_JSON) is None:
        storage.replace(SNAPSHOTS_JSON, snapshots_json())
    keep_copy(storage)
    if storage.size(FEATURES_JSON) is None:
        set_shard_count(meta, 0)
    return meta


def open_store(root: Root) -> StoreMeta:
    """Opens a store.

    Raises:
        StoreError: nothing is there, it is not a store, its attributes are damaged, or its schema version is another.
    """
    storage = open_storage(root)
    try:
        attributes = json.loads(storage.read("zarr.json"))["attributes"]
        store = attributes["vlm_dist"]
        version = store["schema_version"]
    except (FileNotFoundError, NotADirectoryError):
        if _is_rest(storage):
            raise StoreError(f"{root}: zarr.json of this feature store is lost. {_RECOVER}") from None
        here = storage.local("")
        there = here.exists() if here else bool(storage.names(""))
        hint = "this is not a feature store (it has no zarr.json)" if there else "there is nothing"
        raise StoreError(f"{root}: {hint}; give a store's folder, or make one with `vlm-dist extract`") from None
    except StoreError:
        raise
    except (ValueError, KeyError, TypeError):
        if _is_rest(storage):
            raise StoreError(f"{root}: zarr.json of this feature store is damaged. {_RECOVER}") from None
        raise StoreError(f"{root} is not a feature store: its zarr.json is not one that vlm-dist wrote") from None
    fits = sound_attributes(storage) is not None
    older = isinstance(version, int) and 1 <= version < SCHEMA_VERSION
    if version != SCHEMA_VERSION and (fits or not older):
        newer = "a newer version made it; " if isinstance(version, int) and version > SCHEMA_VERSION else ""
        advice = f"type `vlm-dist store migrate {root}`" if older else f"{newer}open it with the vlm-dist that made it"
        doubt = "" if fits else f". Or else its zarr.json is damaged: {_RECOVER}"
        raise StoreError(
            f"{root} has schema version {version}, and this vlm-dist reads version {SCHEMA_VERSION}: {advice}{doubt}"
        )
    try:
        if not fits:
            raise ValueError("checksum")
        return StoreMeta(storage, store["rows_per_shard"], Provenance.model_validate(store["provenance"]))
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise StoreError(
            f"{storage.address}/zarr.json is damaged (its attributes do not fit their crc). {_RECOVER}"
        ) from error


def sound_attributes(storage: Storage) -> dict[str, Any] | None:
    """What zarr.json says of the store, of whatever schema; None where it is lost or damaged."""
    try:
        return _checked_attributes(storage.read("zarr.json"))
    except StoreUnreachableError:
        raise
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def copied_attributes(storage: Storage) -> dict[str, Any] | None:
    """The same of the second copy."""
    try:
        return _checked_attributes(_copied(storage))
    except StoreUnreachableError:
        raise
    except (FileNotFoundError, NotADirectoryError, StoreError):
        return None


def _checked_attributes(zarr_json: bytes) -> dict[str, Any]:
    attributes = json.loads(zarr_json)["attributes"]
    store: dict[str, Any] = attributes["vlm_dist"]
    if attributes["vlm_dist_crc32c"] != _attributes_crc(store):
        raise ValueError("the attributes do not fit their crc")
    return store


def _copied(storage: Storage) -> bytes:
    """zarr.json, as its second copy says; StoreError where that is damaged."""

    def parse(body: dict[str, Any]) -> bytes:
        whole: bytes = body["zarr.json"].encode()
        _checked_attributes(whole)
        return whole

    return unseal_as("the copy of zarr.json", storage.read(COPY), f"{storage.address}/{COPY}", parse)


def keep_copy(storage: Storage) -> None:
    """Keeps a second copy of what zarr.json says, where there is none of exactly that."""
    copy = _copy_of(storage.read("zarr.json"))
    if storage.size(COPY) is None or storage.read(COPY) != copy:
        storage.replace(COPY, copy)


def recover_metadata(root: Root) -> bool:
    """Makes a lost or damaged zarr.json anew from the second copy; False where it is whole, or there is no copy.

    Raises:
        StoreError: the copy is damaged too.
    """
    storage = open_storage(root)
    if sound_attributes(storage) is not None:
        return False
    try:
        whole = _copied(storage)
    except (FileNotFoundError, NotADirectoryError):
        if _is_rest(storage):
            raise StoreError(
                f"zarr.json of {root} is lost or damaged, and its second copy {COPY} is lost: nothing here says any "
                "more what the features are; restore one of the two from a backup, and run "
                "`vlm-dist store verify --repair`"
            ) from None
        return False
    except StoreUnreachableError:
        raise
    except StoreError as error:
        raise StoreError(
            f"zarr.json of {root} is lost or damaged, and so is its second copy {COPY}: restore one of them from a "
            "backup, and run `vlm-dist store verify --repair`"
        ) from error
    storage.replace("zarr.json", whole)
    return True


def wrong_metadata(meta: StoreMeta) -> dict[str, bytes]:
    """Metadata objects that are not byte for byte what they must be, by key, and what they must be."""
    storage = meta.storage
    whole = group_json(json.loads(storage.read("zarr.json"))["attributes"]["vlm_dist"])
    right = {"zarr.json": whole, SNAPSHOTS_JSON: snapshots_json(), COPY: _copy_of(whole)}
    return {key: data for key, data in right.items() if storage.size(key) is None or storage.read(key) != data}


def _copy_of(zarr_json: bytes) -> bytes:
    return seal({"zarr.json": zarr_json.decode()})


def snapshots_json() -> bytes:
    """The metadata of the group that snapshots lie in."""
    return json.dumps(_GROUP, indent=2).encode()


def store_exists(root: Root) -> bool:
    """Whether a store was made there (it may be damaged)."""
    return open_storage(root).size("zarr.json") is not None


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
    meta.storage.replace(FEATURES_JSON, features_json(meta, shards))


def scratch_name(stem: str) -> str:
    """A name that nobody else uses, in `_staging` for one."""
    return f"{stem}.{uuid.uuid4().hex}"


def aside_key(name: str) -> str:
    """A key in `_voided` that nobody else uses, for what a repair takes out."""
    return f"{VOIDED}/{scratch_name(name)}"


def _attributes_crc(store: dict[str, Any]) -> str:
    return f"{crc32c(json.dumps(store, separators=(',', ':'), sort_keys=True).encode()):08x}"


def _group_json(rows_per_shard: int, provenance: Provenance) -> bytes:
    return group_json(
        {
            "schema_version": SCHEMA_VERSION,
            "rows_per_shard": rows_per_shard,
            "provenance": provenance.model_dump(mode="json"),
        }
    )


def group_json(store: dict[str, Any]) -> bytes:
    """The store's own zarr.json: a Zarr v3 group whose attributes say what the store is, under a checksum."""
    attributes = {"vlm_dist": store, "vlm_dist_crc32c": _attributes_crc(store)}
    return json.dumps({**_GROUP, "attributes": attributes}, indent=2).encode()


_RECOVER = "`vlm-dist store verify --repair` makes it anew from the store's second copy; else restore it from a backup"


def _is_rest(storage: Storage) -> bool:
    """Whether what lies there is a store all the same."""
    return {PLANS, COMMITS} <= set(storage.names("")) and bool(storage.names(PLANS))


def _require_vacant(storage: Storage) -> None:
    """The empty folders that a killed `create_store` left pass; anybody else's files do not."""
    here = storage.local("")
    if here and here.exists() and not here.is_dir():
        raise StoreError(f"{storage.address} is a file; a store is a folder, so give another path")
    foreign = [name for name in storage.names("") if name not in (*_FOLDERS, "lost+found")]
    if not foreign:
        inside = (key for folder in _FOLDERS if folder != SCRATCH for key in storage.sizes(folder))
        foreign = [key for key in inside if key not in (FEATURES_JSON, SNAPSHOTS_JSON)]
    if foreign:
        raise StoreError(
            f"{storage.address} is not a feature store and not empty ({foreign[0]} is in it): "
            "give a new or an empty folder"
        )


def _require_same(meta: StoreMeta, provenance: Provenance, rows_per_shard: int) -> None:
    mine = {"rows_per_shard": meta.rows_per_shard, **meta.provenance.model_dump()}
    asked = {"rows_per_shard": rows_per_shard, **provenance.model_dump()}
    differing = [name for name in mine if mine[name] != asked[name]]
    if "weights" in differing:  # which says it all
        differing = [name for name in differing if name not in ("weights_sha256", "random_seed", "calibration")]
    if differing:
        told = "; ".join(f"{name} is {mine[name]!r}, not {asked[name]!r}" for name in differing)
        raise StoreError(
            f"{meta.root} was made otherwise: {told}. Features of two extractors are never mixed: "
            "use the same settings, or another folder"
        )
