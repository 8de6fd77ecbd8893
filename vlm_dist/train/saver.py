"""State of the engine -> committed checkpoints, written while training goes on (beside the training loop)."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from vlm_dist.errors import CheckpointError, TrainingError
from vlm_dist.train import distributed
from vlm_dist.train.checkpoints import CheckpointFolder
from vlm_dist.train.engine import Engine, EngineState

_RETRIES = 10  # between two regular checkpoints, after one that the disk refused


class Saver:
    """Commits checkpoints from a thread of rank 0. A disk that refuses costs a warning; it is asked again soon.

    Args:
        folder: where.
        about: what a manifest says of the run.
        every: updates between checkpoints.
        emit: gets ("checkpoint", path) and ("warning", text), from the thread.
    """

    def __init__(
        self, folder: CheckpointFolder, about: dict[str, Any], every: int, emit: Callable[[str, Any], None]
    ) -> None:
        self._folder, self._about, self._every, self._emit = folder, about, every, emit
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._refused = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()  # when all is written
        if kind is None:
            self.wait()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be made after `step` updates; the same on every rank (at times a collective)."""
        if step % self._every == 0:
            return True
        return step % max(1, self._every // _RETRIES) == 0 and distributed.of_rank_zero(self._refused)

    def save(self, engine: Engine, step: int, extra: dict[str, Any]) -> None:
        """Take the state of this very moment and write it in the thread (a collective).

        Raises:
            TrainingError: the ranks' weights are not the same.
        """
        check_replicas(engine, step)
        state = engine.export_state()
        if distributed.rank() == 0:
            self.wait()
            self._writing = self._thread.submit(self._commit, step, state, extra)

    def wait(self) -> None:
        """Until what is being written is committed, or refused."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _commit(self, step: int, state: EngineState, extra: dict[str, Any]) -> None:
        try:
            saved = self._folder.save(step, state, extra, self._about)
        except CheckpointError as error:
            self._refused = True
            self._emit("warning", f"{error}. Training goes on, and another checkpoint is tried soon; make room")
        else:
            self._refused = False
            self._emit("checkpoint", str(saved.path))


def check_replicas(engine: Engine, step: int) -> None:
    """Compare a hash of the ranks' weights (a collective). Raises TrainingError where a rank has others."""
    hashes = distributed.all_gather_counts([engine.weights_hash()], engine.device)[:, 0].tolist()
    if len(set(hashes)) > 1:
        usual = max(set(hashes), key=hashes.count)
        odd = [rank for rank, found in enumerate(hashes) if found != usual]
        raise TrainingError(
            f"after step {step} the weights of rank {', '.join(map(str, odd[:8]))} differ from the other ranks': a "
            "fault of the hardware or of a library. Nothing of it was saved; type the command again to go on from the "
            "newest checkpoint, without that machine"
        )
