"""Engine state -> a folder that proves itself: staged, digested, committed last; the newest one that verifies wins.

    <root>/step_00000500/          weights.safetensors  optimizer.safetensors  state.json  MANIFEST.json
    <root>/.staging-…/             an attempt that has not been committed (removed some time later)
    <root>/damaged-step_…/         a checkpoint that failed its digests, kept for people to look at
    <root>/best-00000400/          the exported model of the best validation so far; its checkpoints refer to it

MANIFEST.json holds size and BLAKE2b digest of each file; the folder gets its name by rename after everything in it is
on disk, so a folder named step_… is complete. Nothing in it depends on the world size.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlm_dist.errors import CheckpointError
from vlm_dist.train.engine import EngineState

MANIFEST = "MANIFEST.json"
STRAY_SECONDS = 600
_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: `step` updates are done."""

    path: Path
    step: int


def digest_file(path: Path) -> str:
    """BLAKE2b-256 of a file, in hex."""
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_whole(folder: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a folder, which then gets the name `folder`: it is there whole or not at all (rank 0).

    Errors: CheckpointError when the disk refuses (what had the name before stays, if it came to that).
    """
    staging = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        write(staging)
        for path in [*staging.rglob("*"), staging]:
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
        sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise CheckpointError(f"{folder} could not be written: {error}") from error
        raise
    _remove_strays(folder.parent, f".{folder.name.partition('-')[0]}-*")


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _remove_strays(folder: Path, pattern: str) -> None:
    """Remove attempts that a killed process left behind."""
    for stray in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            # A worker that outlives its killed driver for some seconds may be writing a younger one.
            if time.time() - stray.stat().st_mtime > STRAY_SECONDS:
                shutil.rmtree(stray, ignore_errors=True)


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, root: Path, keep: int = 2) -> None:
        self.root = root
        self.keep = keep

    def committed(self) -> list[Checkpoint]:
        """Committed checkpoints, oldest first (not verified)."""
        named = ((path, _STEP.fullmatch(path.name)) for path in self.root.glob("step_*"))
        return sorted((Checkpoint(path, int(name[1])) for path, name in named if name), key=lambda c: c.step)

    def best(self, step: int) -> Path:
        """Where the model that was best at the validation of `step` lies."""
        return self.root / f"best-{step:08d}"

    @property
    def all_damaged(self) -> bool:
        """Whether there were checkpoints and none is left: to begin again would throw the run away unasked."""
        return not self.committed() and any(self.root.glob("damaged-*"))

    def save(
        self, step: int, state: EngineState, extra: dict[str, Any], about: dict[str, Any] | None = None
    ) -> Checkpoint:
        """Write and commit a checkpoint; the last good one is removed only afterwards.

        `extra` comes back from `load`; `about` is for people and tools that read the manifest.

        Errors: CheckpointError when the disk refuses (what was there stays).
        """
        final = self.root / f"step_{step:08d}"
        staging = self.root / f".staging-{step:08d}-{uuid.uuid4().hex[:8]}"
        try:
            staging.mkdir(parents=True)
            save_file(state.weights, staging / "weights.safetensors")
            flat = {f"{key}/{name}": t for key, tensors in state.moments.items() for name, t in tensors.items()}
            save_file(flat, staging / "optimizer.safetensors")
            (staging / "state.json").write_text(
                json.dumps({"step": step, "counters": state.counters, **extra}, indent=1)
            )
            files = {p.name: {"bytes": p.stat().st_size, "blake2b": digest_file(p)} for p in sorted(staging.iterdir())}
            (staging / MANIFEST).write_text(json.dumps({"step": step, **(about or {}), "files": files}, indent=1))
            for path in [*staging.iterdir(), staging]:
                sync(path)
            try:
                staging.rename(final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                shutil.rmtree(staging)  # this very step is committed already, and one commit is as good as the other
            sync(self.root)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.root}: {error}"
            ) from error
        self._prune()
        return Checkpoint(final, step)

    def prune_to(self, keep: int) -> int:
        """Remove all but the newest `keep` checkpoints that verify, and what was moved aside as damaged.

        Bytes that it freed. Errors: CheckpointError when no checkpoint verifies: then nothing is removed.
        """
        whole = [checkpoint for checkpoint in self.committed() if not self.check(checkpoint)]
        if not whole:
            raise CheckpointError(f"no checkpoint in {self.root} is whole: nothing was removed")
        before = _bytes_in(self.root)
        kept = {checkpoint.path for checkpoint in whole[-keep:]}
        for path in [*(c.path for c in self.committed() if c.path not in kept), *self.root.glob("damaged-*")]:
            shutil.rmtree(path, ignore_errors=True)
        self.keep = keep
        self._prune()
        return before - _bytes_in(self.root)

    def _prune(self) -> None:
        for old in self.committed()[: -self.keep]:
            shutil.rmtree(old.path, ignore_errors=True)
        # Each checkpoint that is kept needs its own: the newest may turn out damaged, and the older is gone on from.
        needed = {self.best(step) for step in map(self.best_step, self.committed()) if step is not None}
        for best in set(self.root.glob("best-*")) - needed:
            shutil.rmtree(best, ignore_errors=True)
        for pattern in (".staging-*", ".best-*"):
            _remove_strays(self.root, pattern)

    @staticmethod
    def best_step(checkpoint: Checkpoint) -> int | None:
        """The step of the best validation before a checkpoint; None where there was none, or it is damaged."""
        try:
            best = json.loads((checkpoint.path / "state.json").read_text()).get("best")
        except (OSError, ValueError):
            return None  # damaged: `newest` will say so
        return int(best["step"]) if best else None

    @staticmethod
    def manifest(checkpoint: Checkpoint) -> dict[str, Any]:
        """What a checkpoint says of itself. Errors: CheckpointError when it says nothing that can be read."""
        try:
            manifest = json.loads((checkpoint.path / MANIFEST).read_text())
            if all({"bytes", "blake2b"} <= set(claim) for claim in manifest["files"].values()):
                return manifest
            reason = "a file without size or digest"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error
        raise CheckpointError(f"{MANIFEST} is missing or unreadable ({reason})")

    @staticmethod
    def check(checkpoint: Checkpoint, *, deep: bool = True) -> str:
        """What is wrong with a checkpoint, in words; empty when every size, and with `deep` every digest, agrees."""
        try:
            manifest = CheckpointFolder.manifest(checkpoint)
        except CheckpointError as error:
            return str(error)
        for name, claim in manifest["files"].items():
            path = checkpoint.path / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != claim["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, its manifest says {claim['bytes']}"
            if deep and digest_file(path) != claim["blake2b"]:
                return f"{name} does not have the digest that its manifest says"
        return ""

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that verifies, and what was found damaged on the way (moved aside and named).

        Only one process may call it while no other reads: rank 0 decides, the others are told.
        """
        complaints: list[str] = []
        for checkpoint in reversed(self.committed()):
            problem = self.check(checkpoint)
            if not problem:
                return checkpoint, complaints
            aside = self.root / f"damaged-{checkpoint.path.name}-{uuid.uuid4().hex[:4]}"
            checkpoint.path.rename(aside)
            complaints.append(f"checkpoint {checkpoint.path.name} is damaged: {problem}; moved to {aside.name}")
        return None, complaints

    @staticmethod
    def load(checkpoint: Checkpoint) -> tuple[EngineState, dict[str, Any]]:
        """State and extra fields of a verified checkpoint."""
        extra = json.loads((checkpoint.path / "state.json").read_text())
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(checkpoint.path / "optimizer.safetensors").items():
            kind, _, name = key.partition("/")
            moments.setdefault(kind, {})[name] = tensor
        weights = load_file(checkpoint.path / "weights.safetensors")
        return EngineState(weights, moments, extra.pop("counters")), extra
