"""A run and its page in MLflow: config, metrics, files, tags, and how it ended.

    with tracked_run(uri, kind="pretrain", params=settings.flat()) as tracker:
        tracker.metrics({"train/loss": 1.0}, step=10)

Nothing that the caller does inside the block waits for the server or fails because of it; see jobs/writer.py.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import contextlib
import logging
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from jobs.client import connect, experiment_id, experiment_name, unreachable
from jobs.facts import PREFIX, run_facts
from jobs.runs import reconcile
from jobs.writer import RunWriter

_LOG = logging.getLogger("vlm_dist")
_METRIC_NAME = re.compile(r"[\w\-. :/]+")
_LONGEST_PARAM, _LONGEST_TAG = 6000, 8000  # MLflow's limits
_TAGS_AT_ONCE = 100  # likewise
_FLUSH_TIMEOUT_S = 60.0

Scalar = str | int | float | bool


class Tracker:
    """One tracked run: every method queues and returns at once."""

    def __init__(self, client: MlflowClient, experiment: str, run_id: str, name: str) -> None:
        self.run_id = run_id
        self.name = name
        self.uri = client.tracking_uri
        self.url = f"{self.uri}/#/experiments/{experiment}/runs/{run_id}"
        self._client = client
        self._writer = RunWriter(client, run_id)
        self._scratch = tempfile.TemporaryDirectory(prefix="vlm-dist-run-")

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Queue metrics of one step; names like `train/loss` (letters, digits and ``_-. :/``)."""
        now = int(time.time() * 1000)
        for name in values:
            assert _METRIC_NAME.fullmatch(name), f"MLflow does not take the metric name {name!r}"
        self._writer.put(*(Metric(name, float(value), now, step) for name, value in values.items()))

    def params(self, values: Mapping[str, Scalar]) -> None:
        """Queue params; each can be set once in the life of a run."""
        self._writer.put(*(Param(key, str(value)[:_LONGEST_PARAM]) for key, value in values.items()))

    def tags(self, values: Mapping[str, Scalar]) -> None:
        """Queue tags; a later value replaces an earlier one."""
        self._writer.put(*(RunTag(key, _cut(str(value))) for key, value in values.items()))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Queue the upload of a file, or of all that a folder holds; it must stay there until the run has ended."""
        upload = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        self._writer.call(str(path), lambda: upload(self.run_id, str(path), folder or None))

    def text(self, text: str, name: str) -> None:
        """Queue the artifact `name` (with folders, `plots/loss.txt`) with this content."""
        path = Path(self._scratch.name) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        self.artifact(path, folder=str(Path(name).parent) if Path(name).parent.name else "")

    def picture(self, draw: Callable[[Path], None], name: str) -> None:
        """Queue the artifact `name` that `draw` writes into a file now."""
        path = Path(self._scratch.name) / name
        draw(path)
        self.artifact(path)

    def dataset(self, name: str, fingerprint: str, context: str = "training") -> None:
        """Queue the data set that this run read: a store's folder and fingerprint."""
        data = Dataset(name=Path(name).name, digest=fingerprint[:36], source_type="local", source=name)
        entry = DatasetInput(dataset=data, tags=[InputTag("mlflow.data.context", context)])
        self._writer.call(f"data set {name}", lambda: self._client.log_inputs(self.run_id, [entry]))

    def note(self, markdown: str) -> None:
        """Queue the text that stands on top of the run's page."""
        self.tags({"mlflow.note.content": markdown})

    def end(self, status: str, reason: str) -> None:
        """Queue the end, then send what is left; what does not arrive in a minute is reported in a warning."""
        ended = int(time.time() * 1000)
        self.tags({f"{PREFIX}end_reason": reason})
        self._writer.call("the end of the run", lambda: self._client.set_terminated(self.run_id, status, ended))
        if lost := self._writer.close(_FLUSH_TIMEOUT_S):
            _LOG.warning("run %s: not everything reached the tracking server: %s", self.name, "; ".join(lost))
        self._scratch.cleanup()

    def fail(self, error: BaseException) -> None:
        """End as FAILED with the root cause: tag `vlm_dist.error`, artifact `error.txt`."""
        cause = root_cause(error)
        line = f"{type(cause).__name__}: {cause}"
        self.tags({f"{PREFIX}error": line.strip().partition("\n")[0]})
        self.text(f"{line}\n\n{''.join(traceback.format_exception(error))}", "error.txt")
        self.end("FAILED", "failed")


@contextlib.contextmanager
def tracked_run(
    uri: str,
    *,
    kind: str,
    task: str = "",
    params: Mapping[str, Scalar],
    tags: Mapping[str, Scalar] | None = None,
    resume: str | None = None,
) -> Generator[Tracker]:
    """Open a run for the block; it ends FINISHED, FAILED (with the root cause) or KILLED (Ctrl-C).

    Args:
        uri: http address of the tracking server.
        kind: pretrain, finetune, evaluate, extract.
        task: End task, where there is one; it names the experiment.
        params: The resolved config as dotted scalars.
        tags: Further tags (`vlm_dist.store_fingerprint`).
        resume: Run id to go on with instead of a new run; changed params become tags `vlm_dist.resume_<n>.<key>`.

    Raises:
        JobError: The server cannot be reached at the start (later it may be away without harm).
    """
    client = connect(uri)
    reconcile(uri)
    told = {f"{PREFIX}kind": kind, f"{PREFIX}task": task} | run_facts() | dict(tags or {})
    try:
        where = experiment_id(client, experiment_name(kind, task))
        opened = _reopen(client, resume, params, told) if resume else None
        opened = opened or _create(client, where, kind, task, told)
    except MlflowException as error:
        raise unreachable(client, error) from error
    tracker = Tracker(client, where, *opened[:2])
    tracker.params({key: value for key, value in params.items() if key not in opened[2]})
    try:
        yield tracker
    except KeyboardInterrupt:
        tracker.end("KILLED", "killed")
        raise
    except BaseException as error:
        tracker.fail(error)
        raise
    tracker.end("FINISHED", "finished")


def root_cause(error: BaseException) -> BaseException:
    """The first error of a chain: what was raised before anybody wrapped it."""
    seen = {id(error)}
    while True:
        # Ray wraps a worker's error without chaining it and calls it `cause`.
        inner = getattr(error, "cause", None) or error.__cause__
        inner = inner or (None if error.__suppress_context__ else error.__context__)
        if not isinstance(inner, BaseException) or id(inner) in seen:
            return error
        seen.add(id(inner))
        error = inner


_Opened = tuple[str, str, set[str]]
"""Run id, run name, params that it has already."""


def _create(client: MlflowClient, experiment: str, kind: str, task: str, tags: Mapping[str, Scalar]) -> _Opened:
    """A new run. It carries its tags from its first moment: one without process would say RUNNING for ever."""
    name = "-".join(filter(None, (kind, task, time.strftime("%Y%m%d-%H%M%S"))))
    run = client.create_run(experiment, run_name=name, tags={key: _cut(str(value)) for key, value in tags.items()})
    return run.info.run_id, name, set()


def _reopen(
    client: MlflowClient, run_id: str, params: Mapping[str, Scalar], tags: Mapping[str, Scalar]
) -> _Opened | None:
    """The run to go on with; None when this server does not know it (another server, a new database).

    It names its new process before it says RUNNING again, lest another command take it for lost in between.
    """
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    had = run.data.params
    number = int(run.data.tags.get(f"{PREFIX}resumes", "0")) + 1
    changed = {key: str(value) for key, value in params.items() if key in had and had[key] != str(value)}
    told = dict(tags) | {f"{PREFIX}resume_{number}.{key}": value for key, value in changed.items()}
    told |= {f"{PREFIX}resumes": number}
    left = [RunTag(key, _cut(str(value))) for key, value in told.items()]
    while left:
        client.log_batch(run_id, tags=left[:_TAGS_AT_ONCE], synchronous=True)
        left = left[_TAGS_AT_ONCE:]
    for stale in (f"{PREFIX}error", f"{PREFIX}end_reason"):
        if stale in run.data.tags:
            client.delete_tag(run_id, stale)
    client.update_run(run_id, status="RUNNING")
    return run_id, run.info.run_name or run_id, set(had)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TAG else text[: _LONGEST_TAG - 1] + "…"
