"""A training run's folder: named by what is trained, so that the same command finds its own unfinished work.

runs/pretrain-3f9a12c4/   run.json (what, status, MLflow run)  checkpoints/  model/ (the result)  ray/
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm_dist.errors import ConfigError, TrainingError

RECORD = "run.json"


class RunFolder:
    """One run on disk; `record` is what run.json says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = {}
        if (path / RECORD).is_file():
            self.record = json.loads((path / RECORD).read_text())

    @classmethod
    def for_identity(cls, runs: Path, kind: str, identity: Mapping[str, Any], *, new: bool = False) -> "RunFolder":
        """The folder of the run that `identity` (JSON-able) describes; with `new` the next free one of that name."""
        text = json.dumps(identity, sort_keys=True, default=str)
        name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        path, number = runs / name, 1
        while new and path.exists():
            number += 1
            path = runs / f"{name}-{number}"
        return cls(path)

    @property
    def finished(self) -> bool:
        """Whether the run has ended and its model is there."""
        return self.record.get("status") == "finished" and self.model.is_dir()

    @property
    def model(self) -> Path:
        """The exported model."""
        return self.path / "model"

    def write(self, **changes: Any) -> None:
        """Change run.json (atomically)."""
        self.record |= changes
        temporary = self.path / f".{RECORD}.{os.getpid()}"
        temporary.write_text(json.dumps(self.record, indent=1, default=str))
        temporary.replace(self.path / RECORD)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process. Errors: TrainingError when another one trains it now."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise ConfigError(
                f"the run's folder {self.path} cannot be written: {error.strerror}; set `runs`"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainingError(
                    f"{self.path.name} is being trained by another process; wait for it, or type --new for a second run"
                ) from None
            self.__init__(self.path)
            yield
