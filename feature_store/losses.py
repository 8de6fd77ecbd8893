"""Workers that died: whose fault it was, a shard's, one of its videos' or nobody's (under the extraction's dispatch).

A shard at which workers die without coming any further is asked for with one video in work at a time. At which video a
worker then dies is certain, and a video at which several did is given up, as those at which decoders die are.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping

from feature_store.plan import ShardTask
from vlm_dist.errors import ExtractionError

DEATHS = 3  # in a row, of workers that came no further with a shard than others before, or did not start
_CAREFUL = 2  # of them, after which a shard's videos are in work one at a time
_ALONE = 2  # workers that died at a video alone in work; two others had died before
_IN_A_ROW = 3  # videos of a shard, one after the other: it is the workers that are broken, not the videos


class Losses:
    """Counts the deaths of workers at shards."""

    def __init__(self) -> None:
        self._in_vain: Counter[int] = Counter()
        self._furthest: dict[int, int] = {}
        self._alone: Counter[tuple[int, str]] = Counter()
        self._given_up: defaultdict[int, dict[str, str]] = defaultdict(dict)

    def careful(self, shard: int) -> bool:
        """Whether a shard's videos shall be in work one at a time."""
        return self._in_vain[shard] >= _CAREFUL

    def given_up(self, shard: int) -> Mapping[str, str]:
        """Why its videos that workers die of are not to be tried any more, by id."""
        return dict(self._given_up[shard])

    def count(self, task: ShardTask, tried: int, alone: str, error: BaseException | str) -> int:
        """Count the death of a worker.

        Args:
            task: What it was at.
            tried: Videos of which it had said what became of them.
            alone: Id of the only video that it had in work; "" where that is not known, or it was not the video.
            error: How it died.

        Returns:
            Deaths in a row that brought nothing; 0 where this one did.

        Raises:
            ExtractionError: it makes no sense to go on with this shard.
        """
        shard = task.shard
        if alone:
            return self._at_video(task, alone, error)
        if tried > self._furthest.get(shard, 0):
            self._furthest[shard], self._in_vain[shard] = tried, 0
            return 0
        self._in_vain[shard] += 1
        if self._in_vain[shard] >= DEATHS:
            raise ExtractionError(
                f"shard {shard}: its worker died {self._in_vain[shard]} times without coming any further: {error}"
            )
        return self._in_vain[shard]

    def _at_video(self, task: ShardTask, video_id: str, error: BaseException | str) -> int:
        shard, ids = task.shard, [video.video_id for video in task.videos]
        self._alone[shard, video_id] += 1
        if self._alone[shard, video_id] < _ALONE:
            return self._alone[shard, video_id]
        place = ids.index(video_id)
        given_up = self._given_up[shard]
        why = str(error).strip().partition("\n")[0]
        given_up[video_id] = f"{task.videos[place].path}: {_ALONE} workers died that had no other video in work: {why}"
        self._in_vain[shard] = 0
        if place + 1 >= _IN_A_ROW and all(ids[k] in given_up for k in range(place + 1 - _IN_A_ROW, place)):
            raise ExtractionError(
                f"shard {shard}: workers died at each of {_IN_A_ROW} videos in a row, so it is not the videos: {error}"
            )
        return 0
