"""`vlm-dist extract`: videos (and captions) -> a feature store, or one video -> one file."""

from pathlib import Path
from typing import Annotated

import typer

from vlm_dist.cli.context import Context
from vlm_dist.cli.extract_file import extract_to_npy, extract_without_ray, lone_video, print_video
from vlm_dist.cli.extract_store import extract_to_store
from vlm_dist.cli.intake import STRICT_EXIT
from vlm_dist.cli.options import HERE, AllowPickle, Json, Overrides, Workspace
from vlm_dist.cli.output import print_json, prose_on_stderr
from vlm_dist.errors import ConfigError


def extract(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH...", help="Videos, folders, CSV/JSONL lists (video_id, path); local or s3://."),
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Feature store that is made or continued.")] = None,
    captions: Annotated[
        Path | None, typer.Option(help="Captions: {id: {start, end, text}} as JSON, JSONL, CSV, Parquet or pickle.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="S3D weights, s3d_howto100m.pth.")] = None,
    random_weights: Annotated[
        int | None, typer.Option(metavar="SEED", help="Use random S3D weights (for trying things out).")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="S3D output to store: video_embedding (512 wide) or mixed_5c (1024).")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Of the captions: BERT name, folder, or wordpiece:N to train one.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Ray workers (default: one for every CPU, or GPU that is used)."),
    ] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="The same bits for any number of workers; slower.")
    ] = None,
    npy: Annotated[bool, typer.Option("--npy", help="One video, no store: write NAME.npy here.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try failed videos again: those of PATH, or all.")
    ] = False,
    allow_pickle: AllowPickle = False,
    strict: Annotated[bool, typer.Option("--strict", help=f"Exit {STRICT_EXIT} when a video failed.")] = False,
    workspace: Workspace = HERE,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Extract S3D features of videos into a store: one token for every second of video.

    Broken videos are listed with their reason and stop nothing. Running the command again does what is left to do,
    and nothing when all is done. One video outside of a workspace (a folder with vlm-dist.toml) goes into ./store, or
    with --npy into a file, without Ray and without a tracked run.

    \b
    Examples:
      vlm-dist extract videos/ --captions captions.json --weights s3d_howto100m.pth
      vlm-dist extract --retry-failed --weights s3d_howto100m.pth
      vlm-dist extract list.csv --random-weights 0 --tokenizer wordpiece:2000
      vlm-dist extract my.mp4 --weights s3d_howto100m.pth
      vlm-dist extract my.mp4 --npy --layer mixed_5c --weights s3d_howto100m.pth
    """
    context = Context.open(
        workspace,
        overrides,
        {
            "store": store,
            "captions_file": captions,
            "extract.weights": weights,
            "extract.workers": workers,
            "extract.layer": layer,
            "extract.deterministic": deterministic,
            "captions.tokenizer": tokenizer,
        },
    )
    if not paths and not retry_failed:
        raise ConfigError("which videos? Give files, folders or lists; or --retry-failed for those that failed before")
    if npy:
        given = {"--store": store, "--captions": captions, "--tokenizer": tokenizer, "--workers": workers,
                 "--retry-failed": retry_failed, "--allow-pickle": allow_pickle}  # fmt: skip
        if ignored := [flag for flag, value in given.items() if value]:
            raise ConfigError(f"--npy writes one file and no store: leave out {' and '.join(ignored)}, or --npy itself")
        result = extract_to_npy(context, paths or [], random_weights)
    elif paths and not (store or captions or retry_failed) and (video := lone_video(context, paths)):
        with prose_on_stderr(as_json):
            result = extract_without_ray(context, video, random_weights)
    else:
        with prose_on_stderr(as_json):
            result = extract_to_store(context, paths or [], random_weights, allow_pickle, retry_failed)
        if as_json:
            print_json(result)
        if strict and result["failed"]:
            raise typer.Exit(STRICT_EXIT)
        return
    if as_json:
        print_json(result)
    else:
        print_video(result)
