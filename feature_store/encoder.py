"""Which encoder makes a store's features: given weights, or random ones that the store keeps (frames → features)."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from safetensors.torch import save

from feature_store.config import ExtractConfig
from feature_store.encode import calibration_clips
from feature_store.layout import StoreMeta, create_store, open_store, store_exists
from feature_store.plan import PlannedVideo
from feature_store.records import Provenance
from feature_store.s3d import FEATURE_DIM, S3D
from feature_store.storage import Root, fetched
from feature_store.weights import NO_RANDOM_LAYER, NO_WEIGHTS, file_sha256, load_s3d, random_s3d
from vlm_dist.errors import ConfigError, StoreError

_IGNORED_ROTATION = "rotation ignored"


@dataclass(frozen=True)
class Encoder:
    """A model together with what a store says about it."""

    model: S3D
    provenance: Provenance

    def state(self) -> dict[str, np.ndarray]:
        """The weights as arrays, for Ray's object store (workers on one machine share one copy)."""
        return {key: value.numpy() for key, value in self.model.state_dict().items()}


def prepare_encoder(
    store: Root,
    videos: Sequence[PlannedVideo],
    cfg: ExtractConfig,
    *,
    random_seed: int | None = None,
    weights: Path | None = None,
    rows_per_shard: int = 0,
    on_calibration: Callable[[], None] = lambda: None,
) -> Encoder:
    """Load or make the encoder, and create the store for it (or check that the store there is of this encoder).

    Random weights are calibrated when the store is made, on a sample of `videos`, and kept in the store's folder
    `_extractor`, so that videos added later go through the very same encoder. `on_calibration` is called before that,
    which takes a minute of silence.

    Raises:
        ConfigError: neither or both of weights and random_seed, or mixed_5c of random weights.
        ExtractionError: wrong weights, or no readable video to calibrate on.
        StoreError: the store is of another encoder, or its own weights are lost or damaged.
    """
    if (weights is None) == (random_seed is None):
        raise ConfigError(NO_WEIGHTS if weights is None else "give either weights or a random seed, not both")
    meta = open_store(store) if store_exists(store) else None
    known = meta.provenance if meta else None
    if weights is not None:
        model, sha256 = load_s3d(weights)
        provenance = _provenance(cfg, known, weights=weights.name, weights_sha256=sha256)
        create_store(store, provenance, rows_per_shard)
        return Encoder(model, provenance)
    if cfg.layer == "mixed_5c":
        raise ConfigError(NO_RANDOM_LAYER)
    if meta and meta.provenance.random_seed == random_seed and meta.storage.size(kept_weights(meta)):
        with fetched(meta.storage, kept_weights(meta)) as path:
            model, sha256 = load_s3d(path)
        if sha256 != meta.provenance.weights_sha256:
            raise StoreError(f"{meta.place(kept_weights(meta))} is damaged: restore it, or extract into a new folder")
        data, calibration = None, meta.provenance.calibration
    else:
        on_calibration()
        clips = calibration_clips([video.path for video in videos], cfg.decode)
        model = random_s3d(int(random_seed or 0), clips)
        data = save({key: value.contiguous() for key, value in model.state_dict().items()})
        sha256, calibration = hashlib.sha256(data).hexdigest(), f"{len(clips)} one-second clips of the corpus"
    provenance = _provenance(
        cfg,
        known,
        weights=f"random seed {random_seed}",
        weights_sha256=sha256,
        random_seed=random_seed,
        calibration=calibration,
    )
    meta = create_store(store, provenance, rows_per_shard)
    if data is not None:
        meta.storage.replace(kept_weights(meta), data)
    return Encoder(model, provenance)


def require_same_encoder(
    store: Root, cfg: ExtractConfig, *, random_seed: int | None, weights: Path | None, rows_per_shard: int = 0
) -> None:
    """Refuse to go on with a store of another encoder, without loading the encoder.

    Raises:
        StoreError: names what differs.
        ExtractionError: no such weights file.
    """
    known = open_store(store).provenance
    if weights is not None:
        given = {"weights": weights.name, "weights_sha256": file_sha256(weights)}
    elif random_seed == known.random_seed:
        given = known.model_dump(include={"weights", "weights_sha256", "random_seed", "calibration"})
    else:
        given = {"weights": f"random seed {random_seed}", "weights_sha256": "", "random_seed": random_seed}
    create_store(store, _provenance(cfg, known, **given), rows_per_shard)


def kept_weights(meta: StoreMeta) -> str:
    """Where a store keeps the random weights that it was made with."""
    return f"_extractor/{meta.provenance.weights_sha256}.safetensors"


def _provenance(cfg: ExtractConfig, known: Provenance | None, **weights: str | int | None) -> Provenance:
    decode = cfg.decode
    libavcodec = ".".join(map(str, av.library_versions["libavcodec"]))
    decoder = f"PyAV {av.__version__} / libavcodec {libavcodec}"
    if not decode.rotate:
        decoder += f" / {_IGNORED_ROTATION}"
    if known and known.decoder.endswith(_IGNORED_ROTATION) == (not decode.rotate):
        decoder = known.decoder  # an update of the decoder does not forbid going on with a store
    if known and known.weights_sha256 == weights["weights_sha256"]:
        weights["weights"] = known.weights  # the same file under another name
    return Provenance.model_validate(
        {
            **weights,
            "layer": cfg.layer,
            "precision": cfg.precision,
            "fps": decode.fps,
            "window": decode.fps,
            "size": decode.size,
            "normalised": cfg.normalise,
            "decoder": decoder,
            "feature_dim": FEATURE_DIM[cfg.layer],
        }
    )
