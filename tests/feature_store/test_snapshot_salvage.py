"""feature_store.snapshot_salvage: of a damaged newest snapshot a repair loses only what is damaged, and names it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from feature_store import verify
from feature_store.captions import write_captions
from feature_store.config import CaptionConfig
from feature_store.files import seal, unseal
from feature_store.index import StoreIndex
from feature_store.layout import open_store
from feature_store.marks import delete_videos, name_split
from feature_store.prune import prune_store
from feature_store.snapshot import finalise, snapshot_names
from feature_store.storage import open_storage
from feature_store.verify import VerifyReport, verify_store
from tests.feature_store.store_tools import change, features, flip_bit, make_store, write_shards
from vlm_dist.errors import StoreError

IDS = [f"v{number}" for number in range(6)]
CORPUS: dict[str, np.ndarray | None] = {key: features(key, 9) for key in IDS}
CAPTIONED = [*IDS, "waits", "waits2"]
Said = tuple[list[bytes], dict[str, list[bytes]], dict[str, list[str]]]


def say(root: str, folder: Path, ids: list[str], words: str) -> None:
    told = {key: {"start": [0, 3], "end": [2, 6], "text": [f"{words} {key}", "and more"]} for key in ids}
    (folder / "captions.json").write_text(json.dumps(told))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    pieces = [*vocabulary, *(f"##{piece}" for piece in vocabulary[5:])]
    (folder / "vocabulary").mkdir(exist_ok=True)
    (folder / "vocabulary" / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    write_captions(root, folder / "captions.json", CaptionConfig(tokenizer=str(folder / "vocabulary")))


def fill(root: str, folder: Path) -> str:
    """Captions of all and of two that wait; two splits; v4 is deleted. Older snapshots have older words, no v4 gone."""
    make_store(root, CORPUS)
    say(root, folder, CAPTIONED, "old words of")
    name_split(root, "tr", ["v0", "v1"])
    say(root, folder, CAPTIONED, "the words of")
    name_split(root, "va", ["v2", "v9"])
    delete_videos(root, ["v4"])
    return root


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    return Path(fill(str(folder / "store"), folder))


@pytest.fixture
def store(filled: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(filled, tmp_path / "store"))


def said(root: str) -> Said:
    """What is deleted, the splits, and the captions of all videos."""
    index = StoreIndex(root)
    pending = index.pending()
    captions: dict[str, list[str]] = {}
    for ids, table in ((index.id_list(), index.captions), *([pending] if pending else [])):
        for row, key in enumerate(ids):
            video = table.video(row)
            if len(video.start_ms):
                assert video.crc32c() == table.caption_crc32c[row]
                captions[key.decode()] = video.texts()
    return index.deleted(), {name: index.split_ids(name) for name in index.splits}, captions


def repaired(root: str) -> VerifyReport:
    report = verify_store(root, deep=True, repair=True)
    assert report.problems == [], "a second deep look, after the repair"
    return report


def kept(report: VerifyReport) -> list[str]:
    return [line for line in report.repaired if line.startswith("kept")]


def lost(report: VerifyReport) -> list[str]:
    return [line.partition(": ")[2] for line in report.repaired if line.startswith("lost")]


# Bytes of columns (each damage is found by a checksum of its own), the videos whose captions are lost with them, and
# how many have their text, so that tokens are made anew.
DAMAGE = {
    "tokens": ({"tokens": 6, "clip_start_ms": 8, "n_rows": 4, "pending/tokens": 2}, ["v0", "v1"], 1),
    "text": (
        {"text": 0, "clip_ntok": 8, "clip_end_ms": 29, "shard": 4, "pending/text": 40},
        ["v0", "v2", "v3", "waits"],
        0,
    ),
    "clip_ptr": ({"clip_ptr": 16, "clip_ntext": 33, "status": 1, "deleted/video_id": 0}, ["v1", "v2", "v5"], 0),
    "tok_ptr": ({"tok_ptr": 38, "row": 4, "video_id_ptr": 8, "pending/clip_ptr": 16}, ["waits", "waits2"], 2),
    "text_ptr": ({"text_ptr": 23, "crc32c": 5, "deleted/video_id_ptr": 8}, ["v1", "v2"], 0),
    "caption_crc32c": ({"caption_crc32c": 4, "video_id": 3}, [], 0),
}


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(("damage", "whose", "anew"), DAMAGE.values(), ids=DAMAGE)
def test_flipped_bits_lose_only_what_they_damaged(
    store: str, damage: dict[str, int], whose: list[str], anew: int, pruned: bool
) -> None:
    deleted, splits, captions = said(store)
    name = StoreIndex(store).name
    if pruned:
        prune_store(store)
    for column, byte in damage.items():
        flip_bit(Path(store, "index", name, column, "c", "0"), byte, 1)
    report = repaired(store)
    left = {key: texts for key, texts in captions.items() if not pruned or key not in whose}
    assert said(store) == (deleted, splits, left), "the snapshot before has the same captions"
    assert StoreIndex(store).id_list() == [key.encode() for key in IDS if key != "v4"]
    new = f"{int(name) + 1:06d}"
    made = f" (the tokens of {anew} made anew from their text)" if anew else ""
    assert kept(report) == [
        f"kept 1 deletion, 2 splits and the captions of {8 - len(whose)} of 8 videos{made} of damaged snapshot {name} "
        f"in snapshot {new}"
    ]
    used = "" if pruned else " (older ones are used)"
    assert lost(report) == ([f"captions of {', '.join(whose)}{used}"] if whose else [])
    assert f"took out damaged snapshot {name}" in report.repaired
    assert snapshot_names(open_store(store))[-1] == StoreIndex(store).name == new


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("file", ["video_id", "video_id_ptr"])
def test_damaged_splits_and_pending_ids(store: str, file: str, pruned: bool) -> None:
    deleted, splits, captions = said(store)
    name = StoreIndex(store).name
    if pruned:
        prune_store(store)
    for part, byte in (("splits/tr", 8), ("pending", 8)):
        flip_bit(Path(store, "index", name, part, file, "c", "0"), byte if file == "video_id_ptr" else 1, 1)
    report = repaired(store)
    if pruned:
        del splits["tr"]
        captions = {key: texts for key, texts in captions.items() if key in IDS and key != "v4"}
        assert lost(report) == ["split tr; captions of 3 videos whose ids are damaged"]
    else:
        assert lost(report) == [
            "split tr (that of snapshot 000005 is used); captions of 3 videos whose ids are damaged "
            "(those of 3 videos in older snapshots are used)"
        ]
    assert said(store) == (deleted, splits, captions)


def test_the_older_captions_are_those_that_are_sound(store: str, tmp_path: Path) -> None:
    """Snapshots 4, 5 and 6 have the newer words; where all are damaged, the older words of 3 are used."""
    deleted, splits, captions = said(store)
    for name in ("000004", "000005", "000006"):
        flip_bit(Path(store, "index", name, "text/c/0"), 0)
    assert lost(repaired(store)) == ["captions of v0 (older ones are used)"]
    assert said(store) == (deleted, splits, captions | {"v0": ["old words of v0", "and more"]})
    assert snapshot_names(open_store(store)) == ["000001", "000002", "000003", "000007"]


@pytest.mark.parametrize("pruned", [False, True])
def test_a_deleted_list_that_cannot_be_told_is_named(store: str, pruned: bool) -> None:
    """Neither by itself, nor by what the snapshot left out."""
    delete_videos(store, ["v5"])
    name = StoreIndex(store).name
    captions = said(store)[2]
    if pruned:
        prune_store(store)
    for key in ("deleted/video_id", "video_id"):
        flip_bit(Path(store, "index", name, key, "c", "0"), 1)
    (line,) = lost(report := repaired(store))
    if pruned:
        assert line.startswith("its list of 2 deleted videos, and no older one is left: they are read again")
        assert StoreIndex(store).num_videos == 6
    else:
        assert line.startswith("its list of 2 deleted videos (that of snapshot 000006 with 1 is used")
        assert said(store)[0] == [b"v4"]
        assert said(store)[2] == captions
    assert "deletion" not in kept(report)[0]


def test_what_was_committed_since_does_not_hide_what_was_deleted(store: str) -> None:
    deleted, splits, captions = said(store)
    write_shards(store, {**CORPUS, "late": features("late", 9)})
    flip_bit(Path(store, "index", StoreIndex(store).name, "deleted/video_id/c/0"), 1)
    assert lost(repaired(store)) == []
    assert said(store) == (deleted, splits, captions)
    assert StoreIndex(store).find("late") >= 0


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("all_of_it", [False, True])
def test_a_damaged_tokenizer(store: str, all_of_it: bool, pruned: bool) -> None:
    deleted, splits, captions = said(store)
    name = StoreIndex(store).name
    if pruned:
        prune_store(store)
    folder = Path(store, "index", name, "tokenizer")
    flip_bit(folder / "tokenizer.json", 0)
    if all_of_it:
        flip_bit(folder / "vocab.txt", 200)
    report = repaired(store)
    if pruned and all_of_it:
        captions = {}
        assert lost(report) == ["its tokenizer, and with it all captions: write them again"]
    else:
        assert lost(report) == []
    assert said(store) == (deleted, splits, captions)


@pytest.mark.parametrize("pruned", [False, True])
def test_files_that_are_cut_or_lost(store: str, pruned: bool) -> None:
    deleted, splits, captions = said(store)
    folder = Path(store, "index", StoreIndex(store).name)
    if pruned:
        prune_store(store)
    text = (folder / "text/c/0").read_bytes()
    (folder / "text/c/0").write_bytes(text[:-1])
    (folder / "shard/c/0").unlink()
    report = repaired(store)
    used = "" if pruned else " (older ones are used)"
    assert lost(report) == [f"captions of v5{used}"]
    assert said(store) == (deleted, splits, {key: v for key, v in captions.items() if key != "v5" or not pruned})


@pytest.mark.parametrize("damage", ["lose", "cut"])
def test_quick_misses_no_file_that_is_lost_or_cut(store: str, damage: str) -> None:
    """Of the newest snapshot and of the older ones, and of all else; scratch files are none of the store's."""
    prune_store(store, keep=2)
    files = [path for path in Path(store).rglob("*") if path.is_file() and "_staging" not in path.parts]
    assert len(files) > 100
    for path in files:
        whole = path.read_bytes()
        if damage == "lose":
            path.unlink()
        else:
            path.write_bytes(whole[:-1])
        try:
            found = bool(verify_store(store).problems)
        except StoreError as error:  # of zarr.json, without which there is no store
            found = "verify --repair" in str(error)
        assert found, path
        path.write_bytes(whole)
    assert not verify_store(store).problems


@pytest.mark.parametrize("older", [False, True])
def test_quick_repairs_what_it_finds_missing(store: str, older: bool) -> None:
    """What follows from other files comes back as it was, and the snapshot stays."""
    before, names = said(store), snapshot_names(open_store(store))
    folder = Path(store, "index", names[-2 if older else -1])
    files = ("zarr.json", "splits/tr/video_id/zarr.json", "tokenizer/tokenizer.json", "tokenizer/vocab.txt")
    for file in files:
        whole = (folder / file).read_bytes()
        (folder / file).unlink()
        assert [problem.kind for problem in verify_store(store).problems] == ["metadata"]
        assert verify_store(store, repair=True).repaired == [f"wrote index/{folder.name}/{file} anew"]
        assert (folder / file).read_bytes() == whole
    assert snapshot_names(open_store(store)) == names
    shutil.rmtree(folder / "tokenizer")  # the parent has the same one
    assert [problem.where for problem in verify_store(store).problems] == [f"snapshot {folder.name}, tokenizer"]
    assert not verify_store(store, repair=True).problems
    assert said(store) == before


def test_a_snapshot_of_before_it_told_its_files(store: str) -> None:
    folder = Path(store, "index", StoreIndex(store).name)
    body = unseal((folder / "snapshot.json").read_bytes(), "")
    del body["files"]
    (folder / "snapshot.json").write_bytes(seal(body))
    (folder / "snapshot-copy.json").unlink()
    assert not verify_store(store, deep=True).problems
    assert not verify_store(store).problems
    (folder / "tokenizer/vocab.txt").unlink()
    assert [problem.kind for problem in verify_store(store).problems] == ["metadata"]


def test_a_damaged_snapshot_json_loses_what_it_told(store: str) -> None:
    name = StoreIndex(store).name
    for file in ("snapshot.json", "snapshot-copy.json"):
        flip_bit(Path(store, "index", name, file), 99)
    report = repaired(store)
    assert lost(report) == ["what was deleted, split and said in it (snapshot.json or LOCATION)"]
    assert "captions are those of snapshot 000005" in report.repaired
    assert said(store)[0] == []


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("damage", ["lost", "cut", "flipped"])
def test_snapshot_json_comes_back_from_its_copy(store: str, damage: str, pruned: bool) -> None:
    before, name = said(store), StoreIndex(store).name
    if pruned:
        prune_store(store)
    path = Path(store, "index", name, "snapshot.json")
    whole = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(whole[:-1]) if damage == "cut" else flip_bit(path, 99)
    assert [problem.where for problem in verify_store(store).problems] == [f"snapshot {name}"]
    report = verify_store(store, repair=True)
    assert not report.problems
    assert report.repaired == [f"made index/{name}/snapshot.json anew from its second copy"]
    assert path.read_bytes() == whole
    assert said(store) == before


def test_a_lost_snapshot_is_told_to_take_deletions_with_it(store: str) -> None:
    shutil.rmtree(Path(store, "index", StoreIndex(store).name))
    report = repaired(store)
    assert lost(report) == ["what was deleted, split and said in it (its folder is gone)"]
    assert said(store)[0] == []
    assert repaired(store).repaired == [], "it is said once"


def test_a_kill_before_the_damaged_one_is_taken_out(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted, splits, captions = said(store)
    name = StoreIndex(store).name
    prune_store(store)
    flip_bit(Path(store, "index", name, "text/c/0"), 0)
    with monkeypatch.context() as patch:
        patch.setattr(verify, "void_snapshot", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            verify_store(store, deep=True, repair=True)
    report = repaired(store)
    assert kept(report) == lost(report) == []
    assert snapshot_names(open_store(store)) == ["000007"]
    del captions["v0"]
    assert said(store) == (deleted, splits, captions)
    assert finalise(store) == "000007"


def test_prune_keeps_the_older_ones_where_the_newest_is_damaged(store: str) -> None:
    names = snapshot_names(open_store(store))
    for file in ("pending/tokens/c/0", "tokenizer/tokenizer.json"):
        path = Path(store, "index", names[-1], file)
        data = path.read_bytes()
        flip_bit(path, 0)
        for dry_run in (True, False):
            with pytest.raises(StoreError, match=r"nothing was removed.*vlm-dist store verify --deep --repair"):
                prune_store(store, keep=2, dry_run=dry_run)
        assert snapshot_names(open_store(store)) == names
        path.write_bytes(data)
    assert prune_store(store, keep=2).snapshots == names[:-2]


def test_the_snapshot_json_of_another_snapshot(store: str) -> None:
    """It is whole, and lies under a name that is not its own: the copy beside it counts, and is not written over."""
    before, names = said(store), snapshot_names(open_store(store))
    folder = Path(store, "index", names[-1])
    whole = (folder / "snapshot.json").read_bytes()
    shutil.copy(Path(store, "index", names[-2], "snapshot.json"), folder / "snapshot.json")
    with pytest.raises(StoreError, match=f"snapshot.json is that of snapshot {names[-2]}: a file was copied"):
        StoreIndex(store)
    assert [problem.where for problem in verify_store(store).problems] == [f"snapshot {names[-1]}"]
    report = verify_store(store, repair=True)
    assert report.problems == []
    assert report.repaired == [f"made index/{names[-1]}/snapshot.json anew from its second copy"]
    assert [(folder / file).read_bytes() for file in ("snapshot.json", "snapshot-copy.json")] == [whole, whole]
    assert said(store) == before


def nameless(folder: Path) -> bytes:
    """Makes a snapshot one of before it told its name."""
    body = unseal((folder / "snapshot.json").read_bytes(), "")
    del body["name"]
    for file in ("snapshot.json", "snapshot-copy.json"):
        (folder / file).write_bytes(seal(body))
    return seal(body)


@pytest.mark.parametrize("file", ["snapshot.json", "snapshot-copy.json"])
@pytest.mark.parametrize("other", [-1, 1])
def test_of_a_snapshot_without_its_name_the_arrays_decide(store: str, file: str, other: int) -> None:
    """The other one has a split less, or the deletion more; all arrays that it tells are there as it tells them."""
    names = snapshot_names(open_store(store))
    name = names[-1 if other < 0 else -2]
    for each in names:
        nameless(Path(store, "index", each))
    before, folder = said(store), Path(store, "index", name)
    whole = (folder / file).read_bytes()
    shutil.copy(Path(store, "index", names[names.index(name) + other], "snapshot.json"), folder / file)
    assert verify_store(store).problems
    report = verify_store(store, repair=True)
    assert report.problems == []
    assert snapshot_names(open_store(store)) == names
    assert [(folder / each).read_bytes() for each in ("snapshot.json", "snapshot-copy.json")] == [whole, whole]
    assert said(store) == before
    assert verify_store(store, deep=True, repair=True).repaired == []


def test_nothing_is_written_on_a_snapshot_json_that_its_copy_contradicts(store: str) -> None:
    """All arrays are as it says, and of the newest split it says nothing."""
    name_split(store, "more", ["v1"])
    old, new = (Path(store, "index", name) for name in snapshot_names(open_store(store))[-2:])
    before = said(store)
    for folder in (old, new):
        nameless(folder)
    shutil.copy(old / "snapshot.json", new / "snapshot.json")
    with pytest.raises(StoreError, match=r"snapshot\.json and snapshot-copy\.json beside it differ"):
        name_split(store, "again", ["v2"])
    assert verify_store(store, repair=True).problems == []
    assert said(store) == before


@pytest.mark.parametrize("damage", ["lost", *(pytest.param(how, marks=pytest.mark.slow) for how in ("cut", "another"))])
def test_a_location_is_made_anew(bucket: str, damage: str) -> None:
    root = make_store(f"{bucket}/store", {key: CORPUS[key] for key in IDS[:2]})
    name_split(root, "tr", ["v0"])
    delete_videos(root, ["v1"])
    storage, before, names = open_storage(root), said(root), snapshot_names(open_store(root))
    key = f"index/{names[-1]}/LOCATION"
    whole = unseal(storage.read(key), "")
    if damage == "lost":
        storage.remove(key)
    elif damage == "cut":
        change(root, key, lambda data: data[:-1])
    else:
        storage.replace(key, storage.read(f"index/{names[-2]}/LOCATION"))
    with pytest.raises(StoreError, match="verify --repair"):
        StoreIndex(root)
    assert verify_store(root).problems
    report = verify_store(root, repair=True)
    assert report.problems == []
    assert report.repaired == [f"made {key} anew from the objects that it names"]
    assert unseal(storage.read(key), "") == whole
    assert said(root) == before
    assert snapshot_names(open_store(root)) == names


@pytest.mark.slow
def test_the_snapshot_json_of_another_snapshot_in_a_bucket(bucket: str) -> None:
    """There, its LOCATION has the checksums of both."""
    root = make_store(f"{bucket}/store", {key: CORPUS[key] for key in IDS[:2]})
    name_split(root, "tr", ["v0"])
    delete_videos(root, ["v1"])
    storage, before, names = open_storage(root), said(root), snapshot_names(open_store(root))
    told = {key: storage.read(key) for key in storage.sizes("index") if key.endswith(("snapshot.json", "-copy.json"))}
    other = next(data for key, data in told.items() if key.startswith(f"index/{names[-2]}"))
    for key, whole in told.items():
        if key.startswith(f"index/{names[-1]}"):
            storage.replace(key, other)
            assert verify_store(root, deep=True).problems
            report = verify_store(root, repair=True)
            assert (report.problems, len(report.repaired)) == ([], 1)
            assert (storage.read(key), said(root)) == (whole, before)
            assert verify_store(root, deep=True, repair=True).repaired == []


@pytest.mark.parametrize("column", ["tok_ptr", "text"])
def test_captions_outlive_a_damage_after_another_tokenizer(store: str, column: str) -> None:
    """Texts of the damaged snapshot where they are sound, else of the one before, by the newest tokenizer."""
    *_, captions = said(store)
    write_captions(store, None, CaptionConfig(tokenizer="wordpiece:60"))
    newest = StoreIndex(store)
    sha256, tokens = newest.details["captions"]["tokenizer_sha256"], newest.tokens.tolist()
    Path(store, "index", newest.name, column, "c", "0").unlink()
    report = repaired(store)
    index = StoreIndex(store)
    assert index.details["captions"]["tokenizer_sha256"] == sha256
    assert said(store)[2] == captions
    assert index.tokens.tolist() == tokens
    assert any("(older ones are used)" in line for line in lost(report)) == (column == "text")
