"""A store of an older schema → one of today's, step by step, without touching a feature (any store → a newer one).

Schema 1: snapshots without marks. Schema 2: snapshots say which videos are deleted and which make a named split;
a vlm-dist of schema 1 would bring deleted videos back, so it must not write to such a store.
"""

from collections.abc import Callable
from typing import Any

from feature_store.layout import SCHEMA_VERSION, copied_attributes, group_json, keep_copy, open_store, sound_attributes
from feature_store.storage import Root, Storage, open_storage


def _nothing(storage: Storage, store: dict[str, Any]) -> None:
    """Schema 2 reads what schema 1 wrote."""


_STEPS: dict[int, Callable[[Storage, dict[str, Any]], None]] = {1: _nothing}


def migrate_store(root: Root) -> list[int]:
    """Brings a store to this version's schema; a step that was interrupted is done again by the next call.

    Returns:
        The schema versions that were left behind, oldest first; empty where there is nothing to do.

    Raises:
        StoreError: no store, a damaged one, or one that no step leads on from.
    """
    storage = open_storage(root)
    done: list[int] = []
    while True:
        store = sound_attributes(storage) or {}
        version = _left_to_do(storage, store.get("schema_version"))
        if version not in _STEPS:
            open_store(root)  # says what is wrong, if anything is
            return done
        _STEPS[version](storage, store)
        storage.replace("zarr.json", group_json({**store, "schema_version": version + 1}))
        keep_copy(storage)
        done.append(version)


def _left_to_do(storage: Storage, version: Any) -> Any:
    """The version to go on from: of zarr.json, or an older one of its copy, which each step writes last."""
    copied = (copied_attributes(storage) or {}).get("schema_version")
    return copied if version == SCHEMA_VERSION and copied in _STEPS else version


assert set(_STEPS) == set(range(1, SCHEMA_VERSION)), "a step leads on from every older schema"
