"""The random numbers: uniform, independent, and decided by their keys alone."""

import numpy as np

from tests.vlm_dist.data.corpus import keys_for
from vlm_dist.data.rng import ClipKeys, Stream, absorb, start


def test_draws_are_uniform_and_streams_and_counters_are_not_correlated():
    keys = keys_for(np.zeros(20_000))
    draws = np.concatenate([keys.uniform(stream, np.arange(4)) for stream in (Stream.CENTRE, Stream.MASK_TEXT)], 1)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, 50, (0, 1))[0]
    expected = draws.size / 50
    # Chi-square with 49 degrees of freedom: above 95 once in 10,000 seeds.
    assert ((counts - expected) ** 2 / expected).sum() < 95
    correlation = np.corrcoef(draws.T) - np.eye(8)
    assert np.abs(correlation).max() < 0.035


def test_every_key_matters_and_nothing_else_does():
    base = ClipKeys(np.array([5]), 1, np.array([2]), np.array([3]), np.array([4]))
    draw = base.uniform(Stream.CENTRE)
    assert draw == ClipKeys(np.array([9]), 1, np.array([2]), np.array([3]), np.array([4])).uniform(Stream.CENTRE)
    for seed, epoch, position, clip in [(0, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5), (1, 3, 2, 4)]:
        other = ClipKeys(np.array([5]), seed, np.array([epoch]), np.array([position]), np.array([clip]))
        assert draw != other.uniform(Stream.CENTRE)
    assert draw != base.uniform(Stream.LENGTH)
    assert draw != base.uniform(Stream.CENTRE, 1)


def test_counters_may_be_drawn_one_by_one_or_at_once_and_for_any_slice():
    keys = keys_for(np.zeros(10))
    at_once = keys.uniform(Stream.MASK_TEXT, np.arange(6))
    assert np.array_equal(at_once, np.stack([keys.uniform(Stream.MASK_TEXT, c) for c in range(6)], 1))
    assert np.array_equal(at_once[3:7], keys[3:7].uniform(Stream.MASK_TEXT, np.arange(6)))


def test_numbers_stay_as_they_are():
    """A replay of an old run needs the very same numbers from every later version."""
    assert absorb(start(43211), 7).tolist() == [EXPECTED_STATE]
    keys = ClipKeys(np.array([0, 0]), 2**63 + 5, np.array([0, 1]), np.array([10, 11]), np.array([2, 3]))
    assert keys.uniform(Stream.GROWTH, 3).tolist() == EXPECTED_DRAWS


EXPECTED_STATE = 7122827919897620042
EXPECTED_DRAWS = [0.9843614194912845, 0.6503516221729845]
