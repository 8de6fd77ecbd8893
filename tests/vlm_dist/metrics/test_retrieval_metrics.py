import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlm_dist.errors import TrainingError
from vlm_dist.metrics.retrieval import Ties, chance_metrics, count_block, rank_counts, ranks, retrieval_metrics


@pytest.mark.parametrize("case", ["random50", "ties", "all_equal"])
def test_reference_ties_match_golden(shared: Path, case: str) -> None:
    scores = np.load(shared / "golden" / "metrics_inputs.npz")[f"sim_{case}"]
    expected = json.loads((shared / "golden" / "metrics.json").read_text())[f"retrieval_{case}"]
    metrics = retrieval_metrics(count_block(scores, np.eye(len(scores), dtype=bool)), "reference")
    names = {"R1": "recall_at_1", "R5": "recall_at_5", "R10": "recall_at_10", "MR": "median_rank"}
    assert {key: metrics[name] for key, name in names.items()} == pytest.approx(expected, abs=1e-12)


def naive(scores: np.ndarray, right: np.ndarray, ties: Ties) -> list[float]:
    """Sorts each row, without the correct candidates that are not the best, and looks the best one up."""
    result = []
    for row, ok in zip(scores.tolist(), right.tolist(), strict=True):
        best = max(value for value, good in zip(row, ok, strict=True) if good)
        line = sorted([best] + [value for value, good in zip(row, ok, strict=True) if not good], reverse=True)
        places = [place for place, value in enumerate(line) if value == best]
        result += {"average": [sum(places) / len(places)], "pessimistic": [places[-1]], "reference": places}[ties]
    return result


@given(data=st.data(), ties=st.sampled_from(["average", "pessimistic", "reference"]))
@settings(max_examples=60, deadline=None)
def test_equal_to_the_naive_definition(data: st.DataObject, ties: Ties) -> None:
    count, candidates = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 7))
    whole = st.integers(-2, 2).map(float)  # small integers: many ties, and exact dot products
    queries = data.draw(hnp.arrays(np.float32, (count, 3), elements=whole))
    videos = data.draw(hnp.arrays(np.float32, (candidates, 3), elements=whole))
    group = data.draw(hnp.arrays(np.int64, count, elements=st.integers(0, candidates - 1)))
    block = data.draw(st.integers(1, 10))
    clips = np.arange(candidates)
    there = naive(queries @ videos.T, group[:, None] == clips, ties)
    assert ranks(rank_counts(queries, videos, group, clips, block), ties).tolist() == there
    # Back again: some videos have several right texts, of which the best counts; those without one are left out.
    asked = np.unique(group)
    back = naive(videos[asked] @ queries.T, asked[:, None] == group, ties)
    assert ranks(rank_counts(videos[asked], queries, asked, group, block), ties).tolist() == back


def test_chance_is_what_random_scores_give() -> None:
    rng = np.random.default_rng(0)
    counts = rank_counts(rng.normal(size=(4000, 16)), rng.normal(size=(20, 16)), np.arange(4000) % 20, np.arange(20))
    metrics, chance = retrieval_metrics(counts), chance_metrics(20)
    assert {name: metrics[name] for name in chance} == pytest.approx(chance, rel=0.12)


@pytest.mark.parametrize("candidates", [1, 3, 10, 19, 21, 200])
def test_a_collapsed_model_is_exactly_at_chance(candidates: int) -> None:
    same, clips = np.ones((candidates, 4), np.float32), np.arange(candidates)
    metrics = retrieval_metrics(rank_counts(same, same, clips, clips))
    chance = chance_metrics(candidates)
    assert {name: metrics[name] for name in chance} == pytest.approx(chance, abs=1e-12)


@given(scores=hnp.arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(1, 5)), elements=st.integers(0, 2)))
@settings(max_examples=40, deadline=None)
def test_ties_count_as_the_mean_over_all_orders(scores: np.ndarray) -> None:
    """Brute force: the mean of recalls and reciprocal rank over every order that the candidates can stand in."""
    right = np.zeros_like(scores, bool)
    right[:, 0] = True
    found = []
    for row in scores.tolist():
        for order in itertools.permutations(range(len(row))):  # a stable sort after any order breaks ties by that order
            place = sorted(order, key=lambda c: -row[c]).index(0)
            found.append([*(place < k for k in (1, 5, 10)), 1 / (place + 1)])
    metrics = retrieval_metrics(count_block(scores, right))
    names = ("recall_at_1", "recall_at_5", "recall_at_10", "mean_reciprocal_rank")
    assert [metrics[name] for name in names] == pytest.approx(np.mean(found, axis=0).tolist(), abs=1e-12)


def test_a_diverged_model_is_named() -> None:
    with pytest.raises(TrainingError, match="diverged"):
        rank_counts(np.full((2, 3), np.nan), np.ones((2, 3)), np.arange(2), np.arange(2))
