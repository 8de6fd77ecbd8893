"""`vlm-dist extract`: videos (and captions) -> a feature store, or one video -> one file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_dist.cli.context import Context
from vlm_dist.cli.extract_store import announce_calibration, extract_to_store, weights_file
from vlm_dist.cli.intake import STRICT_EXIT
from vlm_dist.cli.options import HERE, AllowPickle, Json, Overrides, Workspace
from vlm_dist.cli.output import print_json, prose_on_stderr
from vlm_dist.errors import ConfigError


def extract(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH...", help="Videos, folders of videos, or CSV/JSONL lists (video_id, path)."),
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Feature store that is made or continued.")] = None,
    captions: Annotated[
        Path | None, typer.Option(help="Captions: {id: {start, end, text}} as JSON, JSONL, CSV, Parquet or pickle.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="S3D weights, s3d_howto100m.pth.")] = None,
    random_weights: Annotated[
        int | None, typer.Option(metavar="SEED", help="Use random S3D weights (for trying things out).")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Of the captions: BERT name, folder, or wordpiece:N to train one.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Ray workers (default: one for every CPU, or GPU that is used)."),
    ] = None,
    npy: Annotated[
        bool, typer.Option("--npy", help="One video, no store: write NAME.npy here, in this process.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try the store's failed videos again (with PATH or without).")
    ] = False,
    allow_pickle: AllowPickle = False,
    strict: Annotated[bool, typer.Option("--strict", help=f"Exit {STRICT_EXIT} when a video failed.")] = False,
    workspace: Workspace = HERE,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Extract S3D features of videos into a store: one token for every second of video.

    Broken videos are listed with their reason and stop nothing. Running the command again does what is left to do,
    and nothing when all is done.

    \b
    Examples:
      vlm-dist extract videos/ --captions captions.json --weights s3d_howto100m.pth
      vlm-dist extract --retry-failed --weights s3d_howto100m.pth
      vlm-dist extract list.csv --random-weights 0 --tokenizer wordpiece:2000
      vlm-dist extract my.mp4 --npy --weights s3d_howto100m.pth
    """
    context = Context.open(
        workspace,
        overrides,
        {
            "store": store,
            "captions_file": captions,
            "extract.weights": weights,
            "extract.workers": workers,
            "captions.tokenizer": tokenizer,
        },
    )
    if not paths and not retry_failed:
        raise ConfigError("which videos? Give files, folders or lists; or --retry-failed for those that failed before")
    if npy:
        if ignored := [flag for flag, value in {"--store": store, "--captions": captions}.items() if value]:
            raise ConfigError(f"--npy writes one file and no store: leave out {' and '.join(ignored)}, or --npy itself")
        result = extract_to_npy(context, paths or [], random_weights)
        if as_json:
            print_json(result)
        else:
            print(
                "{rows} tokens of width {width} (mean length {norm:.3f}) in {seconds:.1f} s -> {file}".format(**result)
            )
        return
    with prose_on_stderr(as_json):
        result = extract_to_store(context, paths or [], random_weights, allow_pickle, retry_failed)
    if as_json:
        print_json(result)
    if strict and result["failed"]:
        raise typer.Exit(STRICT_EXIT)


def extract_to_npy(context: Context, paths: list[Path], random_seed: int | None) -> dict[str, Any]:
    """One video -> NAME.npy in the current folder, without Ray, store or run."""
    import numpy as np

    from feature_store.encode import calibration_clips, clip_encoder, features_from_file
    from feature_store.weights import load_s3d, random_s3d

    if len(paths) != 1 or paths[0].is_dir():
        raise ConfigError("--npy takes one video; give --store to extract several into a store")
    cfg = context.settings.extract
    target = Path(f"{paths[0].stem}.npy")
    if target.exists():
        raise ConfigError(f"{target.absolute()} is there already: move it away, or type this in another folder")
    weights = weights_file(context, random_seed)
    if weights is None:
        announce_calibration()
        model = random_s3d(random_seed or 0, calibration_clips([paths[0]], cfg.decode))
    else:
        model, _ = load_s3d(weights)
    extracted = features_from_file(paths[0], clip_encoder(model, cfg), cfg)
    np.save(target, extracted.features)
    rows, width = extracted.features.shape
    norm = float(np.linalg.norm(extracted.features.astype(np.float32), axis=1).mean())
    return {"file": str(target), "rows": rows, "width": width, "norm": norm, "seconds": extracted.seconds,
            "decoded_s": extracted.decoded_s, "claimed_s": extracted.claimed_s}  # fmt: skip
