"""What extraction workers are doing, in small notes beside the store's staging (videos → features, seen by the driver).

A note names the video in work and what is done of the shard, so that the driver can show progress, tell a hung worker
from a slow one, and name the video that took a worker down with it. Lost notes cost no feature.
"""

import json
import time
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import NamedTuple

from feature_store.files import SCRATCH
from feature_store.records import VideoRecord
from feature_store.storage import Root, open_storage
from vlm_dist.errors import StoreError

BEAT_S = 5.0  # between signs of life of a video in work
_LOOK_S = 3.0  # between looks at a note in a bucket, where every look is a request


class Tally(NamedTuple):
    """What became of the videos of a shard (or of many)."""

    ok: int = 0
    seconds: int = 0
    """Seconds of video that became rows."""
    reasons: Mapping[str, int] = {}
    """Failed videos by reason; `overflow` counts those that wait for a further shard."""

    @property
    def failed(self) -> int:
        """Videos that gave no features."""
        return sum(self.reasons.values()) - self.reasons.get("overflow", 0)

    def plus(self, other: "Tally") -> "Tally":
        """The sum of two tallies."""
        return Tally(
            self.ok + other.ok, self.seconds + other.seconds, dict(Counter(self.reasons) + Counter(other.reasons))
        )

    def plus_record(self, record: VideoRecord) -> "Tally":
        """The tally with one more video."""
        if record.status == "ok":
            return self.plus(Tally(1, record.n_rows))
        return self.plus(Tally(reasons={record.reason or record.status: 1}))


class Note(NamedTuple):
    """What a worker is doing: the video in work ("" between videos), and what it has done of the shard."""

    video_id: str
    tally: Tally
    beat: float = 0.0
    """When it said so, by its own clock."""


class Notes:
    """The notes of a store, one for each shard in work."""

    def __init__(self, root: Root) -> None:
        self._storage = open_storage(root)
        self._look_s = 0.0 if self._storage.local("") else _LOOK_S
        self._seen: dict[int, tuple[float, Note | None]] = {}
        self._written = 0.0

    def write(self, shard: int, note: Note) -> None:
        """Say what is being done."""
        self._written = time.monotonic()
        with suppress(OSError, StoreError):  # a full disk is reported by the shard's own writer
            self._storage.replace(note_key(shard), json.dumps(note._replace(beat=time.time())).encode())

    def beat(self, shard: int, note: Note) -> None:
        """Say that the same is still being done, every few seconds."""
        if time.monotonic() - self._written > BEAT_S:
            self.write(shard, note)

    def read(self, shard: int, fresh: bool = False) -> Note | None:
        """The last note about a shard, or None; in a bucket perhaps of some seconds ago, unless it must be `fresh`."""
        looked, note = self._seen.get(shard, (-self._look_s, None))
        if fresh or time.monotonic() - looked >= self._look_s:
            note = self._read(shard)
            self._seen[shard] = time.monotonic(), note
        return note

    def clear(self, shard: int) -> None:
        """Forget a shard, whose next worker begins anew."""
        self._seen.pop(shard, None)
        self._storage.remove(note_key(shard))

    def clear_all(self, shards: Collection[int]) -> None:
        """Forget what a run that was killed left about these shards; one listing, and what is there."""
        there = set(self._storage.names(SCRATCH))
        for shard in shards:
            if note_key(shard).rpartition("/")[2] in there:
                self.clear(shard)

    def _read(self, shard: int) -> Note | None:
        try:
            return parse_note(self._storage.read(note_key(shard)))
        except (FileNotFoundError, StoreError):
            return None


def parse_note(data: bytes) -> Note | None:
    """What `Notes` wrote; None where it is damaged."""
    try:
        video_id, tally, beat = json.loads(data)
    except ValueError:
        return None
    return Note(video_id, Tally(*tally), beat)


def note_key(shard: int) -> str:
    """Where the note about a shard lies."""
    return f"{SCRATCH}/note-{shard:06d}.json"
