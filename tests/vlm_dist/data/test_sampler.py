"""The order of visits: shuffled, complete, replayable, the same for any number of ranks."""

import numpy as np
import pytest

from vlm_dist.data.sampler import GlobalOrder
from vlm_dist.errors import ConfigError

VIDEOS = np.arange(100, 150)


def visits(order: GlobalOrder, updates: range) -> np.ndarray:
    return np.concatenate([order.keys(u).video[:: order.clips_per_video] for u in updates])


def test_every_epoch_visits_every_video_once_in_another_order():
    order = GlobalOrder(VIDEOS, seed=0, global_batch=20, clips_per_video=4)
    assert order.visits_per_update == 5
    first, second = visits(order, range(10)), visits(order, range(10, 20))
    assert sorted(first) == sorted(second) == VIDEOS.tolist()
    assert (first != second).sum() > 40
    assert (visits(GlobalOrder(VIDEOS, 1, 20, 4), range(10)) != first).sum() > 40


def test_ranks_take_slices_of_one_batch_and_any_update_can_be_asked_first():
    order = GlobalOrder(VIDEOS, seed=3, global_batch=24, clips_per_video=8)
    whole = order.keys(777)
    assert len(whole) == 24
    again = GlobalOrder(VIDEOS, seed=3, global_batch=24, clips_per_video=8)
    # Three uneven slices that cut through visits.
    pieces = [again.keys(777, first, last) for first, last in [(11, 24), (0, 5), (5, 11)]]
    for field in ("video", "epoch", "position", "clip"):
        joined = np.concatenate([getattr(pieces[i], field) for i in (1, 2, 0)])
        assert np.array_equal(joined, getattr(whole, field))
    assert whole.position.tolist() == np.repeat(np.arange(777 * 3, 778 * 3), 8).tolist()
    assert whole.clip.tolist() == list(range(8)) * 3


def test_epoch_ends_within_an_update_and_nothing_is_dropped():
    order = GlobalOrder(VIDEOS[:7], seed=0, global_batch=10, clips_per_video=2)
    seen = visits(order, range(7))
    assert all(sorted(seen[i : i + 7]) == VIDEOS[:7].tolist() for i in range(0, 35, 7))
    assert order.keys(1).epoch.tolist() == [0, 0, 0, 0] + [1] * 6


def test_a_batch_may_hold_more_videos_than_the_corpus():
    order = GlobalOrder(VIDEOS[:3], seed=0, global_batch=64, clips_per_video=4)
    keys = order.keys(5)
    assert np.bincount(keys.video)[100:].min() >= 20
    named = set(zip(keys.epoch.tolist(), keys.position.tolist(), keys.clip.tolist(), strict=True))
    assert len(named) == 64, "a second visit draws other clips"


def test_wrong_sizes_are_refused():
    with pytest.raises(ConfigError, match="not a multiple of clips_per_video 32"):
        GlobalOrder(VIDEOS, 0, 100, 32)
    with pytest.raises(ConfigError, match="no video"):
        GlobalOrder(VIDEOS[:0], 0, 64, 32)
