import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlm_dist.metrics.segmentation import class_accuracies, segmentation_metrics


def test_frame_accuracy_matches_golden(shared: Path) -> None:
    inputs = np.load(shared / "golden" / "metrics_inputs.npz")
    expected = json.loads((shared / "golden" / "metrics.json").read_text())
    metrics = segmentation_metrics(inputs["coin_pred"], inputs["coin_true"], constant=0)
    assert metrics["frame_accuracy"] == expected["coin"]["frame_acc"]
    assert metrics["constant_frame_accuracy"] == expected["coin_all_background"]["frame_acc"]
    assert metrics["background_share"] == expected["coin_all_background"]["frame_acc"]


@given(pairs=hnp.arrays(np.int32, st.tuples(st.integers(1, 40), st.just(2)), elements=st.integers(0, 4)))
@settings(max_examples=50, deadline=None)
def test_equal_to_the_naive_definition(pairs: np.ndarray) -> None:
    predicted, truth = pairs[:, 0], pairs[:, 1]
    metrics = segmentation_metrics(predicted, truth, constant=3)
    rows = list(zip(predicted.tolist(), truth.tolist(), strict=True))
    by_class = {c: [p == t for p, t in rows if t == c] for c in set(truth.tolist())}
    shares = {c: sum(hits) / len(hits) for c, hits in by_class.items()}
    assert class_accuracies(predicted, truth) == pytest.approx(shares)
    assert metrics["class_accuracy"] == pytest.approx(sum(shares.values()) / len(shares))
    assert metrics["frame_accuracy"] == pytest.approx(sum(p == t for p, t in rows) / len(rows))
    steps = [(p, t) for p, t in rows if t]
    if steps:
        share = sum(p == t for p, t in steps) / len(steps)
        assert metrics["frame_accuracy_no_background"] == pytest.approx(share)
    else:
        assert "frame_accuracy_no_background" not in metrics
    assert metrics["constant_frame_accuracy"] == pytest.approx(sum(t == 3 for _, t in rows) / len(rows))
