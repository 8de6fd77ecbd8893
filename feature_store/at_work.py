"""Who is writing to a store right now: notes that are renewed while a writer lives (writers ⇄ repair, prune).

A repair removes what is unfinished, so it must not run beside a writer, nor a writer begin beside a repair: each leaves
its note in `_staging` and looks for the other's afterwards, so that one of two sees the other. How old a note is, the
store's own clock tells. A writer that was killed falls silent.
"""

import json
import os
import re
import socket
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

from feature_store.files import SCRATCH
from feature_store.layout import StoreMeta, scratch_name
from vlm_dist.errors import StoreError

QUIET_S = 60.0  # a writer that has given no sign for so long is gone
REPAIR, SNAPSHOT = "store verify --repair", "a snapshot"
_BEAT_S = 10.0
_WRITER = re.compile(r"writer\.[0-9a-f]{32}\.json")

_mine: set[str] = set()  # what this process does within its own repair is part of it


@contextmanager
def at_work(meta: StoreMeta, what: str) -> Generator[str]:
    """Shows, while the block runs, that somebody writes to the store; gives the name of the note in `_staging`.

    A note that cannot be written stops nobody: a full disk is reported by what is to be written.

    Raises:
        StoreError: the store is being repaired.
    """
    name = f"{scratch_name('writer')}.json"
    key = f"{SCRATCH}/{name}"
    who = f"{what} (process {os.getpid()} on {socket.gethostname()})"
    over = Event()

    def sign() -> None:
        with suppress(OSError, StoreError):
            meta.storage.replace(key, json.dumps({"who": who}).encode())

    def go_on() -> None:
        while not over.wait(_BEAT_S):
            sign()

    sign()
    thread = Thread(target=go_on, name="at-work", daemon=True)
    thread.start()
    _mine.add(name)
    try:
        if what != REPAIR:
            _refuse(meta, _mine, REPAIR, "Wait until it is done; if it was killed, try again in a minute")
        yield name
    finally:
        over.set()
        thread.join()
        _mine.discard(name)
        with suppress(OSError, StoreError):
            meta.storage.remove(key)


def require_no_writers(meta: StoreMeta, but: str = "", kind: str = "", hint: str = "") -> None:
    """Refuses to go on while somebody writes to the store.

    Args:
        meta: the store.
        but: name of the caller's own note.
        kind: only writers whose `what` begins so.
        hint: what else may be done about it.

    Raises:
        StoreError: names a writer that gave a sign of life within the last minute.
    """
    _refuse(meta, {but}, kind, f"Wait until it is done; if it was killed, try again in a minute{hint}")


def _refuse(meta: StoreMeta, but: set[str], kind: str, advice: str) -> None:
    now: float | None = None
    for name, who in list(_signs(meta, kind)):
        if name in but:
            continue
        if now is None:
            own = next((name for name in but if name), "")
            now = meta.storage.changed(f"{SCRATCH}/{own}") if own else time.time()
        if (age := now - meta.storage.changed(f"{SCRATCH}/{name}")) < QUIET_S:
            doing = "repaired" if kind == REPAIR else "written to"
            raise StoreError(
                f"{meta.root} is being {doing}: {who} gave a sign of life {max(0.0, age):.0f} s ago. {advice}"
            )


def _signs(meta: StoreMeta, kind: str) -> Iterator[tuple[str, str]]:
    """(note, who) of every note that can be read."""
    for name in meta.storage.names(SCRATCH):
        if not _WRITER.fullmatch(name):
            continue
        try:
            data = meta.storage.read(f"{SCRATCH}/{name}")
        except FileNotFoundError:  # its writer is done
            continue
        with suppress(ValueError, KeyError, TypeError):  # half a note: copied or damaged
            who = str(json.loads(data)["who"])
            if who.startswith(kind):
                yield name, who
