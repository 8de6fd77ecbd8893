"""Runs beside the paper and beside each other (... metrics -> runs -> a table).

Runs that differ in nothing but the seed are one row: mean and spread (sample standard deviation) over n; of runs that
differ in nothing at all only the newest counts. What they read and where they started counts by content (fingerprint,
digest), not by the path where it lies.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlflow.entities import Run

from jobs.client import connect
from jobs.paper import PAPER
from jobs.runs import find_run, latest_runs, tag

# Metrics that a table shows, in this order: label, factor for people's eyes, digits.
METRICS: dict[str, tuple[str, float, int]] = {
    "recall_at_1": ("R@1", 100, 2),
    "recall_at_5": ("R@5", 100, 2),
    "recall_at_10": ("R@10", 100, 2),
    "median_rank": ("median rank", 1, 1),
    "frame_accuracy": ("frame accuracy", 100, 2),
    "frame_accuracy_no_background": ("without background", 100, 2),
    "avg_recall": ("average recall", 100, 2),
    "accuracy": ("accuracy", 100, 2),
    "bleu3": ("B-3", 100, 2),
    "bleu4": ("B-4", 100, 2),
    "meteor": ("M", 100, 2),
    "rouge_l": ("R-L", 100, 2),
    "cider": ("CIDEr", 1, 4),
    "train/loss": ("train loss", 1, 4),
    "validation/loss": ("validation loss", 1, 4),
}
_BASELINES = {"chance_": "chance", "constant_": "constant answer"}
# What may differ between runs of one row: the seed, and where files lie and work runs.
_NOT_CONFIG = {
    "train.seed", "runs", "store", "captions_file", "init", "cluster.ray_address", "cluster.ray_auth",
    "cluster.tracking_uri", "cluster.num_cpus",
}  # fmt: skip
_PLACES = re.compile(r"data\.[^.]+\.(data|store)")  # of each task's annotations and features
# The content behind those places: features and captions, annotations, who trained on what, the weights at the start.
_IDENTITY = ("store_fingerprint", "data_digest", "split_digest", "source_model")
_DIGEST = re.compile(r"[0-9a-f]{16,}")
_RESULT_KINDS = ("finetune", "evaluate")


@dataclass(frozen=True)
class Value:
    """One cell: the mean over a row's runs, and their spread where there are several."""

    mean: float
    spread: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of a table; `n` runs are behind it (0 for the paper's)."""

    label: str
    source: Literal["paper", "baseline", "ours"]
    values: dict[str, Value]
    n: int = 0
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskTable:
    """One question with the paper's rows and ours under the same metrics."""

    task: str
    title: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`; shares stay shares."""
        return asdict(self)


def compare(uri: str, names: Sequence[str] = ()) -> list[TaskTable]:
    """Tables of these runs, one for each task.

    Args:
        uri: http address of the tracking server.
        names: Run names or beginnings of run ids; none takes the newest result of every task, with its other seeds.

    Raises:
        JobError: A name that fits no run or several, or a server that cannot be reached.
    """
    finished = latest_runs(connect(uri), (*_RESULT_KINDS, "pretrain"))
    configs = _Configs(finished)
    runs = [find_run(uri, name) for name in names] if names else _newest(finished, configs)
    tasks: dict[str, list[Run]] = {}
    for run in _without_repeats(runs, configs):
        tasks.setdefault(tag(run, "task") or tag(run, "kind"), []).append(run)
    return [_table(task, group, configs) for task, group in sorted(tasks.items())]


class _Configs:
    """The settings behind a result: its run's own, and those of the run that trained the model it started from."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self._runs = {run.info.run_id: run for run in runs}

    def of(self, run: Run) -> dict[str, str]:
        """Setting to value; those of the model's origin carry its kind in front.

        Where the run that made the model is known, its configuration stands for the weights: they differ by its seed.
        """
        params = run.data.params.items()
        config = {key: value for key, value in params if key not in _NOT_CONFIG and not _PLACES.fullmatch(key)}
        config |= {name: value for name in _IDENTITY if (value := tag(run, name))}
        origin = self._runs.get(tag(run, "parent_run"))
        if origin is None:
            return config
        config.pop("source_model", None)
        return config | {f"{tag(origin, 'kind')} {key}": value for key, value in self.of(origin).items()}


def _newest(runs: Iterable[Run], configs: _Configs) -> list[Run]:
    """The newest run of each task and form of result, with all runs of its configuration."""
    chosen: dict[tuple[str, ...], dict[str, str]] = {}
    kept: list[Run] = []
    for run in runs:
        if tag(run, "kind") in _RESULT_KINDS:
            config = configs.of(run)
            if chosen.setdefault((tag(run, "task"), _form(run)), config) == config:
                kept.append(run)
    return kept


def _without_repeats(runs: Iterable[Run], configs: _Configs) -> list[Run]:
    """Without those that were made again later: of one form, configuration, seed and model at the start."""
    newest: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        seed = run.data.params.get("train.seed", "")
        started = (seed, tag(run, "source_model"), tag(run, "parent_run"))
        key = (tag(run, "task"), _form(run), *started, *sorted(configs.of(run).items()))
        newest[key] = max(newest.get(key, run), run, key=lambda each: each.info.start_time)
    return list(newest.values())


def _table(task: str, runs: list[Run], configs: _Configs) -> TaskTable:
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((_form(run), *sorted(configs.of(run).items())), []).append(run)
    paper = PAPER.get(task)
    methods = paper.rows if paper else {}
    found = {name for run in runs for name in run.data.metrics} | {
        f"{task}/{k}" for row in methods.values() for k in row
    }
    metrics = tuple(name for name in METRICS if f"{task}/{name}" in found or name in found)
    rows = [Row(name, "paper", {k: Value(v) for k, v in row.items()}) for name, row in methods.items()]
    rows += _baselines(task, metrics, runs)
    labels = _labels(list(groups.values()), configs)
    rows += [_ours(label, task, metrics, group) for label, group in zip(labels, groups.values(), strict=True)]
    return TaskTable(task, paper.title if paper else task, metrics, tuple(rows))


def _ours(label: str, task: str, metrics: Sequence[str], runs: list[Run]) -> Row:
    values: dict[str, Value] = {}
    for name in metrics:
        numbers = [value for run in runs if (value := _metric(run, task, name)) is not None]
        if numbers:
            values[name] = Value(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)
    return Row(label, "ours", values, len(runs), tuple(run.info.run_name or run.info.run_id for run in runs))


def _baselines(task: str, metrics: Sequence[str], runs: list[Run]) -> list[Row]:
    """What guessing would give on the very data of these runs, where the runs tell it and agree on it."""
    rows: list[Row] = []
    for prefix, label in _BASELINES.items():
        values: dict[str, Value] = {}
        for name in metrics:
            numbers = {run.data.metrics[key] for run in runs if (key := f"{task}/{prefix}{name}") in run.data.metrics}
            if len(numbers) == 1:
                values[name] = Value(numbers.pop())
        if values:
            rows.append(Row(label, "baseline", values))
    return rows


def _metric(run: Run, task: str, name: str) -> float | None:
    return run.data.metrics.get(f"{task}/{name}", run.data.metrics.get(name))


def _form(run: Run) -> str:
    """What kind of result it is: `finetune`, `evaluate zero-shot`, ..."""
    return f"{tag(run, 'kind')} {tag(run, 'form')}".strip()


def _short(value: str) -> str:
    return value[:8] if _DIGEST.fullmatch(value) else value


def _labels(groups: list[list[Run]], configs: _Configs) -> list[str]:
    """A name for each group: its form, and the settings in which it differs from the others of that form."""
    labels: list[str] = []
    for group in groups:
        label, mine = _form(group[0]), configs.of(group[0])
        rivals = [configs.of(other[0]) for other in groups if other is not group and _form(other[0]) == label]
        differing = sorted(key for key, value in mine.items() if any(rival.get(key) != value for rival in rivals))
        if 0 < len(differing) <= 3:
            label += ", " + ", ".join(f"{key}={_short(mine[key])}" for key in differing)
        elif rivals:
            label += f", {group[0].info.run_name}"
        labels.append(f"ours: {label}")
    return labels
