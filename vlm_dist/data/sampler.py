"""The order of videos and clips in training: a pure function of seed and step, for any number of ranks and workers."""

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.rng import ClipKeys, Stream, absorb, start
from vlm_dist.errors import ConfigError


class GlobalOrder:
    """Visits of videos in one endless numbered row, cut into updates.

    Visit p goes to video number p mod V of epoch p div V's shuffle. An update takes the next videos of that row, also
    across the end of an epoch, so that nothing is dropped however small the corpus is; a batch with more videos than
    the corpus meets some of them twice, with other clips.
    """

    def __init__(self, videos: NDArray[np.int64], seed: int, global_batch: int, clips_per_video: int) -> None:
        """Lay out the visits.

        Args:
            videos: (V,) rows of the store that take part, V >= 1.
            seed: of the shuffles, the clips and the masks.
            global_batch: clips of one update, over all ranks and accumulation steps.
            clips_per_video: clips of one visit.

        Raises:
            ConfigError: global_batch is no multiple of clips_per_video, or there is no video.
        """
        if global_batch % clips_per_video:
            raise ConfigError(
                f"global_batch {global_batch} is not a multiple of clips_per_video {clips_per_video}: an update takes "
                f"whole visits. Nearest: {max(1, round(global_batch / clips_per_video)) * clips_per_video}"
            )
        if len(videos) == 0:
            raise ConfigError("there is no video to draw clips from")
        self.videos = np.asarray(videos, np.int64)
        self.seed = seed
        self.global_batch = global_batch
        self.clips_per_video = clips_per_video
        self._shuffles: dict[int, NDArray[np.int64]] = {}

    @property
    def visits_per_update(self) -> int:
        """Videos of one update."""
        return self.global_batch // self.clips_per_video

    def keys(self, update: int, first: int = 0, last: int | None = None) -> ClipKeys:
        """The clips first..last of update number `update` (from 0): any rank takes any slice of the global batch."""
        clips = np.arange(first, self.global_batch if last is None else last, dtype=np.int64)
        position = update * self.visits_per_update + clips // self.clips_per_video
        epoch, place = np.divmod(position, len(self.videos))
        video = np.empty_like(position)
        for number in np.unique(epoch):
            here = epoch == number
            video[here] = self._shuffle(int(number))[place[here]]
        return ClipKeys(video, self.seed, epoch, position, clips % self.clips_per_video)

    def _shuffle(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._shuffles:
            # Only neighbouring epochs meet in one update; small corpora meet more and pay little for each.
            if len(self._shuffles) >= 4:
                self._shuffles.pop(min(self._shuffles))
            state = absorb(absorb(start(self.seed), int(Stream.ORDER)), epoch)
            draws = absorb(state, np.arange(len(self.videos)))
            self._shuffles[epoch] = self.videos[np.argsort(draws, kind="stable")]
        return self._shuffles[epoch]
