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
from typing import Any, Literal

from vlm_dist.errors import CheckpointError, ConfigError, TrainingError

RECORD = "run.json"
Resume = Literal["auto", "must", "never"]
_CONTENT = ("store", "videos")  # parts of an identity that say what is in the store


def digest_of(identity: Mapping[str, Any]) -> str:
    """Of what is trained, in hex."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    """What run.json of a run's folder says; empty where there is none. Errors: CheckpointError when it is damaged."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        record = error
    if not isinstance(record, dict):
        raise CheckpointError(
            f"{folder / RECORD} is damaged ({record}); remove it, and the command goes on from the run's "
            "checkpoints, or type --resume never for another run"
        )
    return record


class RunFolder:
    """One run on disk; `record` is what run.json says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = read_record(path)

    @classmethod
    def for_identity(cls, runs: Path, kind: str, identity: Mapping[str, Any], resume: Resume = "auto") -> "RunFolder":
        """The folder of the run that `identity` (JSON-able) describes.

        Args:
            runs: folder of all runs.
            kind: beginning of its name.
            identity: what is trained.
            resume: "never" takes the next free folder of that name; "must" one that there is something to go on from.

        Raises:
            ConfigError: there is none, and there must be.
        """
        name = f"{kind}-{digest_of(identity)[:8]}"
        path, number = runs / name, 1
        while resume == "never" and path.exists():
            number += 1
            path = runs / f"{name}-{number}"
        found = cls(path)
        if resume == "must" and not found.finished and not found.has_checkpoint:
            others = sorted({place.parents[1].name for place in runs.glob(f"{kind}-*/checkpoints/step_*")})
            raise ConfigError(
                f"--resume must: there is no checkpoint in {path}, where a run of these very settings would lie; "
                f"runs with checkpoints: {', '.join(others) or 'none'}. Leave --resume out to begin"
            )
        return found

    @classmethod
    def of_changed_store(cls, runs: Path, kind: str, identity: Mapping[str, Any], store: str) -> "RunFolder | None":
        """An unfinished run with checkpoints on this store that differs from `identity` by the store's content alone;
        before all others one that went on with the changed store, and does not differ any more.

        None where a run of just this identity has the name that it would have.
        """
        ours = json.loads(json.dumps(identity, default=str))
        own = runs / f"{kind}-{digest_of(identity)[:8]}"
        if own.exists():
            return None
        found: list[RunFolder] = []
        for path in sorted(runs.glob(f"{kind}-*")):
            try:
                run = cls(path)
            except CheckpointError:
                continue  # damaged, and another run's: it is told when that run is asked for
            known = run.record.get("identity")
            if known == ours:
                return run
            if not isinstance(known, dict) or run.record.get("store") != store or run.finished:
                continue
            same = {key: known.get(key) for key in ours} == {**ours, **{key: known.get(key) for key in _CONTENT}}
            if same and run.has_checkpoint:
                found.append(run)
        return found[0] if found else None

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is one, sound or not."""
        return any(self.path.glob("checkpoints/step_*"))

    @property
    def finished(self) -> bool:
        """Whether the run has ended and its model is there."""
        return self.record.get("status") == "finished" and self.model.is_dir()

    @property
    def model(self) -> Path:
        """The exported model."""
        return self.path / "model"

    def write(self, **changes: Any) -> None:
        """Change run.json (atomically). Errors: CheckpointError when the disk refuses (the old one stays)."""
        self.record |= changes
        temporary = self.path / f".{RECORD}.{os.getpid()}"
        try:
            with temporary.open("w") as file:
                json.dump(self.record, file, indent=1, default=str)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path / RECORD)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(f"{self.path / RECORD} could not be written: {error}") from error

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
                    f"{self.path.name} is being trained by another process; wait for it, or type --resume never for a "
                    "second run"
                ) from None
            self.__init__(self.path)
            yield
