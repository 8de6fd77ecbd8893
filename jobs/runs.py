"""The runs that there are: listed, found by name, and put right when their process has died."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from cluster.processes import boot_id, is_alive
from jobs.client import connect, experiments, unreachable
from jobs.facts import PREFIX
from vlm_dist.errors import JobError

_PAGE = 1000
# The metric that stands for a run in a list: the first of these that it has, under its task's name or plain.
_HEADLINES = (
    *("recall_at_1", "frame_accuracy", "avg_recall", "accuracy", "cider"),
    *("validation/loss", "train/loss", "extract/videos"),
)


@dataclass(frozen=True)
class RunRow:
    """One run as a list shows it; times in seconds."""

    id: str
    name: str
    kind: str
    task: str
    status: str
    age_s: float
    duration_s: float
    metric: str
    value: float | None
    step: int | None
    end_reason: str
    error: str
    checkpoint: str
    parent: str

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return asdict(self)


def list_runs(uri: str, limit: int = 50) -> list[RunRow]:
    """The newest runs of all experiments, newest first.

    Raises:
        JobError: The server cannot be reached.
    """
    client = connect(uri)
    return [_row(run) for run in _search(client, "", limit)]


def reconcile(uri: str) -> list[str]:
    """End every run of this machine that says RUNNING while its process is gone; return the names of those.

    They become FAILED with the tag `vlm_dist.end_reason = lost`. Runs of other machines are not touched.
    """
    client = connect(uri)
    lost: list[str] = []
    mine = f"attributes.status = 'RUNNING' and tags.`{PREFIX}host` = '{socket.gethostname()}'"
    for run in list(_search(client, mine)):
        tags = run.data.tags
        same_boot = tags.get(f"{PREFIX}boot") == boot_id()
        if same_boot and is_alive(int(tags.get(f"{PREFIX}pid", "0")), tags.get(f"{PREFIX}pid_start", "")):
            continue
        client.set_tag(run.info.run_id, f"{PREFIX}end_reason", "lost")
        client.set_terminated(run.info.run_id, "FAILED")
        lost.append(run.info.run_name or run.info.run_id)
    return lost


def find_run(uri: str, name: str) -> Run:
    """The run with this name, or whose id starts with this text.

    Raises:
        JobError: There is none, there are several, or the server cannot be reached.
    """
    run = lookup_run(uri, name)
    if run is None:
        raise JobError(f"no run is called `{name}` or has an id that starts so; `vlm-dist jobs list` shows the runs")
    return run


def lookup_run(uri: str, name: str) -> Run | None:
    """As `find_run`, but None where there is no such run; other errors are errors."""
    client = connect(uri)
    quoted = name.replace("'", "")
    found = list(_search(client, f"attributes.run_name = '{quoted}'", 10))
    found = found or [run for run in _search(client, "") if len(name) >= 4 and run.info.run_id.startswith(name)]
    if len(found) < 2:
        return found[0] if found else None
    names = ", ".join(f"{run.info.run_name} ({run.info.run_id[:8]})" for run in found[:5])
    raise JobError(f"`{name}` is more than one run: {names}; give more of the id")


def newest_checkpoint(uri: str, kind: str, task: str = "") -> RunRow | None:
    """The newest finished run of this kind and task that left a checkpoint (tag `vlm_dist.checkpoint`)."""
    wanted = f"attributes.status = 'FINISHED' and tags.`{PREFIX}kind` = '{kind}' and tags.`{PREFIX}checkpoint` != ''"
    if task:
        wanted += f" and tags.`{PREFIX}task` = '{task}'"
    return next((_row(run) for run in _search(connect(uri), wanted, 1)), None)


def extract_run(uri: str, fingerprint: str) -> str:
    """Id of the newest finished extraction that left a store of this fingerprint; empty when none is known."""
    wanted = f"attributes.status = 'FINISHED' and tags.`{PREFIX}kind` = 'extract'"
    wanted += f" and tags.`{PREFIX}store_fingerprint` = '{fingerprint}'"
    return next((run.info.run_id for run in _search(connect(uri), wanted, 1)), "")


def latest_runs(client: MlflowClient, kinds: tuple[str, ...]) -> list[Run]:
    """Finished runs of these kinds, newest first."""
    return [run for run in _search(client, "attributes.status = 'FINISHED'") if tag(run, "kind") in kinds]


def tag(run: Run, name: str) -> str:
    """Our tag `name` of a run; empty when it has none."""
    return run.data.tags.get(f"{PREFIX}{name}", "")


def _search(client: MlflowClient, query: str, limit: int | None = None) -> Iterator[Run]:
    """Runs of all our experiments that match, newest first, page by page."""
    where = experiments(client)
    token: str | None = None
    given = 0
    while where:
        size = _PAGE if limit is None else min(_PAGE, limit - given)
        try:
            page = client.search_runs(
                where, query, max_results=size, order_by=["attributes.start_time DESC"], page_token=token
            )
        except MlflowException as error:
            raise unreachable(client, error) from error
        yield from page
        given += len(page)
        token = page.token
        if not token or given == limit:
            return


def _row(run: Run) -> RunRow:
    now = time.time()
    started = (run.info.start_time or 0) / 1000
    ended = run.info.end_time / 1000 if run.info.end_time else now
    metrics = run.data.metrics
    wanted = [name for short in _HEADLINES for name in (f"{tag(run, 'task')}/{short}", short)]
    headline = next((name for name in wanted if name in metrics), next(iter(metrics), ""))
    steps = {metric.key: metric.step for metric in run.data._metric_objs}  # type: ignore[reportPrivateUsage]
    return RunRow(
        id=run.info.run_id,
        name=run.info.run_name or "",
        kind=tag(run, "kind"),
        task=tag(run, "task"),
        status=run.info.status,
        age_s=now - started,
        duration_s=ended - started,
        metric=headline,
        value=metrics.get(headline),
        step=steps.get(headline),
        end_reason=tag(run, "end_reason"),
        error=tag(run, "error"),
        checkpoint=tag(run, "checkpoint"),
        parent=tag(run, "parent_run"),
    )
