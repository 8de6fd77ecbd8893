"""Predictions in memory and on disk (… tasks → predictions → metrics → runs)."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1


@dataclass(frozen=True)
class Predictions:
    """What a model said about one split of a task.

    Attributes:
        task: Name of the task.
        split: "test" or "held-out".
        arrays: Numeric arrays; each task kind documents its own.
        info: JSON-able facts that metrics, table and pictures need beside them (ids, captions, class names …).
    """

    task: str
    split: str
    arrays: dict[str, np.ndarray]
    info: dict[str, Any] = field(default_factory=dict)


def write_predictions(predictions: Predictions, path: Path) -> Path:
    """Writes one compressed .npz that holds no pickles; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": FORMAT, "task": predictions.task, "split": predictions.split, "info": predictions.info}
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, header=_bytes(header), **predictions.arrays)
    return path


def _bytes(document: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(document, ensure_ascii=False).encode(), np.uint8)


def write_table(rows: Iterable[dict[str, Any]], path: Path) -> Path:
    """Writes per-example rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path
