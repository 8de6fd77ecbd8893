"""A training job -> ranks on a Ray cluster: Ray Train places, starts and restarts them; reports come back live.

Ray's own checkpoints are not used: a rank that starts looks for the newest verified checkpoint of the run itself
(vlm_dist/train/checkpoints.py), so a restart after a crash and a new run of the same command are one and the same.
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from vlm_dist.errors import TrainingError, VlmDistError
from vlm_dist.train.worker import TrainJob, TrainOutcome

OnEvent = Callable[[str, Any], None]
POLL_SECONDS = 0.5
_LOG = logging.getLogger("vlm_dist")


@dataclass(frozen=True)
class Workers:
    """How many ranks, and what each of them takes."""

    count: int
    use_gpu: bool
    cpus_each: float = 1.0


class ReportBox:
    """A mailbox between rank 0 and the driver (becomes a Ray actor): reports wait in it until they are fetched."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any]] = []
        self._root_cause: VlmDistError | None = None

    def push(self, kind: str, payload: Any) -> None:
        """Add an event; the first error of any rank is kept as the root cause."""
        if kind == "error":
            self._root_cause = self._root_cause or payload
        else:
            self._events.append((kind, payload))

    def drain(self) -> list[tuple[str, Any]]:
        """All events since the last call."""
        events, self._events = self._events, []
        return events

    def root_cause(self) -> VlmDistError | None:
        """The first error that a rank understood (a user's, not a crash)."""
        return self._root_cause


def _train_loop(config: dict[str, Any]) -> TrainOutcome | None:
    """Runs on every rank, inside a Ray Train worker; None after an error that a restart cannot mend."""
    import ray.train
    import ray.train.torch

    from vlm_dist.train.worker import run_rank

    box = config["box"]
    rank = ray.train.get_context().get_world_rank()
    if _root_cause(box):
        return None  # the same input gives the same error: this restart would only repeat it

    def emit(kind: str, payload: Any) -> None:
        if rank == 0:
            box.push.remote(kind, payload)

    try:
        outcome = run_rank(config["job"], ray.train.torch.get_device(), emit)
    except VlmDistError as error:
        ray.get(box.push.remote("error", error))
        raise
    # The last report must be in the box before the driver stops looking.
    _root_cause(box)
    return outcome


def _root_cause(box: Any) -> VlmDistError | None:
    """The first error that a rank understood."""
    import ray

    return cast("VlmDistError | None", ray.get(box.root_cause.remote()))


@contextlib.contextmanager
def _own_interrupt() -> Iterator[None]:
    """Let Ray Train abort its workers on Ctrl-C, then go on as a KeyboardInterrupt: it would exit the process."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _following(box: Any, on_event: OnEvent) -> Iterator[None]:
    """Hand the box's events to `on_event` from a thread while the block runs."""
    import ray
    from ray.exceptions import RayError

    done = threading.Event()

    def deliver() -> None:
        for kind, payload in ray.get(box.drain.remote()):
            on_event(kind, payload)

    def follow() -> None:
        while not done.wait(POLL_SECONDS):
            try:
                deliver()
            except RayError:
                continue
            except Exception:  # a report that cannot be shown must not end the reports
                _LOG.exception("a report of the training run was lost")

    thread = threading.Thread(target=follow, name="reports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)
        with contextlib.suppress(RayError):
            deliver()


def run_training(job: TrainJob, workers: Workers, on_event: OnEvent) -> TrainOutcome:
    """Train `job` on `workers` of the connected Ray cluster and wait for its end.

    Args:
        job: What is trained; its `out` must be a folder that every node sees.
        workers: Number of ranks and their resources (checked against the cluster by the caller).
        on_event: Called in a thread with ("step", StepReport), ("validation", dict), ("checkpoint", path), ….

    Errors: the first error that a rank gave, as TrainingError or its own class. A worker that dies is restarted from
    the newest checkpoint up to `train.max_failures` times.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    box: Any = ray.remote(num_cpus=0)(ReportBox).remote()  # pyright: ignore[reportFunctionMemberAccess]
    out = Path(job.out).resolve()
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={"job": job, "box": box},
        torch_config=TorchConfig(backend="nccl" if workers.use_gpu else "gloo", timeout_s=job.train.timeout_s),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": workers.cpus_each} | ({"GPU": 1} if workers.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=f"attempt-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=str(out / "ray"),
            failure_config=FailureConfig(max_failures=job.train.max_failures),
        ),
    )
    with _own_interrupt(), _following(box, on_event):
        try:
            outcome = trainer.fit().return_value
            if cause := _root_cause(box):
                raise cause
            return cast("TrainOutcome", outcome)
        except VlmDistError:
            raise
        except Exception as error:
            if cause := _root_cause(box):
                raise cause from error
            raise TrainingError(f"training stopped: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """The innermost message of a Ray Train failure, without its wrappers."""
    inner: BaseException = error
    while True:
        failures = getattr(inner, "worker_failures", None)
        nested = next(iter(failures.values())) if failures else (inner.__cause__ or getattr(inner, "cause", None))
        if not isinstance(nested, BaseException) or nested is inner:
            break
        inner = nested
    lines = [line for line in str(inner).strip().splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[-1] if lines else 'no message'}"
