"""What killed writers left in a store, taken away by whoever comes later (any store → a tidy one).

Nobody reads any of it; it costs space only. What may still be somebody's work stays: an attempt at a shard that is not
committed, and whatever was changed within a day.
"""

import re
import time

from feature_store.commit import committed_shards, read_commit, roll_forward, staged_attempts
from feature_store.files import SCRATCH
from feature_store.layout import SNAPSHOTS, VOIDED, StoreMeta
from feature_store.published import Location
from vlm_dist.errors import StoreError, StoreUnreachableError

IDLE_S = 24 * 3600.0
VOIDED_SNAPSHOT = "snapshot-"  # in `_voided`
_PRUNED = "pruned-"  # in `_staging`
_BUILT = re.compile(r"(\d{6,})\.[0-9a-f]{32}")


def sweep(meta: StoreMeta) -> None:
    """Removes what is left in `_staging`, and in a bucket what was put there for snapshots that never appeared."""
    _sweep_attempts(meta)
    for name in meta.storage.names(SCRATCH):
        if name.startswith(_PRUNED):
            _finish_withdrawal(meta, name)
    attempts = {name for *_, name in staged_attempts(meta)}
    for name in meta.storage.names(SCRATCH):
        if name not in attempts and time.time() - meta.storage.changed(f"{SCRATCH}/{name}") > IDLE_S:
            meta.storage.remove(f"{SCRATCH}/{name}")
    _sweep_unpublished(meta)


def withdraw(meta: StoreMeta, name: str) -> None:
    """Removes a snapshot: at once for readers, then its bytes; after a kill in between `sweep` does the rest."""
    aside = f"{_PRUNED}{name}"
    if meta.storage.move(f"{SNAPSHOTS}/{name}", f"{SCRATCH}/{aside}"):
        _finish_withdrawal(meta, aside)


def _sweep_attempts(meta: StoreMeta) -> None:
    """Deletes staged attempts at committed shards: losers can never win any more, winners are published."""
    committed = set(committed_shards(meta))
    for shard, attempt, name in list(staged_attempts(meta)):
        if shard not in committed:
            continue  # perhaps at work
        commit = read_commit(meta, shard)
        if commit.attempt == attempt:
            roll_forward(meta, commit)
        meta.storage.remove(f"{SCRATCH}/{name}")


def _finish_withdrawal(meta: StoreMeta, aside: str) -> None:
    # In a bucket a move that was killed leaves both: what names the objects must go before they do.
    meta.storage.remove(f"{SNAPSHOTS}/{aside.removeprefix(_PRUNED)}")
    if folder := named_folder(meta, f"{SCRATCH}/{aside}"):
        meta.storage.remove(folder)
    meta.storage.remove(f"{SCRATCH}/{aside}")


def named_folder(meta: StoreMeta, key: str) -> str | None:
    """The folder that a LOCATION names; empty where there is none, None where it is damaged (verify names it)."""
    try:
        location = Location.of(meta.storage, key)
    except StoreUnreachableError:
        raise
    except StoreError:
        return None
    return location.folder if location else ""


def _sweep_unpublished(meta: StoreMeta) -> None:
    """Objects of builders that did not publish them: of a number that another has taken, so that they never can.

    Those that a LOCATION names stay, also one that a repair has put aside.
    """
    names = meta.storage.names(SNAPSHOTS)
    newest = max((int(name) for name in names if name.isdigit()), default=0)
    built: dict[str, list[str]] = {}
    for name in names:
        if match := _BUILT.fullmatch(name):
            built.setdefault(match[1], []).append(f"{SNAPSHOTS}/{name}")
    for number, folders in built.items():
        if int(number) > newest or (number in names and len(folders) == 1):
            continue  # perhaps at work; or what the number's LOCATION names
        told = {named_folder(meta, key) for key in (f"{SNAPSHOTS}/{number}", f"{VOIDED}/{VOIDED_SNAPSHOT}{number}")}
        for folder in set(folders) - told if None not in told else ():
            meta.storage.remove(folder)
