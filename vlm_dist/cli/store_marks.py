"""`vlm-dist store delete | split | prune | migrate`: what is said of videos by id, old snapshots, and the schema."""

from pathlib import Path
from typing import Annotated

import typer

from vlm_dist.cli.context import store_address
from vlm_dist.cli.options import HERE, Json, Overrides, Workspace

Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Video ids.")]
IdFile = Annotated[
    Path | None, typer.Option("--videos", metavar="FILE", help="File with video ids (.txt, .lst, .csv, .jsonl).")
]
StoreOption = Annotated[Path | None, typer.Option("--store", help="Feature store (default: the workspace's).")]


def delete(
    ids: Ids = None,
    videos: IdFile = None,
    undo: Annotated[bool, typer.Option("--undo", help="Bring the videos back.")] = False,
    store: StoreOption = None,
    workspace: Workspace = HERE,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Take videos out of a store: readers, training and export do not see them any more.

    Runs that are bound to an older snapshot keep them. Their features stay in the store's files, so that --undo brings
    them back; no disk space is freed.

    \b
    Examples:
      vlm-dist store delete dQw4w9WgXcQ
      vlm-dist store delete --videos withdrawn.txt --store s3://lab/howto
      vlm-dist store delete --videos withdrawn.txt --undo
    """
    from feature_store.marks import delete_videos
    from vlm_dist.cli.output import counted, print_json, visible
    from vlm_dist.errors import ConfigError

    root, asked = store_address(store, workspace, overrides), _ids(ids, videos)
    report = delete_videos(root, asked, undo)
    more = ", …" if report.unknown > len(report.unknown_ids) else ""
    named = visible(", ".join(report.unknown_ids)) + more
    if (
        report.unknown
        and not report.changed
        and report.unknown == len({video_id.encode("utf-8", "replace") for video_id in asked})
    ):
        raise ConfigError(f"{root} has none of these videos: {named}; give ids of videos that have features there")
    if as_json:
        print_json(report.model_dump())
        return
    unknown = f"; {report.unknown} {_are(report.unknown)} not in the store: {named}" if report.unknown else ""
    what = "brought back" if undo else "deleted"
    now = f"{report.marked} {_are(report.marked)} deleted now"
    print(f"{counted(report.changed, 'video')} {what}, {now}{unknown}.")


def split(
    name: Annotated[str, typer.Argument(help="Name of the split.")],
    ids: Ids = None,
    videos: IdFile = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the split.")] = False,
    store: StoreOption = None,
    workspace: Workspace = HERE,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Name a part of a store's videos; `--set split.only=NAME` pre-trains on it alone.

    A split is kept with the store, through later extractions too. Ids whose features are not there yet may be in it.

    \b
    Examples:
      vlm-dist store split train-10k --videos train.txt
      vlm-dist store split train-10k --remove
    """
    from feature_store.marks import name_split
    from vlm_dist.cli.output import print_json
    from vlm_dist.errors import ConfigError

    if remove and (ids or videos):
        raise ConfigError("--remove takes no videos: it removes the whole split")
    report = name_split(store_address(store, workspace, overrides), name, None if remove else _ids(ids, videos))
    if as_json:
        print_json(report.model_dump())
    elif remove:
        print(f"Split {name} is removed." if report.changed else f"There was no split {name}.")
    else:
        unknown = f", {report.unknown} of them not in the store yet" if report.unknown else ""
        print(f"Split {name}: {report.marked} videos{unknown}.")


def prune(
    store: Annotated[
        Path | None, typer.Argument(metavar="STORE", help="Feature store (default: the workspace's).")
    ] = None,
    keep: Annotated[int, typer.Option(min=1, metavar="N", help="Snapshots that stay, the newest ones.")] = 1,
    voided: Annotated[
        bool, typer.Option("--voided", help="Also remove what repairs took out: damaged shards, records, snapshots.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    workspace: Workspace = HERE,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Remove old snapshots of a store's index, to free their space; features stay.

    Each snapshot holds all captions of its time. A training run that is bound to one that goes cannot be resumed, so
    prune when such runs are done.

    \b
    Examples:
      vlm-dist store prune --dry-run
      vlm-dist store prune my-store --keep 2 --voided
    """
    from feature_store.prune import prune_store
    from vlm_dist.cli.output import counted, print_json

    report = prune_store(store_address(store, workspace, overrides), keep, voided, dry_run)
    if as_json:
        print_json(report.model_dump())
        return
    print(
        f"{counted(len(report.snapshots), 'snapshot')}"
        + (f" and {counted(len(report.voided), 'voided object')}" if voided else "")
        + f" ({report.bytes / 1e6:,.1f} MB) {'would go' if dry_run else 'removed'}, {len(report.kept)} kept."
    )


def migrate(
    store: Annotated[Path | None, typer.Argument(metavar="STORE", help="Feature store of an older schema.")] = None,
    workspace: Workspace = HERE,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Bring a store of an older schema to this version's; no feature is touched.

    \b
    Examples:
      vlm-dist store migrate my-store
    """
    from feature_store.layout import SCHEMA_VERSION
    from feature_store.migrate import migrate_store
    from vlm_dist.cli.output import print_json

    root = store_address(store, workspace, overrides)
    done = migrate_store(root)
    if as_json:
        print_json({"left_behind": done, "schema_version": SCHEMA_VERSION})
        return
    told = (
        f"went from schema version {done[0]} to {SCHEMA_VERSION}"
        if done
        else f"has schema version {SCHEMA_VERSION} already"
    )
    print(f"{root} {told}.")


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _ids(ids: list[str] | None, file: Path | None) -> list[str]:
    from vlm_dist.data.splits import read_id_list
    from vlm_dist.errors import ConfigError

    if not ids and file is None:
        raise ConfigError("which videos? Give their ids, or --videos FILE with one id a line")
    return [*(ids or ()), *(sorted(read_id_list(file)) if file else ())]
