"""`--from` -> a model folder: a run, a path, a BERT or a reference checkpoint, or the newest pre-trained run."""

import json
from pathlib import Path

from vlm_dist.cli.context import Context
from vlm_dist.cli.output import print_warning
from vlm_dist.errors import CheckpointError, ConfigError, JobError
from vlm_dist.train.run_folder import RECORD


def resolve_model(context: Context, source: str | None, store: Path, scratch: Path, kind: str, task: str = "") -> Path:
    """The folder of the model that `source` names, as `vlm_dist.load` reads it.

    Args:
        context: The workspace.
        source: A run's folder, id or name; an exported model's folder; `scratch`, a BERT name or folder, or a reference
            checkpoint (made into a model for this store, below `scratch`); None takes the newest finished run.
        store: Decides tokenizer and feature width of a model that is made here.
        scratch: Where a model that is made here is written.
        kind: Kind of run that None means.
        task: Task of that run.

    Raises:
        ConfigError: Nothing was trained yet. CheckpointError: the source fits nothing, or not this store.
    """
    if source is None:
        return _newest(context, kind, task)
    from vlm_dist.model.checkpoint import is_exported

    path = Path(source).expanduser()
    for candidate in (path, path / "model", context.runs / source / "model"):
        if is_exported(candidate):
            return candidate.absolute()
    run = None if path.exists() or source == "scratch" else _of_run(context, source)
    return run or make_model(context, source, store, scratch)


def origin_tags(model: Path) -> dict[str, str]:
    """Tags that say what a run started from: the model's folder, and the run that made it where one did."""
    record = model.parent / RECORD
    run = json.loads(record.read_text()).get("run") if record.is_file() else None
    return {"vlm_dist.checkpoint_in": str(model)} | ({"vlm_dist.parent_run": run} if run else {})


def warn_of_seen_videos(model: Path, data: Path) -> int:
    """Number of test videos that the model was pre-trained on (paper 5.1.2: there must be none); warns of any.

    A model that was not pre-trained in this workspace has no list of its videos, and says nothing.
    """
    import numpy as np

    from feature_store.index import StoreIndex
    from vlm_dist.data.splits import read_id_list

    run = model.parent
    while (run / RECORD).is_file() and (source := json.loads((run / RECORD).read_text()).get("source")):
        run = Path(source).parent
    if not (run / "split.npz").is_file() or not data.is_file():
        return 0
    record = json.loads((run / RECORD).read_text())
    rows = StoreIndex(Path(record["store"]), record["snapshot"]).find_many(sorted(read_id_list(data)))
    with np.load(run / "split.npz") as split:
        seen = int(np.isin(rows, split["train"]).sum())
    if seen:
        print_warning(
            f"{seen} test videos of {data.name} were pre-trained on by {run.name}: the numbers below are too good. "
            "Name the annotations in the settings before you pre-train, and their test videos are left out"
        )
    return seen


def _newest(context: Context, kind: str, task: str) -> Path:
    from cluster.mlflow_server import tracking_server
    from jobs.runs import newest_checkpoint

    with tracking_server(context.settings.cluster, context.resolved.folder) as uri:
        row = newest_checkpoint(uri, kind, task)
    if row is None:
        wanted = f"{kind} run of {task}" if task else f"{kind} run"
        raise ConfigError(
            f"there is no finished {wanted} in this workspace; name a model with --from (a run, a folder, a BERT name, "
            "a reference checkpoint, or scratch)"
        )
    if not Path(row.checkpoint).is_dir():
        raise CheckpointError(
            f"run {row.name} left its model in {row.checkpoint}, which is gone; name another with --from"
        )
    return Path(row.checkpoint)


def _of_run(context: Context, source: str) -> Path | None:
    from cluster.mlflow_server import tracking_server
    from jobs.facts import PREFIX
    from jobs.runs import find_run

    with tracking_server(context.settings.cluster, context.resolved.folder) as uri:
        try:
            run = find_run(uri, source)
        except JobError:
            return None
    checkpoint = run.data.tags.get(f"{PREFIX}checkpoint", "")
    if not checkpoint:
        raise CheckpointError(f"run {source} has no model (its state is {run.info.status}); name another with --from")
    return Path(checkpoint)


def make_model(context: Context, source: str, store: Path, folder: Path) -> Path:
    """Write the model that `source` stands for (scratch, BERT, reference checkpoint), with the store's words and width.

    Raises:
        CheckpointError: the source is not there, or does not fit the store.
    """
    from feature_store.reader import FeatureReader
    from feature_store.tokenizer import load_tokenizer
    from vlm_dist.model.checkpoint import build_vlm, save_vlm

    settings = context.settings
    reader = FeatureReader(store)
    words = reader.index.tokenizer_dir
    tokenizer = load_tokenizer(str(words) if words else settings.captions.tokenizer)
    model = build_vlm(source, settings.model, tokenizer.vocab_size, reader.meta.feature_dim, settings.train.seed)
    save_vlm(model, tokenizer, folder)
    return folder
