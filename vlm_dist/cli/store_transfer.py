"""`vlm-dist store import` and `store export`: features that others made -> a store, a store -> files for others."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_dist.cli.context import Context, store_address
from vlm_dist.cli.intake import (
    STRICT_EXIT,
    check_captions,
    of_listed,
    print_captions,
    print_failures,
    write_captions,
)
from vlm_dist.cli.options import HERE, AllowPickle, Json, Overrides, Workspace
from vlm_dist.cli.output import counted, duration, print_json, print_warning, progress, prose_on_stderr

SHOWN = 10  # lines of one kind
if TYPE_CHECKING:
    from feature_store.config import ImportConfig
    from feature_store.import_arrays import ImportState
    from feature_store.import_sources import ArraySources
    from feature_store.records import VideoRecord


def import_features(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SRC...", help="Folders of ID.npy or of shard files, .npy, .npz, or pickles {id: array}."
        ),
    ],
    store: Annotated[Path | None, typer.Option(help="Feature store that is made or continued.")] = None,
    captions: Annotated[
        Path | None, typer.Option(help="Captions: {id: {start, end, text}} as JSON, JSONL, CSV, Parquet or pickle.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="S3D weights: 1024-d mixed_5c goes through their last layer to 512-d.")
    ] = None,
    normalise: Annotated[bool, typer.Option("--normalise", help="L2-normalise every row.")] = False,
    extractor: Annotated[
        str | None, typer.Option(metavar="NAME", help="What made the features; kept in the store (default: imported).")
    ] = None,
    ids: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Ids of shard files without SPLIT_meta.pkl, one a line.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Of the captions: BERT name, folder, or wordpiece:N to train one.")
    ] = None,
    allow_pickle: AllowPickle = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try those of the arrays again that failed before.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help=f"Exit {STRICT_EXIT} when an array failed.")] = False,
    workspace: Workspace = HERE,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Import features that are there already: one row for every second of video, of any width.

    Arrays that cannot be features (NaN, zeros, another width) are listed with their reason and stop nothing. Running
    the command again does what is left to do, and nothing when all is done.

    \b
    Examples:
      vlm-dist store import features/ --captions raw_caption.json --store my-store
      vlm-dist store import mixed_5c/ --weights s3d_howto100m.pth
      vlm-dist store import youcook_s3d.pickle --allow-pickle --normalise --extractor s3d-univl
      vlm-dist store import feat_how2_s3d_shard_small/ --ids how2_s3d_train.lst
    """
    from feature_store.config import ImportConfig

    context = Context.open(
        workspace, overrides, {"store": store, "captions_file": captions, "captions.tokenizer": tokenizer}
    )
    cfg = ImportConfig(normalise=normalise, rows_per_shard=context.settings.store_layout.rows_per_shard)
    if extractor:
        cfg = cfg.model_copy(update={"extractor": extractor})
    with prose_on_stderr(as_json):
        result = import_to_store(
            context, sources, cfg, weights=weights, ids=ids, allow_pickle=allow_pickle, retry_failed=retry_failed
        )  # fmt: skip
    if as_json:
        print_json(result)
    if strict and result["failed"]:
        raise typer.Exit(STRICT_EXIT)


def import_to_store(
    context: Context,
    paths: list[Path],
    cfg: "ImportConfig",
    *,
    weights: Path | None = None,
    ids: Path | None = None,
    allow_pickle: bool = False,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Arrays and captions -> the workspace's store, as a tracked run; prints what happened and returns it."""
    from feature_store.import_arrays import prepare_store
    from feature_store.import_sources import ArraySources
    from feature_store.info import failures, store_info
    from feature_store.plan import anything_to_do
    from feature_store.snapshot import finalise

    captions = Path(context.settings.captions_file) if context.settings.captions_file else None
    check_captions(context, captions, allow_pickle)
    sources = ArraySources(paths, allow_pickle=allow_pickle, ids_file=ids)
    prepare_store(context.store, sources, cfg, weights)  # what cannot be imported is refused before a run is opened
    for refused in sources.refused[:SHOWN]:
        print_warning(refused)
    if len(sources.refused) > SHOWN:
        print_warning(f"{len(sources.refused) - SHOWN} more arrays whose ids no store can take")
    if not anything_to_do(context.store, sources.videos, retry_failed):
        state, run_id = None, None
        finalise(context.store)  # publishes what was committed when an import was killed at its very end
        print(f"Nothing to do: all {len(sources.videos)} arrays are in the store or have failed before.")
        if of_listed(failures(context.store), sources.videos):
            print("Where what made them fail is mended, the same command with --retry-failed tries them again.")
        report = write_captions(context, captions, allow_pickle)
    else:
        with context.tracked("import", tags={"vlm_dist.import_sources": ", ".join(map(str, paths))}) as tracker:
            tracker.params({f"import.{name}": value for name, value in cfg.model_dump().items()})
            state, run_id = _import(context, sources, cfg, weights, retry_failed), tracker.run_id
            report = write_captions(context, captions, allow_pickle)
            tracker.metrics({"import/videos": state.ok, "import/failed": state.failed}, step=state.ok + state.failed)
            tracker.metrics({"import/mb_per_s": state.mb_per_s}, step=state.ok + state.failed)
            tracker.tags({"vlm_dist.store_fingerprint": store_info(context.store)["fingerprint"]})
            tracker.tags({"vlm_dist.store": context.store})
            tracker.text("\n".join(r.model_dump_json() for r in failures(context.store)), "failures.jsonl")
    broken = failures(context.store)
    listed = of_listed(broken, sources.videos)
    if state:
        _print_summary(state, listed)
    print_captions(report)
    print_failures(context.store, listed, others=len(broken) - len(listed))
    info = store_info(context.store)
    if waiting := info["videos"]["open"]:
        print_warning(f"{waiting} videos of another import are not in the store yet: type that import again")
    return {
        "store": context.store, "ok": state.ok if state else info["videos"]["ok"],
        "failed": len(listed) + len(sources.refused), "nothing_to_do": state is None or state.shards == 0,
        "rows": state.rows if state else 0, "mb_per_s": state.mb_per_s if state else 0.0,
        "fingerprint": info["fingerprint"], "run": run_id,
    }  # fmt: skip


def _import(
    context: Context, sources: "ArraySources", cfg: "ImportConfig", weights: Path | None, retry_failed: bool
) -> "ImportState":
    from feature_store.import_arrays import import_arrays

    with progress("import", len(sources.videos), "videos") as bar:

        def show(state: "ImportState") -> None:
            failed = f", {state.failed} failed" if state.failed else ""
            bar.update(state.ok + state.failed, f"{state.mb_per_s:.0f} MB/s{failed}", total=state.videos)

        return import_arrays(
            context.store, sources, cfg, weights=weights, retry_failed=retry_failed, on_progress=show
        )  # fmt: skip


def _print_summary(state: "ImportState", listed: list["VideoRecord"]) -> None:
    repeated = sum(record.reason == "duplicate" for record in listed)
    print(
        f"{counted(state.ok, 'video')} ({duration(state.rows)} of video, {state.bytes_read / 1e6:,.1f} MB) imported in "
        f"{duration(state.elapsed_s)}; {state.failed} failed{f', {repeated} repeated an id' if repeated else ''}."
    )


def export(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Feature store.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder, or that of an earlier export.")],
    npy: Annotated[bool, typer.Option("--npy", help="Only features: ID.npy, float16 (seconds, F).")] = False,
    parquet: Annotated[
        bool, typer.Option("--parquet", help="Only the index: videos.parquet, clips.parquet, splits.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Export a store for other tools: features as one .npy a video, and its index as Parquet.

    Without --npy and --parquet both are written. Ids become file names with %XX for odd characters; `store import` of
    the folder gives the same ids, features and provenance, and captions with `--captions DIR/clips.parquet --set
    captions.deduplicate=off`. Running the command again does what is left to do.

    \b
    Examples:
      vlm-dist store export my-store my-files
      vlm-dist store export my-store my-tables --parquet --json
    """
    from feature_store.export import export_npy
    from feature_store.export_tables import export_parquet
    from feature_store.index import StoreIndex

    started = time.monotonic()
    both = npy == parquet
    root = store_address(store, Path(), None)
    videos = StoreIndex(root).num_videos
    result: dict[str, Any] = {"store": root, "folder": str(folder), "videos": videos}
    with prose_on_stderr(as_json):
        if npy or both:
            with progress("export features", videos, "videos") as bar:
                done = export_npy(root, folder, bar.update)
            result |= {"npy": done.written, "npy_kept": done.kept, "npy_bytes": done.bytes}
            print(f"{done.written} feature files written ({done.bytes / 1e6:,.1f} MB), {done.kept} were there.")
        if parquet or both:
            with progress("export tables", 2 * videos, "entries") as bar:
                done = export_parquet(root, folder, bar.update)
            result |= {"tables": done.written, "tables_kept": done.kept, "tables_bytes": done.bytes}
            print(f"{done.written} tables written ({done.bytes / 1e6:,.1f} MB), {done.kept} were there.")
        print(f"{folder} holds the export of {videos} videos ({duration(time.monotonic() - started)}).")
    if as_json:
        print_json(result)
