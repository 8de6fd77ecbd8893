"""How far an extraction is: what became of videos, counted by its workers and shown by its driver."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from feature_store.records import VideoRecord


class Tally(NamedTuple):
    """What became of the videos of a shard (or of many)."""

    ok: int = 0
    seconds: int = 0
    """Seconds of video that became rows."""
    reasons: Mapping[str, int] = {}
    """Failed videos by reason; `overflow` counts those that wait for a further shard."""

    @property
    def tried(self) -> int:
        """Videos that something became of, also those that wait for a further shard."""
        return self.ok + sum(self.reasons.values())

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


def tally_of(records: Iterable[VideoRecord]) -> Tally:
    """What became of these videos."""
    tally = Tally()
    for record in records:
        tally = tally.plus_record(record)
    return tally


class Work(NamedTuple):
    """What an encoder did since its worker was ready; or the sum of many."""

    encoded_s: int = 0
    """Seconds of video that went through the network, also of videos that are not finished, or of no use."""
    waiting_s: float = 0.0
    """Seconds in which the encoder had nothing to do: it waited for decoding."""
    working_s: float = 0.0
    """Seconds in which it encoded."""

    def plus(self, other: "Work") -> "Work":
        """The sum of two."""
        return Work(
            self.encoded_s + other.encoded_s, self.waiting_s + other.waiting_s, self.working_s + other.working_s
        )


class Sign(NamedTuple):
    """A sign of life of a worker that is at a shard."""

    tally: Tally
    """The shard's videos so far."""
    work: Work = Work()
    """The worker's, at all of its shards."""
    all_begun: bool = False
    """None of the shard's videos waits for its turn: the next shard may begin."""
    alone: str = ""
    """Id of the only video that is in work, where they are in work one at a time."""
