"""Old snapshots, and what repairs took out, are removed to free their space (any store → a smaller one)."""

from pydantic import BaseModel, ConfigDict, Field

from feature_store.at_work import SNAPSHOT, at_work, require_no_writers
from feature_store.index import StoreIndex, current_snapshot, snapshot_key
from feature_store.layout import VOIDED, StoreMeta, open_store
from feature_store.leftovers import VOIDED_SNAPSHOT, named_folder, sweep, withdraw
from feature_store.snapshot import snapshot_names
from feature_store.storage import Root
from feature_store.tokenizer import load_tokenizer
from vlm_dist.errors import StoreError, StoreUnreachableError, VlmDistError


class PruneReport(BaseModel):
    """What was removed (or would be)."""

    model_config = ConfigDict(frozen=True)

    snapshots: list[str] = Field(description="Names of the snapshots, oldest first.")
    voided: list[str] = Field(description="Shards, records and snapshots that repairs had taken out.")
    kept: list[str] = Field(description="Names of the snapshots that stay.")
    bytes: int = Field(description="Of all that was removed.")


def prune_store(root: Root, keep: int = 1, voided: bool = False, dry_run: bool = False) -> PruneReport:
    """Removes all but the newest snapshots. Features stay, also those that only removed snapshots named.

    What is bound to a snapshot that goes, as a training run is, cannot be resumed on this store.

    Args:
        root: the store.
        keep: how many stay, at least one; the one that CURRENT names always does.
        voided: also empty `_voided`: damaged shards, records and snapshots that repairs put there.
        dry_run: only say what would go.

    Raises:
        StoreError: no store, a damaged one, or a snapshot is being made or the store repaired; the newest snapshot is
            damaged, of which every byte is read before anything goes (also for `dry_run`).
    """
    assert keep >= 1, "readers need a snapshot"
    meta = open_store(root)
    with at_work(meta, "store prune") as note:
        require_no_writers(meta, note, SNAPSHOT)
        return _prune(meta, keep, voided, dry_run)


def _prune(meta: StoreMeta, keep: int, voided: bool, dry_run: bool) -> PruneReport:
    names, current = snapshot_names(meta), current_snapshot(meta)
    going = [name for name in names[:-keep] if name != current]
    # A number that was used must not come again: a snapshot above the newest stays aside as its witness.
    told = [name for name in meta.storage.names(VOIDED) if not _is_witness(name, names)] if voided else []
    if names and (going or told):
        _require_sound(meta, names[-1])
    size = sum(_bytes(meta, key) for key in [*(snapshot_key(name) for name in going), *map(_aside, told)])
    if not dry_run:
        for name in going:
            withdraw(meta, name)
        for key in map(_aside, told):
            if folder := named_folder(meta, key):
                meta.storage.remove(folder)
            meta.storage.remove(key)
        sweep(meta)
    return PruneReport(snapshots=going, voided=told, kept=[name for name in names if name not in going], bytes=size)


def _require_sound(meta: StoreMeta, name: str) -> None:
    """Compares the checksums of the newest snapshot as the store has it: of a damaged one the older are the backup."""
    try:
        with meta.storage.copied(snapshot_key(name)) as folder:
            index = StoreIndex(meta.root, name, folder)
            index.check_all()
            tokenizer = load_tokenizer(str(index.tokenizer_dir)) if index.tokenizer_dir else None
            if tokenizer and tokenizer.sha256 != index.details["captions"]["tokenizer_sha256"]:
                raise StoreError(f"the tokenizer in {folder} is not the one that made the tokens")
    except StoreUnreachableError:
        raise
    except (VlmDistError, FileNotFoundError, KeyError, ValueError) as error:
        raise StoreError(
            f"snapshot {name}, which would stay, is damaged: nothing was removed, as older ones may mend it; "
            f"run `vlm-dist store verify --deep --repair` on the store first ({error})"
        ) from error


def _aside(name: str) -> str:
    return f"{VOIDED}/{name}"


def _is_witness(name: str, published: list[str]) -> bool:
    number = name.removeprefix(VOIDED_SNAPSHOT)
    return number != name and int(number) > max(map(int, published), default=0)


def _bytes(meta: StoreMeta, key: str) -> int:
    return sum(meta.storage.sizes(named_folder(meta, key) or key).values()) or meta.storage.size(key) or 0
