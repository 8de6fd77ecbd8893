"""`vlm-dist pretrain`: a feature store with captions -> a pre-trained model."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_dist.cli.context import Context, TrainingView
from vlm_dist.cli.evaluate import summary_note
from vlm_dist.cli.models import check_origin, find_origin, make_model
from vlm_dist.cli.options import HERE, CpuWorkers, Gpus, Json, New, Nodes, Overrides, Workspace
from vlm_dist.cli.output import duration, print_json, print_table, print_warning, prose_on_stderr
from vlm_dist.cli.workers import asked_workers, check_workers, resolve_workers, worker_tags
from vlm_dist.errors import StoreError

if TYPE_CHECKING:
    from vlm_dist.data.splits import Split


def pretrain(
    store: Annotated[Path | None, typer.Option(help="Feature store with captions.")] = None,
    init: Annotated[
        str | None, typer.Option(help="BERT name or folder, reference checkpoint, exported model, or scratch.")
    ] = None,
    nodes: Nodes = 1,
    gpus: Gpus = None,
    workers: CpuWorkers = 1,
    max_steps: Annotated[int | None, typer.Option(help="Updates in all (default: from train.epochs).")] = None,
    new: New = False,
    workspace: Workspace = HERE,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Pre-train VLM on a store: masked tokens of video and text, negatives from every rank.

    The same command goes on with an unfinished run from its newest whole checkpoint, on any number of workers, and
    does nothing when the run is finished.

    \b
    Examples:
      vlm-dist pretrain --nodes 1 --gpus 8
      vlm-dist pretrain --gpus 0 --workers 2 --init scratch --max-steps 500 --set train.global_batch=64
    """
    flags = {"store": store, "init": init, "train.max_steps": max_steps}
    with prose_on_stderr(as_json):
        result = run_pretrain(Context.open(workspace, overrides, flags), nodes, gpus, workers, new=new)
    if as_json:
        print_json(result)


def run_pretrain(
    context: Context, nodes: int = 1, gpus: int | None = 0, workers: int = 1, *, new: bool = False
) -> dict[str, Any]:
    """Pre-train (or go on, or find it done) as a tracked run; prints what happened and returns it."""
    from cluster.ray_local import ray_session
    from feature_store.reader import FeatureReader
    from jobs.runs import extract_run
    from vlm_dist.data.sampler import GlobalOrder
    from vlm_dist.model.checkpoint import is_exported
    from vlm_dist.train.pretrain import PretrainJob
    from vlm_dist.train.ray_trainer import run_training
    from vlm_dist.train.run_folder import RunFolder

    settings = context.settings
    store = context.require_store()
    index = FeatureReader(store).index
    if index.tokenizer_dir is None:
        raise StoreError(
            f"{store} has no captions, and pre-training needs them: run `vlm-dist extract` with --captions"
        )
    origin = find_origin(context, settings.init)
    check_origin(context, origin, store)
    split = _split(context, index)
    identity = {
        "store": index.fingerprint, "init": origin.identity, "model": settings.model.model_dump(),
        "clips": settings.clips.model_dump(), "masks": settings.masks.model_dump(),
        "videos": split_digest(split), "train": _what_is_trained(settings.train.model_dump()),
    }  # fmt: skip
    folder = RunFolder.for_identity(context.runs, "pretrain", identity, new=new)
    if folder.finished:
        print(f"Nothing to do: {folder.path.name} is finished; its model is {folder.model}. Type --new to train again.")
        return {
            "run": folder.record.get("run"),
            "model": str(folder.model),
            "metrics": folder.record.get("metrics", {}),
        }
    batch = settings.train.global_batch
    GlobalOrder(split.train, settings.train.seed, batch, settings.clips.clips_per_video)  # refuses what cannot be
    check_workers(asked_workers(nodes, gpus, workers), settings.train.precision, batch, "train.global_batch")
    with folder.locked():
        _write_split(split, folder.path / "split.npz")
        if not is_exported(folder.path / "init"):  # made once: what does not fit is said before a cluster is asked for
            make_model(context, origin.weights, store, folder.path / "init")
        folder.write(identity=identity, status="unfinished", store=store, snapshot=index.name)
        job = PretrainJob(
            store=store, snapshot=index.name, reading=settings.store_layout,
            split=str(folder.path / "split.npz"), init=str(folder.path / "init"), out=str(folder.path),
            model=settings.model, clips=settings.clips, masks=settings.masks, train=settings.train,
        )  # fmt: skip
        with ray_session(settings.cluster) as machines:
            ranks = resolve_workers(machines, nodes, gpus, workers)
            check_workers(ranks, settings.train.precision, batch, "train.global_batch")
            tags = {"vlm_dist.store_fingerprint": index.fingerprint, "vlm_dist.run_folder": str(folder.path)}
            tags |= {"vlm_dist.split_digest": identity["videos"]} | origin.tags | worker_tags(nodes, ranks)
            with context.tracked("pretrain", tags=tags, resume=folder.record.get("run")) as tracker:
                folder.write(run=tracker.run_id)
                if extracted := extract_run(tracker.uri, index.fingerprint):
                    tracker.tags({"vlm_dist.extract_run": extracted})
                tracker.dataset(store, index.fingerprint)
                with TrainingView("pretrain", tracker) as view:
                    outcome = run_training(job, ranks, view)
                tracker.tags({"vlm_dist.checkpoint": outcome.model})
                metrics = {key: value for key, value in outcome.metrics.items() if key != "step"}
                tracker.metrics(metrics, outcome.step)
                tracker.note(summary_note(f"pre-trained {outcome.step} steps from {origin.weights}", metrics))
        folder.write(status="finished", metrics=metrics, outcome=asdict(outcome))
    spent = f"{duration(outcome.train_seconds)} on {ranks.count} worker{'s' * (ranks.count != 1)}"
    print(f"Pre-trained {outcome.step} steps in {spent}: {outcome.model}")
    return {"run": tracker.run_id, "model": outcome.model, "metrics": metrics, "resumed_from": outcome.resumed_from}


def _what_is_trained(train: dict[str, Any]) -> dict[str, Any]:
    """The training settings that decide the result; how the work is split and logged does not."""
    how = {"micro_batch", "checkpoint_every", "keep_checkpoints", "log_every", "max_failures", "threads", "timeout_s",
           "zero_stage", "nce_chunk", "compile", "recompute", "allow_other_features"}  # fmt: skip
    return {key: value for key, value in train.items() if key not in how}


def _split(context: Context, index: Any) -> "Split":
    """Training and validation videos, without those of any known evaluation split (paper 5.1.2); prints the counts."""
    from vlm_dist.data.splits import read_id_list, split_videos
    from vlm_dist.data.stats import corpus_stats

    settings = context.settings
    lists = {path: Path(path) for path in settings.split.exclude}
    lists |= {f"{name} test": Path(task.data) for name, task in settings.data.items() if task.data}
    known = {name: read_id_list(path) for name, path in lists.items()}
    only = [key.decode() for key in index.split_ids(settings.split.only)] if settings.split.only else None
    split = split_videos(index, settings.split, known, only)
    for name, count in split.excluded.items():
        print(f"{count} videos of the evaluation split {name} are left out of pre-training.")
    if not lists:
        print_warning("no evaluation split is known: name the test lists with --set split.exclude or in [data.TASK]")
    print(
        f"{len(split.train)} videos train, {len(split.validation)} are held out for validation; "
        f"{split.without_captions} have no captions, {sum(index.details['failed'].values())} no features."
    )
    stats = corpus_stats(index, split.train)
    rows = [
        ("captions per video", f"{stats['clips_per_video']:.1f}", f"{stats['clips_per_video_paper']:.0f}"),
        ("minutes per video", f"{stats['seconds_per_video'] / 60:.2f}", f"{stats['seconds_per_video_paper'] / 60:.1f}"),
        ("tokens per video", f"{stats['tokens_per_video']:.0f}", "-"),
        ("tokens per second", f"{stats['tokens_per_second']:.2f}", f"{stats['tokens_per_second_paper']:.1f}"),
    ]
    print_table(("corpus", "this one", "paper 5.1.1"), rows, right=("this one", "paper 5.1.1"))
    return split


def split_digest(split: "Split") -> str:
    """Of the videos that train and that are held out, as rows of one snapshot: they are part of what a run is."""
    import hashlib

    return hashlib.sha256(split.train.tobytes() + b"/" + split.validation.tobytes()).hexdigest()


def _write_split(split: "Split", path: Path) -> None:
    """The rows of both splits, for the ranks."""
    import numpy as np

    temporary = path.with_name(".split.tmp.npz")
    np.savez(temporary, train=split.train, validation=split.validation)
    temporary.replace(path)
