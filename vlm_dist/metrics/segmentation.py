"""Frame accuracy of action segmentation over all seconds of a split (… predictions → metrics → runs; facts 4.3)."""

import numpy as np

BACKGROUND = 0


def segmentation_metrics(predicted: np.ndarray, truth: np.ndarray, constant: int) -> dict[str, float]:
    """Micro-averaged accuracies over seconds, and what a constant answer would get.

    Args:
        predicted: (N,) class of each second, all videos one after the other.
        truth: (N,) true class; 0 is background.
        constant: The most frequent class of the *training* seconds.

    Returns:
        `frame_accuracy` (background counted, as the paper), `frame_accuracy_no_background` (only seconds that truly
        have a step), `class_accuracy` (mean over the classes that occur in `truth` of each one's accuracy),
        `constant_frame_accuracy` and `constant_class_accuracy` (the same for the constant answer), `background_share`.
    """
    assert predicted.shape == truth.shape, f"{predicted.shape} predictions for {truth.shape} true classes"
    assert len(truth), "accuracy of no seconds"
    metrics = _accuracies(predicted, truth)
    baseline = _accuracies(np.full_like(truth, constant), truth)
    return (
        metrics
        | {f"constant_{name}": value for name, value in baseline.items()}
        | {"background_share": float(np.mean(truth == BACKGROUND))}
    )


def _accuracies(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    correct = predicted == truth
    step = truth != BACKGROUND
    metrics = {"frame_accuracy": float(correct.mean()), "class_accuracy": float(np.mean(_by_class(correct, truth)[1]))}
    if step.any():
        metrics["frame_accuracy_no_background"] = float(correct[step].mean())
    return metrics


def _by_class(correct: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    seconds = np.bincount(truth)
    classes = np.flatnonzero(seconds)
    return classes, np.bincount(truth, weights=correct)[classes] / seconds[classes]


def class_accuracies(predicted: np.ndarray, truth: np.ndarray) -> dict[int, float]:
    """Accuracy over the seconds of each class that occurs in `truth`."""
    classes, accuracy = _by_class(predicted == truth, truth)
    return {int(c): float(a) for c, a in zip(classes, accuracy, strict=True)}
