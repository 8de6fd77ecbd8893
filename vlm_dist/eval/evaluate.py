"""A model and a split → predictions, table, pictures, metrics (… tasks → evaluate → runs)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from vlm_dist.eval.predictions import write_predictions, write_table
from vlm_dist.tasks.base import Split, Task, TaskModel


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found, and the files it left.

    Attributes:
        metrics: By MLflow-legal name; `test_items` were measured, `test_items_missing` have no features.
        predictions: The .npz with all that was predicted.
        table: JSONL, one row per example.
        pictures: PNG files.
    """

    metrics: dict[str, float]
    predictions: Path
    table: Path
    pictures: list[Path]

    @property
    def files(self) -> Iterator[Path]:
        """All files, for the artifacts of a run."""
        yield from (self.predictions, self.table, *self.pictures)


def evaluate(
    task: Task, model: TaskModel, split: Split, device: torch.device | str, folder: Path, batch: int = 64
) -> EvaluationResult:
    """Predicts a split and writes everything that is known about it below `folder`.

    Args:
        task: Loaded task.
        model: What `task.build` or `task.build_zero_shot` made, on `device`.
        split: "test" or "held-out".
        device: Where the model is.
        folder: Is made; files of the same name are replaced.
        batch: Items in one forward pass.

    Raises:
        TaskDataError: The split is empty.
    """
    predictions = task.predict(model, split, device, batch)
    path = write_predictions(predictions, folder / f"{task.name}_{split}.npz")
    table = write_table(task.examples(predictions), folder / f"{task.name}_{split}.jsonl")
    # How much of the test was measured stands beside what was measured.
    items = {"test_items": task.misfits.test_items, "test_items_missing": task.misfits.test_items_missing}
    metrics = task.metrics(predictions) | {f"{task.name}/{name}": float(value) for name, value in items.items()}
    return EvaluationResult(metrics, path, table, task.pictures(predictions, folder))
