"""`vlm-dist captions`: narration -> a store's captions, cleaned and tokenised (again), without touching a feature."""

from pathlib import Path
from typing import Annotated

import typer

from vlm_dist.cli.context import Context
from vlm_dist.cli.intake import print_captions, write_tracked_captions
from vlm_dist.cli.options import HERE, AllowPickle, Json, Overrides, Workspace
from vlm_dist.cli.output import print_json, prose_on_stderr


def captions(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]", help="Captions as JSON, JSONL, CSV, Parquet or pickle (default: the store's own)."
        ),
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Feature store (default: the workspace's).")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="BERT name, folder, or wordpiece:N to train one on the captions.")
    ] = None,
    deduplicate: Annotated[
        str | None, typer.Option(help="Repeated text of rolling captions: words, reference, or off.")
    ] = None,
    allow_pickle: AllowPickle = False,
    workspace: Workspace = HERE,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Clean, de-duplicate and tokenise captions into a store; features stay as they are.

    With a FILE, its captions replace those of its videos. Without, the store's own text is tokenised again, as for
    another vocabulary. Doing the same again does nothing.

    \b
    Examples:
      vlm-dist captions raw_caption.json --store howto
      vlm-dist captions --tokenizer wordpiece:8000
    """
    flags = {"store": store, "captions.tokenizer": tokenizer, "captions.deduplicate": deduplicate}
    context = Context.open(workspace, overrides, flags)
    context.require_store()
    with prose_on_stderr(as_json):
        report, run = write_tracked_captions(context, file, allow_pickle)
        print_captions(report)
    if as_json:
        print_json({**report.model_dump(), "run": run})
