"""One video -> its features, in this process: no workspace, no Ray, no tracked run (what `extract FILE` does)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.cli.context import Context
from vlm_dist.cli.extract_store import announce_calibration, weights_file
from vlm_dist.cli.output import progress
from vlm_dist.errors import ConfigError, ExtractionError

if TYPE_CHECKING:
    import numpy as np

    from feature_store.plan import PlannedVideo


def lone_video(context: Context, paths: list[Path]) -> "PlannedVideo | None":
    """The video, where this is one file (or object) and no workspace says where it belongs."""
    from feature_store.manifest import MANIFEST_SUFFIXES, list_inputs
    from vlm_dist.config import FILE

    one = len(paths) == 1 and not paths[0].is_dir() and paths[0].suffix.lower() not in MANIFEST_SUFFIXES
    if not one or (context.resolved.folder / FILE).exists():
        return None
    videos = list_inputs(paths)
    return videos[0] if len(videos) == 1 else None


def extract_to_npy(context: Context, paths: list[Path], random_seed: int | None) -> dict[str, Any]:
    """One video -> NAME.npy in the current folder."""

    from feature_store.encode import calibration_clips, clip_encoder, features_from_file
    from feature_store.export import published
    from feature_store.npy import write_rows
    from feature_store.weights import NO_RANDOM_LAYER, load_s3d, random_s3d

    if len(paths) != 1 or paths[0].is_dir():
        raise ConfigError("--npy takes one video; give --store to extract several into a store")
    cfg = context.settings.extract
    target = Path(f"{paths[0].stem}.npy")
    if target.exists():
        raise ConfigError(f"{target.absolute()} is there already: move it away, or type this in another folder")
    weights = weights_file(context, random_seed)
    if weights is None:
        if cfg.layer == "mixed_5c":
            raise ConfigError(NO_RANDOM_LAYER)
        announce_calibration()
        model = random_s3d(random_seed or 0, calibration_clips([paths[0]], cfg.decode))
    else:
        model, _ = load_s3d(weights)
    with progress("extract", unit="s of video") as bar:
        extracted = features_from_file(
            paths[0], clip_encoder(model, cfg), cfg, lambda chunk: bar.update(chunk.decoded_s, total=chunk.claimed_s)
        )
    with published(target, extracted.features.nbytes) as temporary, temporary.open("wb") as file:
        write_rows(file, extracted.features)
    return _result(extracted.features, extracted.seconds, extracted.decoded_s, extracted.claimed_s, file=str(target))


def extract_without_ray(context: Context, video: "PlannedVideo", random_seed: int | None) -> dict[str, Any]:
    """One video -> the workspace's store, made or continued.

    Raises:
        ExtractionError: the video gives no features, and the store has its reason; or its id is another video's there.
    """
    from feature_store.extract import extract_corpus
    from feature_store.index import StoreIndex
    from feature_store.plan import is_another_file
    from feature_store.reader import FeatureReader
    from feature_store.show import video_facts

    weights = weights_file(context, random_seed)
    with progress("extract", unit="s of video") as bar:
        summary = extract_corpus(
            context.store,
            [video],
            context.settings.extract,
            random_seed=random_seed,
            weights=weights,
            rows_per_shard=context.settings.store_layout.rows_per_shard,
            here=True,
            on_progress=lambda state: bar.update(state.encoded_s),
            on_calibration=announce_calibration,
        )
    facts = video_facts(context.store, video.video_id)
    record = facts["record"]
    if facts["state"] != "ok":
        raise ExtractionError(record["message"] if record else f"{video.path}: the store says {facts['state']}")
    if is_another_file(video.path, record["path"]):
        raise ExtractionError(
            f"{video.path}: in {context.store} the id {video.video_id!r} is of another video, {record['path']}; "
            "name another store (--store), or give a list (.csv) with an id of its own"
        )
    features = FeatureReader(context.store, check="always").read(StoreIndex(context.store).find(video.video_id))
    place = {"store": context.store, "video_id": video.video_id, "nothing_to_do": summary.nothing_to_do}
    return _result(features, record["seconds"], record["decoded_s"], record["claimed_s"], **place)


def print_video(result: dict[str, Any]) -> None:
    """What became of one video, on a line."""
    place = result.get("file") or f"{result['store']}, video {result['video_id']!r}"
    again = ", there already" if result.get("nothing_to_do") else ""
    print(
        f"{result['rows']} tokens of width {result['width']} (mean length {result['norm']:.3f}) "
        f"in {result['seconds']:.1f} s -> {place}{again}"
    )


def _result(features: "np.ndarray", seconds: float, decoded_s: float, claimed_s: float, **place: str) -> dict[str, Any]:
    import numpy as np

    rows, width = features.shape
    norm = float(np.linalg.norm(features.astype(np.float32), axis=1).mean())
    return {**place, "rows": rows, "width": width, "norm": norm, "seconds": seconds,
            "decoded_s": decoded_s, "claimed_s": claimed_s}  # fmt: skip
