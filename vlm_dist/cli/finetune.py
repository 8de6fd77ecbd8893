"""`vlm-dist finetune TASK`: a pre-trained model and annotations -> a fine-tuned model and its test metrics."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from vlm_dist.cli.context import Context, TrainingView
from vlm_dist.cli.evaluate import (
    evaluate_model,
    print_metrics,
    summary_note,
    task_data,
    task_store,
    task_tags,
)
from vlm_dist.cli.models import check_origin, find_origin
from vlm_dist.cli.options import (
    HERE,
    Annotations,
    CpuWorkers,
    Gpus,
    Json,
    Nodes,
    Overrides,
    Resume,
    Source,
    TaskName,
    TaskStore,
    Workspace,
)
from vlm_dist.cli.output import duration, print_json, prose_on_stderr
from vlm_dist.cli.workers import asked_workers, check_workers, resolve_workers, worker_tags


def finetune(
    task: TaskName,
    source: Source = None,
    data: Annotations = None,
    store: TaskStore = None,
    nodes: Nodes = 1,
    gpus: Gpus = None,
    workers: CpuWorkers = 1,
    resume: Resume = "auto",
    workspace: Workspace = HERE,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a model on an end task and measure it on the task's test split.

    Without --from, the newest finished pre-training run of the workspace is taken. The same command goes on with an
    unfinished run, and does nothing when it is finished.

    \b
    Examples:
      vlm-dist finetune retrieval --data clips.jsonl
      vlm-dist finetune coin --data COIN.json --from pretrain-3f9a12c4
    """
    context = Context.open(workspace, overrides, {f"data.{task}.store": store, f"data.{task}.data": data})
    with prose_on_stderr(as_json):
        result = run_finetune(context, task, source, nodes, gpus, workers, resume=resume)
    if as_json:
        print_json(result)


def run_finetune(
    context: Context,
    task: str,
    source: str | None = None,
    nodes: int = 1,
    gpus: int | None = 0,
    workers: int = 1,
    *,
    resume: Literal["auto", "must", "never"] = "auto",
) -> dict[str, Any]:
    """Fine-tune and test as one tracked run; prints the metrics and returns them."""
    from cluster.ray_local import ray_session
    from feature_store.reader import FeatureReader
    from vlm_dist.tasks.registry import make_task
    from vlm_dist.train.finetune import FinetuneJob
    from vlm_dist.train.ray_trainer import run_training
    from vlm_dist.train.run_folder import RunFolder

    settings = context.settings
    made = make_task(task, settings.data.get(task))
    options = made.options
    data, store = task_data(context, task), task_store(context, task)
    index = FeatureReader(store).index
    fingerprint = index.fingerprint
    origin = find_origin(context, source, "pretrain")
    check_origin(context, origin, store)
    tags = task_tags(fingerprint, data, origin)
    identity = {
        "task": task, "store": fingerprint, "data": tags["vlm_dist.data_digest"], "model": origin.identity,
        "made_with": None if origin.exported else [settings.model.model_dump(), settings.captions.tokenizer],
        "options": options.model_dump(exclude={"data", "store"}), "finetune": settings.finetune.model_dump(),
        "optim": settings.train.optim.model_dump(), "seed": settings.train.seed, "precision": settings.train.precision,
    }  # fmt: skip
    folder = RunFolder.for_identity(context.runs, f"finetune-{task}", identity, resume)
    if folder.finished:
        print(
            f"Nothing to do: {folder.path.name} is finished; its model is {folder.model}. "
            "Type --resume never to train again."
        )
        metrics = folder.record.get("metrics", {})
        print_metrics(task, metrics)
        return {"run": folder.record.get("run"), "model": str(folder.model), "metrics": metrics}
    batch = settings.finetune.batch or made.recipe.batch
    check_workers(asked_workers(nodes, gpus, workers), settings.train.precision, batch, "finetune.batch")
    with folder.locked():
        folder.write(identity=identity, status="unfinished", source=origin.weights)
        model = origin.model(context, store, folder.path / "init")
        job = FinetuneJob(task=task, options=options, data=str(data), store=store, snapshot=index.name,
                          reading=settings.store_layout, model=str(model),
                          out=str(folder.path), train=settings.train, finetune=settings.finetune)  # fmt: skip
        with ray_session(settings.cluster) as machines:
            ranks = resolve_workers(machines, nodes, gpus, workers)
            check_workers(ranks, settings.train.precision, batch, "finetune.batch")
            tags |= worker_tags(nodes, ranks) | {"vlm_dist.run_folder": str(folder.path)}
            with context.tracked("finetune", task=task, tags=tags, resume=folder.record.get("run")) as tracker:
                folder.write(run=tracker.run_id)
                tracker.dataset(store, fingerprint)
                with TrainingView(f"finetune {task}", tracker) as view:
                    outcome = run_training(job, ranks, view)
                result, _, loaded = evaluate_model(
                    context, task, Path(outcome.model), data, store, folder.path / "test"
                )
                tracker.text(json.dumps(loaded.summary, indent=1), "data.json")
                tracker.tags({"vlm_dist.checkpoint": outcome.model})
                tracker.metrics(result.metrics, outcome.step)
                tracker.note(summary_note(f"{task}, fine-tuned from {origin.weights}", result.metrics))
                for file in result.files:
                    tracker.artifact(file, "test")
        folder.write(status="finished", metrics=result.metrics, outcome=asdict(outcome))
    print(f"Fine-tuned {outcome.step} steps in {duration(outcome.train_seconds)}: {outcome.model}")
    print_metrics(task, result.metrics)
    return {"run": tracker.run_id, "model": outcome.model, "metrics": result.metrics}
