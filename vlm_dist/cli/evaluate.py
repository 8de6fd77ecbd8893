"""`vlm-dist evaluate TASK`: a model and annotations -> metrics, predictions, pictures."""

import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_dist.cli.context import Context
from vlm_dist.cli.models import Origin, check_origin, find_origin, seen_test_videos
from vlm_dist.cli.options import HERE, Annotations, Json, Overrides, Source, TaskName, TaskStore, Workspace
from vlm_dist.cli.output import print_json, print_table, print_warning, prose_on_stderr
from vlm_dist.errors import ConfigError

if TYPE_CHECKING:
    from vlm_dist.eval.evaluate import EvaluationResult
    from vlm_dist.tasks.base import Task


def evaluate(
    task: TaskName,
    source: Source = None,
    data: Annotations = None,
    store: TaskStore = None,
    zero_shot: Annotated[
        bool, typer.Option("--zero-shot", help="Take the newest pre-trained model, not fine-tuned.")
    ] = False,
    workspace: Workspace = HERE,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Measure a model on a task's test split.

    Without --from, the newest fine-tuned model of the task is taken, or with --zero-shot the newest pre-trained one.
    A pre-trained model that is named is always measured zero-shot.

    \b
    Examples:
      vlm-dist evaluate retrieval --data clips.jsonl
      vlm-dist evaluate retrieval --data MSRVTT_JSFUSION_test.csv --zero-shot --json
    """
    context = Context.open(workspace, overrides, {f"data.{task}.store": store, f"data.{task}.data": data})
    with prose_on_stderr(as_json):
        result = run_evaluate(context, task, source, zero_shot=zero_shot)
    if as_json:
        print_json(result)
    else:
        print_metrics(task, result["metrics"])


def run_evaluate(context: Context, task: str, source: str | None = None, *, zero_shot: bool = False) -> dict[str, Any]:
    """Evaluate as a tracked run; returns metrics and where the files are."""
    from feature_store.reader import FeatureReader
    from vlm_dist.tasks.registry import make_task

    make_task(task)  # an unknown name is refused before annotations are asked for
    data, store = task_data(context, task), task_store(context, task)
    fingerprint = FeatureReader(store).index.fingerprint
    kind, of = ("pretrain", "") if zero_shot else ("finetune", task)
    origin = find_origin(context, source, kind, of)
    if zero_shot:
        _must_be_pretrained(origin)
    check_origin(context, origin, store)
    folder = context.runs / f"evaluate-{task}-{time.strftime('%Y%m%d-%H%M%S')}"
    tags = task_tags(fingerprint, data, origin)
    with tempfile.TemporaryDirectory(prefix="vlm-dist-model-") as scratch, ExitStack() as stack:
        model = origin.model(context, store, Path(scratch))
        tracker = stack.enter_context(context.tracked("evaluate", task=task, tags=tags))
        tracker.dataset(store, fingerprint, "evaluation")
        result, form, loaded = evaluate_model(context, task, model, data, store, folder)
        for line in loaded.misfits.lines:
            print_warning(line)
        tracker.text(json.dumps(loaded.summary, indent=1), "data.json")
        tracker.tags({"vlm_dist.form": form})
        tracker.metrics(result.metrics, 0)
        tracker.note(summary_note(f"{task}, {form}: {origin.weights}", result.metrics))
        for file in result.files:
            tracker.artifact(file)
    return {"run": tracker.run_id, "task": task, "model": origin.weights, "form": form, "metrics": result.metrics,
            "predictions": str(result.predictions)}  # fmt: skip


def task_tags(fingerprint: str, data: Path, origin: Origin) -> dict[str, str]:
    """Tags of a result: what was measured on which annotations and features, and whether that is honest."""
    from vlm_dist.train.checkpoints import digest_file

    facts = {"store_fingerprint": fingerprint, "data_digest": digest_file(data)}
    facts |= {"test_videos_seen": seen_test_videos(origin, data)}
    return {f"vlm_dist.{name}": value for name, value in facts.items()} | origin.tags


def summary_note(title: str, metrics: dict[str, float]) -> str:
    """What stands on top of a run's page: its figures as a Markdown table."""
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in metrics.items())
    return f"{title}\n\n| metric | value |\n|---|---|\n{rows}"


def _must_be_pretrained(origin: Origin) -> None:
    from vlm_dist.tasks.checkpoint import fine_tuned_task

    trained_on = fine_tuned_task(Path(origin.weights)) if origin.exported else None
    if trained_on:
        raise ConfigError(
            f"--zero-shot measures a model that was not fine-tuned, and {origin.weights} was, on {trained_on}: leave "
            "--from or --zero-shot out, or name a pre-trained model"
        )


def evaluate_model(
    context: Context, task: str, model: Path, data: Path, store: str, folder: Path
) -> tuple["EvaluationResult", str, "Task"]:
    """Metrics of a model on the test split and files below `folder`; `fine-tuned` or `zero-shot`; the loaded task."""
    import torch

    from feature_store.reader import FeatureReader
    from vlm_dist.eval.evaluate import evaluate as evaluate_task
    from vlm_dist.model.checkpoint import load
    from vlm_dist.tasks.checkpoint import build_for_evaluation, fine_tuned_task
    from vlm_dist.tasks.registry import make_task

    loaded = load(model)
    worker = make_task(task, context.settings.data.get(task))
    worker.load(data, FeatureReader(store), loaded.tokenizer, loaded.config, context.settings.finetune, training=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = build_for_evaluation(worker, loaded.model, model).to(device).eval()
    result = evaluate_task(worker, module, "test", device, folder)
    return result, "fine-tuned" if fine_tuned_task(model) else "zero-shot", worker


def task_data(context: Context, task: str) -> Path:
    """The task's annotations. Errors: ConfigError that says how to name them."""
    options = context.settings.data.get(task)
    if options is None or not options.data:
        raise ConfigError(f"no annotations for {task}: give --data FILE, or set [data.{task}] data in vlm-dist.toml")
    path = Path(options.data)
    if not path.is_file():
        raise ConfigError(f"the annotations of {task}, {path}, are not there, or no file")
    return path


def task_store(context: Context, task: str) -> str:
    """The store of the task's videos: its own where it has one, else the workspace's."""
    options = context.settings.data.get(task)
    return context.require_store(options.store if options else "")


def print_metrics(task: str, metrics: dict[str, float]) -> None:
    """A small table of metrics."""
    print_table(
        ("metric", "value"), [(name, f"{value:.4g}") for name, value in metrics.items()], title=task, right=("value",)
    )
