"""`vlm-dist store`: what is in a feature store, whether it is whole, what failed; in, out, deleted, named."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_dist.cli.context import store_address
from vlm_dist.cli.options import HERE, Json, Overrides, Workspace
from vlm_dist.cli.store_marks import delete, migrate, prune, split
from vlm_dist.cli.store_transfer import export, import_features

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)

_SHOWN = 10

Store = Annotated[Path | None, typer.Argument(metavar="STORE", help="Feature store (default: the workspace's).")]


@app.callback()
def _store() -> None:
    """Look into a feature store, take features in and out, delete and name videos."""


app.command("import")(import_features)
app.command("export")(export)
app.command("delete")(delete)
app.command("split")(split)
app.command("prune")(prune)
app.command("migrate")(migrate)


@app.command()
def info(
    store: Store = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw durations and captions per video into a picture.")
    ] = None,
    workspace: Workspace = HERE,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Say what a store holds: videos, hours, captions, failures by reason, and what made its features.

    \b
    Examples:
      vlm-dist store info
      vlm-dist store info my-store --json
      vlm-dist store info --plot store.png
    """
    from feature_store.info import store_info
    from vlm_dist.cli.output import print_json, print_table, print_warning

    root = store_address(store, workspace, overrides)
    facts = store_info(root)
    if plot:
        from feature_store.plots import plot_store

        plot_store(root, plot)
    if json:
        print_json(facts)
        return
    damage = facts.pop("damage")
    print_table(("", ""), _lines(facts), title=f"Feature store {root}")
    for line in damage:
        print_warning(f"{line}: the numbers are not to be trusted; run `vlm-dist store verify {root}`")
    if plot:
        print(f"Picture: {plot}")


@app.command()
def verify(
    store: Store = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and check it against its checksum.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Put right what can be put right without the videos.")
    ] = False,
    writers_gone: Annotated[
        bool,
        typer.Option(
            "--writers-gone",
            help="Repair although a writer gave a sign of life within the last minute: you know that it was killed.",
        ),
    ] = False,
    workspace: Workspace = HERE,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Check a store; exit code 1 when anything is wrong.

    Without --deep the structure, the sizes of all files and the newest index are checked; --deep reads every byte and
    names each damaged video, shard and chunk. --repair keeps every video that is whole, also of damaged shards. It
    removes what is unfinished, so it is refused while somebody writes to the store. With --deep it also mends what only
    checksums show.

    \b
    Examples:
      vlm-dist store verify --deep
      vlm-dist store verify my-store --deep --repair --json
    """
    from feature_store.verify import verify_store
    from vlm_dist.cli.output import counted, print_error, print_json, print_table, visible

    root = store_address(store, workspace, overrides)
    report = verify_store(root, deep=deep, repair=repair, writers_gone=writers_gone)
    problems = report.problems
    if json:
        print_json({"ok": not problems, **report.model_dump()})
    else:
        for line in report.repaired:
            print(f"repaired: {line}")
        if report.to_extract:
            some = visible(", ".join(report.to_extract[:_SHOWN])) + (", …" if len(report.to_extract) > _SHOWN else "")
            print(f"{counted(len(report.to_extract), 'video')} must be extracted again: {some} (--json lists all)")
        if problems:
            print_table(("problem", "where", "what"), [(p.kind, p.where, p.message) for p in problems])
        checked = f", {report.bytes_checked / 1e6:,.1f} MB checked" if report.bytes_checked else ""
        print(f"{counted(report.videos, 'video')} in {counted(report.shards, 'shard')}{checked}")
        if report.shards and not report.snapshot:
            print("There is no index snapshot: captions, splits and deletions are none that are known here.")
    if problems:
        print_error(f"{len(problems)} problem{'s' * (len(problems) != 1)} in {root}")
        raise typer.Exit(1)
    if not json:
        print("The store is whole." if deep else "The structure is whole; --deep checks every byte.")


@app.command()
def show(
    video: Annotated[str, typer.Argument(metavar="ID", help="Video id.")],
    store: Annotated[Path | None, typer.Option("--store", help="Feature store (default: the workspace's).")] = None,
    workspace: Workspace = HERE,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Say what a store knows of one video: its file, seconds, place, what made its features, its captions.

    \b
    Examples:
      vlm-dist store show dQw4w9WgXcQ
      vlm-dist store show dQw4w9WgXcQ --store s3://lab/howto --json
    """
    from feature_store.show import video_facts
    from vlm_dist.cli.output import print_json, print_table, visible

    facts = video_facts(store_address(store, workspace, overrides), video)
    if json:
        print_json(facts)
        return
    captions = facts.pop("captions")
    record, provenance = facts.pop("record") or {}, facts.pop("provenance")
    if record:
        record["crc32c"] = f"{record['crc32c']:08x}"
        record["working_s"] = record.pop("seconds")
        record = {name: value for name, value in record.items() if value != 0.0 or name == "row"}
    facts |= {"captions": len(captions), **record, "provenance": provenance}
    print_table(("", ""), _lines(facts), title=f"Video {visible(facts['video_id'])}")
    if captions:
        rows = [(f"{c['start_ms'] / 1000:.1f}", f"{c['end_ms'] / 1000:.1f}", c["text"]) for c in captions]
        print_table(("start s", "end s", "text"), rows, title="Captions")


@app.command()
def failures(store: Store = None, workspace: Workspace = HERE, overrides: Overrides = None, json: Json = False) -> None:
    """List the videos that gave no features, each with its reason.

    \b
    Examples:
      vlm-dist store failures
      vlm-dist store failures my-store --json
    """
    from feature_store.info import failures as failed
    from vlm_dist.cli.output import print_json, print_table

    records = failed(store_address(store, workspace, overrides))
    if json:
        print_json([record.model_dump() for record in records])
    elif not records:
        print("No video failed.")
    else:
        print_table(
            ("video", "reason", "message", "file"), [(r.video_id, r.reason, r.message, r.path) for r in records]
        )


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    from vlm_dist.config import flatten

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.3f}".rstrip("0").rstrip(".")
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

    return [(key.replace("_", " ").replace(".", ": "), text(v)) for key, v in flatten(facts) if v not in ("", None, {})]
