"""`vlm-dist checkpoint`: a run's checkpoints -> what there is, whether it is whole, a model of it, room."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_dist.cli.context import Context
from vlm_dist.cli.options import HERE, Json, Overrides, Workspace
from vlm_dist.cli.output import print_json, print_table, prose_on_stderr
from vlm_dist.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from vlm_dist.train.checkpoints import Checkpoint, CheckpointFolder

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)

Run = Annotated[
    str,
    typer.Argument(metavar="[RUN]", help="Name or folder of a run (default: the one that wrote a checkpoint last)."),
]
Step = Annotated[int | None, typer.Option("--step", min=0, help="Which one (default: the newest that is whole).")]


@app.callback()
def _group() -> None:
    """A run's checkpoints: list, verify, export, prune."""


@app.command("list")
def list_checkpoints(
    run: Run = "", workspace: Workspace = HERE, overrides: Overrides = None, as_json: Json = False
) -> None:
    """The checkpoints of a run: step, age, size, and how many ranks wrote it.

    \b
    Examples:
      vlm-dist checkpoint list
      vlm-dist checkpoint list pretrain-3f9a12c4 --json
    """
    path, folder = _find(workspace, overrides, run)
    with prose_on_stderr(as_json):
        told = [_told(checkpoint) for checkpoint in folder.committed()]
        columns = ("step", "age", "size", "ranks", "best at", "state")
        print_table(columns, [[row[column] for column in columns] for row in told], title=str(path), right=columns[:5])
        for damaged in sorted(folder.root.glob("damaged-*")):
            print(f"{damaged.name}: found damaged and moved aside; nothing reads it")
    if as_json:
        print_json({"run": str(path), "checkpoints": told})


@app.command()
def verify(run: Run = "", workspace: Workspace = HERE, overrides: Overrides = None, as_json: Json = False) -> None:
    """Compare every file of every checkpoint with its digest; exit code 1 when any differs. Nothing is changed.

    \b
    Examples:
      vlm-dist checkpoint verify pretrain-3f9a12c4
    """
    path, folder = _find(workspace, overrides, run)
    with prose_on_stderr(as_json):
        found = {checkpoint.path.name: folder.check(checkpoint) for checkpoint in folder.committed()}
        for name, problem in found.items():
            print(f"{name}: {problem or 'whole'}")
    if as_json:
        print_json({"run": str(path), "problems": found})
    if any(found.values()):
        raise typer.Exit(1)


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="Folder of the model that is made.")],
    run: Run = "",
    step: Step = None,
    workspace: Workspace = HERE,
    overrides: Overrides = None,
) -> None:
    """The model of a checkpoint as a folder that `vlm_dist.load`, --from and --init read.

    \b
    Examples:
      vlm-dist checkpoint export model-500 pretrain-3f9a12c4 --step 500
    """
    path, folder = _find(workspace, overrides, run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already; name a new folder")
    chosen = _choose(folder, step)
    _export(path, folder, chosen, out)
    print(f"{chosen.path.name} of {path.name}: {out}")


@app.command()
def prune(
    run: Run = "",
    keep: Annotated[int, typer.Option("--keep", min=1, help="Newest whole checkpoints that stay.")] = 1,
    workspace: Workspace = HERE,
    overrides: Overrides = None,
) -> None:
    """Remove all but the newest whole checkpoints of a run, and damaged ones; a run in training is refused.

    \b
    Examples:
      vlm-dist checkpoint prune pretrain-3f9a12c4 --keep 1
    """
    from vlm_dist.train.run_folder import RunFolder

    path, folder = _find(workspace, overrides, run)
    with RunFolder(path).locked():
        freed = folder.prune_to(keep)
    print(f"{path.name}: {_size(freed)} freed, {len(folder.committed())} checkpoints left")


def _find(workspace: Path, overrides: list[str] | None, run: str) -> tuple[Path, "CheckpointFolder"]:
    from vlm_dist.train.checkpoints import CheckpointFolder

    context = Context.open(workspace, overrides)
    if run:
        places = [Path(run).expanduser(), context.runs / run]
    else:
        with_any = {path.parent.parent for path in context.runs.glob("*/checkpoints/step_*")}
        places = sorted(with_any, key=lambda path: -(path / "checkpoints").stat().st_mtime)[:1]
    for path in places:
        if (path / "checkpoints").is_dir():
            return path.absolute(), CheckpointFolder(path / "checkpoints")
    raise ConfigError(f"{run or context.runs} has no checkpoints; `vlm-dist jobs list` shows the runs")


def _told(checkpoint: "Checkpoint") -> dict[str, Any]:
    from vlm_dist.train.checkpoints import CheckpointFolder

    try:
        manifest = CheckpointFolder.manifest(checkpoint)
    except CheckpointError as error:
        return {"step": checkpoint.step, "age": "", "size": "", "ranks": "", "best at": "", "state": str(error)}
    return {
        "step": checkpoint.step,
        "age": _age(time.time() - checkpoint.path.stat().st_mtime),
        "size": _size(sum(file["bytes"] for file in manifest["files"].values())),
        "ranks": manifest.get("world", ""),
        "best at": CheckpointFolder.best_step(checkpoint) or "",
        "state": CheckpointFolder.check(checkpoint, deep=False) or "committed",
    }


def _choose(folder: "CheckpointFolder", step: int | None) -> "Checkpoint":
    for checkpoint in reversed(folder.committed()):
        if step in (None, checkpoint.step):
            problem = folder.check(checkpoint)
            if not problem:
                return checkpoint
            if step is not None:
                raise CheckpointError(f"{checkpoint.path} is damaged: {problem}")
    there = ", ".join(str(checkpoint.step) for checkpoint in folder.committed())
    raise CheckpointError(
        f"{folder.root} has no whole checkpoint{'' if step is None else f' of step {step}'} ({there})"
    )


def _export(path: Path, folder: "CheckpointFolder", chosen: "Checkpoint", out: Path) -> None:
    """The weights of a checkpoint in the form of the run's own beginning, which knows sizes, tokenizer and features."""
    import numpy as np

    from feature_store.config import StoreConfig
    from feature_store.reader import FeatureReader
    from vlm_dist.model.checkpoint import load as load_model
    from vlm_dist.model.checkpoint import save_vlm
    from vlm_dist.model.origin import read_trained_on
    from vlm_dist.train.checkpoints import put_whole
    from vlm_dist.train.run_folder import read_record

    record = read_record(path)
    if not (path / "split.npz").is_file() or "store" not in record:
        raise CheckpointError(f"{path} is no pre-training run: only their checkpoints can be exported")
    begun = load_model(path / "init")
    state, _ = folder.load(chosen)
    begun.model.load_state_dict({name.removeprefix("vlm."): tensor for name, tensor in state.weights.items()})
    reader = FeatureReader.of(record["store"], StoreConfig(), record["snapshot"])
    names = reader.index.id_list()
    with np.load(path / "split.npz") as split:
        trained_on = read_trained_on(path / "init").and_on(names[row].decode() for row in split["train"])
    put_whole(
        out,
        lambda to: save_vlm(
            begun.model, begun.tokenizer, to, features=reader.meta.provenance, trained_on=trained_on
        ),
    )  # fmt: skip


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _size(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
