"""A model and a split → predictions, table, pictures, metrics (… tasks → evaluate → runs)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from vlm_dist.eval.predictions import Predictions, read_predictions, write_predictions, write_table
from vlm_dist.tasks.base import Split, Task, TaskModel
from vlm_dist.tasks.config import TaskDataConfig
from vlm_dist.tasks.registry import make_task


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found, and the files it left.

    Attributes:
        metrics: By MLflow-legal name.
        predictions: The .npz that scores again (`score`).
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
    return _report(task, predictions, path, folder)


def score(path: Path, folder: Path, options: TaskDataConfig | None = None) -> EvaluationResult:
    """Scores stored predictions again, without model, annotations or features.

    Raises:
        TaskDataError: No predictions file of this version.
        ConfigError: Predictions of a task that this version does not know.
    """
    predictions = read_predictions(path)
    return _report(make_task(predictions.task, options), predictions, path, folder)


def _report(task: Task, predictions: Predictions, path: Path, folder: Path) -> EvaluationResult:
    metrics = task.metrics(predictions)
    table = write_table(task.examples(predictions), folder / f"{task.name}_{predictions.split}.jsonl")
    return EvaluationResult(metrics, path, table, task.pictures(predictions, folder))
