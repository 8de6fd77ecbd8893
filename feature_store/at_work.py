"""Who is writing to a store right now: notes that are renewed while a writer lives (writers → repair).

A repair removes what is unfinished, so it must not run beside a writer. Whatever writes for longer than a moment shows
it in `_staging`, in a folder as in a bucket: an extraction, an import, captions, a snapshot and a repair by a note of
their own here, the workers of an extraction by theirs (notes.py). A writer that was killed falls silent.
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
from feature_store.notes import parse_note
from vlm_dist.errors import StoreError

QUIET_S = 60.0  # a writer that has given no sign for so long is gone
_BEAT_S = 10.0
_WRITER = re.compile(r"writer\.[0-9a-f]{32}\.json")
_WORKER = re.compile(r"note-(\d+)\.json")


@contextmanager
def at_work(meta: StoreMeta, what: str) -> Generator[str]:
    """Shows, while the block runs, that somebody writes to the store; gives the name of the note in `_staging`.

    A note that cannot be written stops nobody: a full disk is reported by what is to be written.
    """
    name = f"{scratch_name('writer')}.json"
    key = f"{SCRATCH}/{name}"
    who = f"{what} (process {os.getpid()} on {socket.gethostname()})"
    over = Event()

    def sign() -> None:
        with suppress(OSError, StoreError):
            meta.storage.replace(key, json.dumps({"who": who, "beat": time.time()}).encode())

    def go_on() -> None:
        while not over.wait(_BEAT_S):
            sign()

    sign()
    thread = Thread(target=go_on, name="at-work", daemon=True)
    thread.start()
    try:
        yield name
    finally:
        over.set()
        thread.join()
        with suppress(OSError, StoreError):
            meta.storage.remove(key)


def require_no_writers(meta: StoreMeta, but: str = "") -> None:
    """Refuses to go on while somebody writes to the store.

    Args:
        meta: the store.
        but: name of the caller's own note.

    Raises:
        StoreError: names a writer that gave a sign of life within the last minute.
    """
    for name, who, beat in _signs(meta):
        if name != but and (age := time.time() - beat) < QUIET_S:
            raise StoreError(
                f"{meta.root} is being written to, and a repair removes what is unfinished: {who} gave a sign of life "
                f"{max(0.0, age):.0f} s ago. Wait until it is done; if it was killed, try again in a minute (or say "
                "`--writers-gone`, if you are sure of it)"
            )


def _signs(meta: StoreMeta) -> Iterator[tuple[str, str, float]]:
    """(note, who, last sign of life by the writer's own clock) of every note that can be read."""
    for name in meta.storage.names(SCRATCH):
        worker = _WORKER.fullmatch(name)
        if not worker and not _WRITER.fullmatch(name):
            continue
        try:
            data = meta.storage.read(f"{SCRATCH}/{name}")
        except FileNotFoundError:  # its writer is done
            continue
        if worker and (note := parse_note(data)):
            yield name, f"the extraction of shard {int(worker[1])}", note.beat
        elif not worker:
            with suppress(ValueError):  # half a note: copied or damaged
                told = json.loads(data)
                yield name, told["who"], told["beat"]
