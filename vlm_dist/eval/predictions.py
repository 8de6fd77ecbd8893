"""Predictions on disk, which score again without model or store (… tasks → predictions → metrics → runs)."""

import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlm_dist.errors import TaskDataError

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


def read_predictions(path: Path) -> Predictions:
    """Reads what `write_predictions` wrote.

    Raises:
        TaskDataError: The file is absent, no predictions file, or of another format.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop("header").tobytes())
        form = header["format"]
    except FileNotFoundError as error:
        raise TaskDataError(f"{path}: no such predictions file; `vlm-dist evaluate` writes one") from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise TaskDataError(f"{path}: not a predictions file of vlm-dist ({error})") from error
    if form != FORMAT:
        raise TaskDataError(f"{path}: predictions of format {form}, this version reads {FORMAT}; evaluate again")
    return Predictions(header["task"], header["split"], arrays, header["info"])


def _bytes(document: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(document, ensure_ascii=False).encode(), np.uint8)


def write_table(rows: Iterable[dict[str, Any]], path: Path) -> Path:
    """Writes per-example rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path
