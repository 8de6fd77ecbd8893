"""Recall@k and median rank of text-video retrieval, block by block (… predictions → metrics → runs).

Reference facts 4.1: the score is a raw dot product, and every tied place of a row counts as one more query. That last
part is a defect (queries with many ties weigh more), so by default every query counts once, with what a random order of
its tied candidates gives on average. A collapsed model, whose scores are all equal, is then exactly at chance.
"""

from typing import Literal, NamedTuple

import numpy as np

from vlm_dist.errors import TrainingError

Ties = Literal["average", "pessimistic", "reference"]
RECALLS = (1, 5, 10)


class RankCounts(NamedTuple):
    """Where the right answer of each query stands.

    Attributes:
        above: (Q,) wrong candidates that score more than the right one.
        tied: (Q,) wrong candidates that score the same.
    """

    above: np.ndarray
    tied: np.ndarray


def count_block(scores: np.ndarray, right: np.ndarray) -> RankCounts:
    """Counts over the full candidate rows of some queries.

    Args:
        scores: (Q, C) score of each candidate.
        right: (Q, C) bool, the candidates that are correct (one or more a row); the best of them is ranked, and the
            others are neither above nor tied.
    """
    assert right.any(axis=1).all(), "a query without a correct candidate has no rank"
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    wrong = ~right
    return RankCounts(((scores > best) & wrong).sum(axis=1), ((scores == best) & wrong).sum(axis=1))


def rank_counts(
    queries: np.ndarray, candidates: np.ndarray, query_group: np.ndarray, candidate_group: np.ndarray, block: int = 1024
) -> RankCounts:
    """Ranks each query's candidates by dot product, never holding more than `block` rows of scores.

    Args:
        queries: (Q, D) embeddings.
        candidates: (C, D) embeddings.
        query_group: (Q,) a candidate is correct for a query when their groups are equal.
        candidate_group: (C,) as above.
        block: Queries scored at once.

    Raises:
        TrainingError: A score is not finite: the model diverged, and no rank means anything.
    """
    assert len(queries), "ranks of no queries"
    parts = []
    for start in range(0, len(queries), block):
        part = slice(start, start + block)
        scores = queries[part] @ candidates.T
        if not np.isfinite(scores).all():
            raise TrainingError("retrieval scores are not finite: the model diverged; lower the learning rate")
        parts.append(count_block(scores, query_group[part, None] == candidate_group[None, :]))
    return RankCounts(np.concatenate([p.above for p in parts]), np.concatenate([p.tied for p in parts]))


def ranks(counts: RankCounts, ties: Ties = "average") -> np.ndarray:
    """0-based rank of the right answer of each query.

    `average` is the mean of the places that the tied candidates share, `pessimistic` the last of them. `reference`
    gives one entry for *every* tied place, so the result is longer than the queries when there are ties.
    """
    if ties == "average":
        return counts.above + counts.tied / 2
    if ties == "pessimistic":
        return (counts.above + counts.tied).astype(np.float64)
    places = counts.tied + 1
    first = np.repeat(np.cumsum(places) - places, places)
    return np.repeat(counts.above, places) + (np.arange(places.sum()) - first).astype(np.float64)


def retrieval_metrics(counts: RankCounts, ties: Ties = "average") -> dict[str, float]:
    """Recall@1, 5, 10 (share of ranks below k), median rank (1-based) and mean reciprocal rank.

    Under `average`, recalls and reciprocal rank are expectations over the orders of the tied candidates: a right answer
    that shares ten places with nine others is in the first five half the time. The median is that of the mean ranks.
    """
    rank = ranks(counts, ties)
    if ties == "average":
        places = counts.tied + 1
        recalls = {k: np.clip((k - counts.above) / places, 0, 1) for k in RECALLS}
        harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, (counts.above + places).max() + 1))])
        reciprocal = (harmonic[counts.above + places] - harmonic[counts.above]) / places
    else:
        recalls = {k: rank < k for k in RECALLS}
        reciprocal = 1 / (rank + 1)
    return {f"recall_at_{k}": float(np.mean(found)) for k, found in recalls.items()} | {
        "median_rank": float(np.median(rank) + 1),
        "mean_reciprocal_rank": float(np.mean(reciprocal)),
    }


def chance_metrics(candidates: int) -> dict[str, float]:
    """What a uniformly random order of the candidates gives, with one right answer each."""
    return {f"recall_at_{k}": min(1.0, k / candidates) for k in RECALLS} | {"median_rank": (candidates + 1) / 2}
