"""`--from` -> a model: a run, a path, a BERT or a reference checkpoint, or the newest pre-trained run."""

from dataclasses import dataclass
from pathlib import Path

from vlm_dist.cli.context import Context
from vlm_dist.cli.output import print_warning
from vlm_dist.errors import CheckpointError, ConfigError, VlmDistError
from vlm_dist.train.run_folder import RECORD, read_record

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Origin:
    """What a run starts from.

    Attributes:
        weights: Folder of an exported model; or what a model is made from: `scratch`, a BERT, a reference checkpoint.
        exported: Whether it is the former.
        identity: The same for the same weights, whatever they are called: a digest, or the name of what is no file.
    """

    weights: str
    exported: bool
    identity: str

    @property
    def tags(self) -> dict[str, str]:
        """Tags that say what a run started from: where it lay, what it was, and the run that made it where one did."""
        tags = {"vlm_dist.checkpoint_in": self.weights, "vlm_dist.source_model": self.identity}
        try:
            run = read_record(Path(self.weights).parent).get("run") if self.exported else None
        except CheckpointError as error:
            print_warning(str(error))
            run = None
        return tags | ({"vlm_dist.parent_run": run} if run else {})

    def model(self, context: Context, store: str, folder: Path) -> Path:
        """The exported model itself; or one that is made for this store in `folder`, unless it was made there before.

        Raises:
            CheckpointError: There is no such model, or it does not fit the store.
        """
        from vlm_dist.model.checkpoint import is_exported, locate

        if self.exported:
            return Path(self.weights)
        if self.weights != "scratch":
            try:
                locate(self.weights)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error}. Nor is {self.weights!r} the name or id of a run: `vlm-dist jobs list` shows the runs"
                ) from error
        if not is_exported(folder):
            make_model(context, self.weights, store, folder)
        return folder


def find_origin(context: Context, source: str | None, kind: str = "", task: str = "") -> Origin:
    """What `source` names.

    Args:
        context: The workspace.
        source: A run's folder, id or name; an exported model's folder; `scratch`, a BERT name or folder, or a reference
            checkpoint; None takes the newest finished run.
        kind: Kind of run that None means. Empty: `source` is not looked up among the runs of MLflow.
        task: Task of that run.

    Raises:
        ConfigError: Nothing was trained yet.
        CheckpointError: A run without a model.
        JobError: The runs cannot be asked for, or there are several of this name.
    """
    from vlm_dist.model.checkpoint import is_exported

    if source is None:
        return _exported(_newest(context, kind, task))
    path = Path(source).expanduser()
    for candidate in (path, path / "model", context.runs / source / "model"):
        if is_exported(candidate):
            return _exported(candidate.absolute())
    if (path / RECORD).is_file():
        state = read_record(path).get("status", UNKNOWN)
        raise CheckpointError(f"the run in {path} has no model (it is {state}); name another, or finish it first")
    if path.exists():
        return Origin(str(path.absolute()), False, _identity(path))
    run = _of_run(context, source) if kind and source != "scratch" else None
    return _exported(run) if run else Origin(source, False, source)


def check_origin(context: Context, origin: Origin, store: str) -> None:
    """Refuse features that an exported model was not trained on. Errors: StoreError that names what differs."""
    from feature_store.layout import open_store
    from vlm_dist.model.origin import check_features

    if origin.exported:
        provenance = open_store(store).provenance
        check_features(Path(origin.weights), provenance, store, context.settings.train.allow_other_features)


def seen_test_videos(origin: Origin, data: Path) -> str:
    """How many test videos the model was trained on (paper 5.1.2: there must be none), for a tag; warns of any.

    "unknown" where nothing is known: a BERT, a checkpoint made elsewhere, an export without a list. It never fails: a
    file that cannot be read is refused by the task itself, in the same words.
    """
    from vlm_dist.data.records import HELD_OUT, TRAIN
    from vlm_dist.data.splits import read_id_list
    from vlm_dist.model.origin import TrainedOn, read_trained_on

    if origin.exported:
        trained_on = read_trained_on(Path(origin.weights))
    else:
        trained_on = TrainedOn.of(complete=origin.weights == "scratch")
    try:
        seen = trained_on.count(read_id_list(data, left_out=(TRAIN, HELD_OUT)))
    except VlmDistError as error:
        print_warning(f"whether the model has seen test videos is unknown: {error}")
        return UNKNOWN
    if seen:
        print_warning(
            f"{seen} test videos of {data.name} were trained on by {origin.weights}: the numbers below are too good. "
            "Name the annotations in the settings before you pre-train, and their test videos are left out"
        )
    elif not trained_on.complete:
        print_warning(f"whether {origin.weights} was trained on test videos of {data.name} is unknown")
    if trained_on.complete:
        return str(seen)
    return f"at least {seen}" if seen else UNKNOWN


def make_model(context: Context, source: str, store: str, folder: Path) -> None:
    """Write the model that `source` stands for, with the store's words and width.

    Raises:
        CheckpointError: The source is not there, or does not fit the store.
    """
    from feature_store.reader import FeatureReader
    from feature_store.tokenizer import load_tokenizer
    from vlm_dist.model.checkpoint import build_vlm, is_exported, locate, save_vlm
    from vlm_dist.model.origin import TrainedOn, read_trained_on

    settings = context.settings
    reader = FeatureReader(store)
    words = reader.index.tokenizer_dir
    tokenizer = load_tokenizer(str(words) if words else settings.captions.tokenizer)
    model = build_vlm(source, settings.model, tokenizer.vocab_size, reader.meta.feature_dim, settings.train.seed)
    path = None if source == "scratch" else locate(source)
    if path and is_exported(path):
        trained_on = read_trained_on(path)
    else:  # a BERT has seen no video; what a reference checkpoint was trained on, nobody wrote down
        trained_on = TrainedOn.of(complete=path is None or not path.is_file())
    save_vlm(model, tokenizer, folder, trained_on=trained_on)


def _exported(folder: Path) -> Origin:
    return Origin(str(folder), True, _identity(folder))


def _identity(path: Path) -> str:
    """Digest of the weights in a file or folder."""
    from vlm_dist.train.checkpoints import digest_file

    files = (path, path / "model.safetensors", path / "pytorch_model.bin")
    return next((digest_file(file) for file in files if file.is_file()), str(path))


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
    """The model of the run of this name or id; None where there is no such run."""
    from cluster.mlflow_server import tracking_server
    from jobs.facts import PREFIX
    from jobs.runs import lookup_run

    with tracking_server(context.settings.cluster, context.resolved.folder) as uri:
        run = lookup_run(uri, source)
    if run is None:
        return None
    checkpoint = run.data.tags.get(f"{PREFIX}checkpoint", "")
    if not checkpoint:
        raise CheckpointError(f"run {source} has no model (its state is {run.info.status}); name another with --from")
    if not Path(checkpoint).is_dir():
        raise CheckpointError(f"run {source} left its model in {checkpoint}, which is gone; name another with --from")
    return Path(checkpoint)
