"""What a model comes from: whose features it reads, which videos trained it (kept in its folder, checked on use)."""

import hashlib
import logging
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from vlm_dist.errors import StoreError
from vlm_dist.model.foreign import read_json

if TYPE_CHECKING:
    from feature_store.records import Provenance

log = logging.getLogger(__name__)

TRAINED_ON = "trained_on.npz"
# What makes one second of video another vector. Names of files and versions of decoders do not.
_IDENTITY = ("extractor", "weights_sha256", "layer", "fps", "window", "size", "normalised", "feature_dim")


class TrainedOn(NamedTuple):
    """The videos that a model was trained on, in all its trainings one after the other.

    Attributes:
        hashes: (n,) uint64, ascending: 8 bytes a video, 9 MB for the 1.1 million of HowTo100M.
        complete: False where some earlier training left no list (a checkpoint made elsewhere).
    """

    hashes: np.ndarray
    complete: bool

    @classmethod
    def of(cls, ids: Iterable[str] = (), complete: bool = True) -> Self:
        """A training on these videos, by id."""
        return cls(np.unique(_hashes(ids)), complete)

    def and_on(self, ids: Iterable[str]) -> "TrainedOn":
        """After a further training on these videos."""
        return TrainedOn(np.union1d(self.hashes, _hashes(ids)), self.complete)

    def count(self, ids: Iterable[str]) -> int:
        """How many of these (distinct) videos are among them."""
        return int(np.isin(_hashes(ids), self.hashes).sum())

    def write(self, folder: Path) -> None:
        """Keep the list in a model's folder."""
        np.savez(folder / TRAINED_ON, hashes=self.hashes, complete=np.array(self.complete))


def read_trained_on(folder: Path) -> TrainedOn:
    """The list in a model's folder; an empty, incomplete one where there is none or it is damaged (with a warning)."""
    try:
        with np.load(folder / TRAINED_ON) as file:
            return TrainedOn(file["hashes"], bool(file["complete"]))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s cannot be read (%s): which videos trained this model is unknown", folder / TRAINED_ON, error)
    return TrainedOn.of(complete=False)


def check_features(model: Path, store: "Provenance", where: Path | str, allow_other: bool) -> None:
    """Refuse features that the model was not trained on: they may have the right width and say something else.

    Args:
        model: an exported model's folder; one without a word on its features is taken, with a warning.
        store: what made the features of the store.
        where: the store, for messages.
        allow_other: warn only (`train.allow_other_features`).

    Raises:
        StoreError: names the fields that differ.
    """
    known: dict[str, Any] | None = read_json(model / "config.json").get("features")
    if not known:
        log.warning("%s does not say which features it was trained on: nobody can tell if %s fits", model, where)
        return
    mine = store.model_dump(mode="json")
    differing = [
        f"{name} is {_short(known[name])} for the model and {_short(mine[name])} in the store"
        for name in _IDENTITY
        if name in known and known[name] != mine[name]
    ]
    if not differing:
        return
    what = f"the features in {where} are not those that {model} was trained on: {'; '.join(differing)}"
    if not allow_other:
        raise StoreError(
            f"{what}. Extract the videos as those of the model were, or set train.allow_other_features=true"
        )
    log.warning("%s", what)


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 24 else str(value)


def _hashes(ids: Iterable[str]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(video.encode("utf-8", "replace"), digest_size=8).digest() for video in ids)
    return np.frombuffer(digests, np.uint64)
