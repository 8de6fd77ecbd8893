"""`vlm-dist pretrain`: a feature store with captions -> a pre-trained model."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlm_dist import __version__
from vlm_dist.cli.context import Context, TrainingView
from vlm_dist.cli.evaluate import summary_note
from vlm_dist.cli.models import check_origin, find_origin, make_model
from vlm_dist.cli.options import HERE, CpuWorkers, Gpus, Json, Nodes, Overrides, Resume, Workspace
from vlm_dist.cli.output import duration, print_json, print_table, print_warning, prose_on_stderr
from vlm_dist.cli.workers import asked_workers, check_workers, resolve_workers, worker_tags
from vlm_dist.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from vlm_dist.data.splits import Split
    from vlm_dist.train.run_folder import RunFolder


def pretrain(
    store: Annotated[Path | None, typer.Option(help="Feature store with captions.")] = None,
    init: Annotated[
        str | None, typer.Option(help="BERT name or folder, reference checkpoint, exported model, or scratch.")
    ] = None,
    nodes: Nodes = 1,
    gpus: Gpus = None,
    workers: CpuWorkers = 1,
    max_steps: Annotated[int | None, typer.Option(help="Updates in all (default: from train.epochs).")] = None,
    max_hours: Annotated[float | None, typer.Option(help="Stop with a checkpoint after so many hours.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and do nothing.")] = False,
    allow_store_change: Annotated[
        bool, typer.Option("--allow-store-change", help="Go on with a run although the store has changed since.")
    ] = False,
    resume: Resume = "auto",
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
      vlm-dist pretrain --nodes 16 --gpus 8 --dry-run
      vlm-dist pretrain --gpus 0 --workers 2 --init scratch --max-steps 500 --set train.global_batch=64
    """
    flags = {"store": store, "init": init, "train.max_steps": max_steps, "train.max_hours": max_hours}
    with prose_on_stderr(as_json):
        context = Context.open(workspace, overrides, flags)
        if dry_run:
            from vlm_dist.cli.pretrain_plan import plan_pretrain

            result = plan_pretrain(context, nodes, gpus, workers)
        else:
            result = run_pretrain(
                context, nodes, gpus, workers, resume=resume, allow_store_change=allow_store_change
            )  # fmt: skip
    if as_json:
        print_json(result)


def run_pretrain(
    context: Context,
    nodes: int = 1,
    gpus: int | None = 0,
    workers: int = 1,
    *,
    resume: Literal["auto", "must", "never"] = "auto",
    allow_store_change: bool = False,
) -> dict[str, Any]:
    """Pre-train (or go on, or find it done) as a tracked run; prints what happened and returns it."""
    from cluster.ray_local import ray_session
    from jobs.runs import extract_run
    from vlm_dist.data.sampler import GlobalOrder
    from vlm_dist.model.checkpoint import is_exported
    from vlm_dist.train.pretrain import PretrainJob
    from vlm_dist.train.ray_trainer import run_training
    from vlm_dist.train.run_folder import RunFolder, digest_of

    began = time.time()
    settings = context.settings
    store, index = open_store_with_captions(context)
    origin = find_origin(context, settings.init)
    check_origin(context, origin, store)
    split = split_corpus(context, index)
    identity = {
        "store": index.fingerprint, "init": origin.identity, "model": settings.model.model_dump(),
        "clips": settings.clips.model_dump(), "masks": settings.masks.model_dump(),
        "videos": split_digest(split), "train": _what_is_trained(settings.train.model_dump()),
    }  # fmt: skip
    changed = None if resume == "never" else RunFolder.of_changed_store(context.runs, "pretrain", identity, store)
    if changed:
        _check_store_change(changed, index.fingerprint, allow_store_change)
    folder = changed or RunFolder.for_identity(context.runs, "pretrain", identity, resume)
    if folder.finished:
        print(
            f"Nothing to do: {folder.path.name} is finished; its model is {folder.model}. "
            "Type --resume never to train again."
        )
        return {
            "run": folder.record.get("run"),
            "model": str(folder.model),
            "metrics": folder.record.get("metrics", {}),
        }
    batch = settings.train.global_batch
    order = GlobalOrder(
        split.train, settings.train.seed, batch, settings.clips.clips_per_video
    )  # refuses what can't be
    if order.visits_per_update > len(split.train):
        print_warning(
            f"an update visits {order.visits_per_update} videos, and {len(split.train)} train: some come several times "
            "in one update, and their clips are negatives of each other; lower train.global_batch"
        )
    check_workers(asked_workers(nodes, gpus, workers), settings.train.precision, batch, "train.global_batch")
    with folder.locked():
        if changed:
            read_model(folder.path / "init", settings.model, store, index)  # words of its own may be others now
        _write_split(split, folder.path / "split.npz")
        if not is_exported(folder.path / "init"):  # made once: what does not fit is said before a cluster is asked for
            make_model(context, origin.weights, store, folder.path / "init")
        folder.write(identity=identity, status="unfinished", store=store, snapshot=index.name)
        hours = settings.train.max_hours
        job = PretrainJob(
            store=store, snapshot=index.name, reading=settings.store_layout,
            split=str(folder.path / "split.npz"), init=str(folder.path / "init"), out=str(folder.path),
            model=settings.model, clips=settings.clips, masks=settings.masks, train=settings.train,
            about={"store": index.fingerprint, "config": digest_of(identity), "version": __version__},
            deadline=began + 3600 * hours if hours else None,
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
                with TrainingView("pretrain", tracker, settings.model.max_len) as view:
                    outcome = run_training(job, ranks, view)
                metrics = {key: value for key, value in outcome.metrics.items() if key != "step"}
                tracker.metrics(metrics, outcome.step)
                done = "pre-trained" if outcome.model else f"stopped after {hours:g} h:"
                tracker.note(summary_note(f"{done} {outcome.step} steps from {origin.weights}", metrics))
                tracker.tags(
                    {"vlm_dist.checkpoint": outcome.model} if outcome.model else {"vlm_dist.ended": "max_hours"}
                )
        if outcome.model:
            folder.write(status="finished", metrics=metrics, outcome=asdict(outcome))
    if view.goodput:
        print(view.goodput.line())
    spent = f"{duration(outcome.train_seconds)} on {ranks.count} worker{'s' * (ranks.count != 1)}"
    if outcome.model:
        print(f"Pre-trained {outcome.step} steps in {spent}: {outcome.model}")
    else:
        print(
            f"Stopped after {hours:g} h at step {outcome.step} ({spent}), with a checkpoint. The same command goes on."
        )
    return {"run": tracker.run_id, "model": outcome.model, "metrics": metrics, "resumed_from": outcome.resumed_from}


def open_store_with_captions(context: Context) -> tuple[str, Any]:
    """The workspace's store and its index. Errors: StoreError where it has no captions."""
    from feature_store.reader import FeatureReader

    store = context.require_store()
    index = FeatureReader(store).index
    if index.tokenizer_dir is None:
        raise StoreError(
            f"{store} has no captions, and pre-training needs them: run `vlm-dist extract` with --captions"
        )
    return store, index


def read_model(init: Any, config: Any, store: str, index: Any) -> Any:
    """The model that a training on this store begins with. Errors: CheckpointError where it does not fit the store."""
    from feature_store.layout import open_store
    from feature_store.tokenizer import load_tokenizer
    from vlm_dist.model.checkpoint import build_vlm

    vocabulary = load_tokenizer(str(index.tokenizer_dir)).vocab_size
    return build_vlm(str(init), config, vocabulary, open_store(store).feature_dim, 0)


def _check_store_change(run: "RunFolder", now: str, allowed: bool) -> None:
    before = run.record["identity"]["store"]
    if before == now:
        return
    if not allowed:
        raise ConfigError(
            f"{run.path.name} has checkpoints of this very training on another state of the store (fingerprint "
            f"{before[:12]}, now {now[:12]}): --allow-store-change goes on with what the store holds now, "
            "--resume never begins again"
        )
    print_warning(f"{run.path.name} goes on with a changed store (fingerprint {before[:12]}, now {now[:12]})")


def _what_is_trained(train: dict[str, Any]) -> dict[str, Any]:
    """The training settings that decide the result; how the work is split and logged does not."""
    how = {"micro_batch", "checkpoint_every", "keep_checkpoints", "log_every", "max_failures", "threads",
           "timeout_s", "zero_stage", "nce_chunk", "compile", "max_hours", "hang_s", "recompute",
           "allow_other_features"}  # fmt: skip
    return {key: value for key, value in train.items() if key not in how}


def split_corpus(context: Context, index: Any) -> "Split":
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
