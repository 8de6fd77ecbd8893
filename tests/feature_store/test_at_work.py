"""feature_store.at_work: a repair is refused while anybody writes to the store, in a folder and in a bucket."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from feature_store import snapshot
from feature_store.at_work import REPAIR, SNAPSHOT, at_work, require_no_writers
from feature_store.captions import write_captions
from feature_store.config import CaptionConfig, ImportConfig
from feature_store.files import SCRATCH
from feature_store.import_arrays import ImportState, import_arrays
from feature_store.import_sources import ArraySources
from feature_store.layout import StoreMeta, create_store, open_store
from feature_store.marks import name_split
from feature_store.prune import prune_store
from feature_store.snapshot import finalise
from feature_store.storage import open_storage
from feature_store.verify import verify_store
from feature_store.writer import ShardAttempt
from tests.feature_store.store_tools import features, make_store, provenance
from vlm_dist.errors import StoreError


@pytest.fixture
def place(long_place: str) -> str:
    """A folder, and (slow) a bucket."""
    return long_place


@pytest.fixture
def meta(place: str) -> StoreMeta:
    """An empty store."""
    return create_store(place, provenance(), 1024)


def test_a_repair_waits_for_a_writer(meta: StoreMeta) -> None:
    attempt = ShardAttempt(meta.root, 0)
    with at_work(meta, "store import") as name:
        assert meta.storage.names(SCRATCH).count(name) == 1
        with pytest.raises(StoreError, match=r"store import \(process \d+ on .*s ago\. Wait until .* in a minute"):
            verify_store(meta.root, repair=True)
        assert verify_store(meta.root).problems == [], "a look is always possible"
        require_no_writers(meta, but=name)
    assert meta.storage.names(SCRATCH) == ([attempt._folder.name] if meta.storage.local("") else [])
    assert verify_store(meta.root, repair=True).problems == []
    attempt.abandon()


def test_two_repairs_at_once(meta: StoreMeta, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(*_: object) -> None:
        with pytest.raises(StoreError, match="verify --repair"):
            verify_store(meta.root, repair=True)

    monkeypatch.setattr("feature_store.inspection.Inspection.run", second)
    monkeypatch.setattr("feature_store.verify.repair_store", lambda *_: [])
    verify_store(meta.root, repair=True)


def test_a_writer_that_came_while_the_store_was_looked_at(meta: StoreMeta, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as began:
        monkeypatch.setattr(
            "feature_store.inspection.Inspection.run", lambda _: began.enter_context(at_work(meta, "extract"))
        )
        with pytest.raises(StoreError, match=r"is being written to: extract"):
            verify_store(meta.root, repair=True)


def test_what_a_note_says_and_how_old_it_is(meta: StoreMeta) -> None:
    key = f"{SCRATCH}/writer.{'7' * 32}.json"
    note = json.dumps({"who": "extract (process 7 on a node)"}).encode()
    meta.storage.replace(key, note)
    with pytest.raises(StoreError, match=r"extract \(process 7 on a node\) gave a sign of life 0 s ago"):
        verify_store(meta.root, repair=True)
    report = verify_store(meta.root, repair=True, writers_gone=True)
    assert report.repaired == [f"removed unfinished writer.{'7' * 32}.json", *report.repaired[1:]]
    # The place's clock counts.
    meta.storage.replace(key, note)
    if (path := meta.storage.local(key)) is not None:
        os.utime(path, (time.time() - 61,) * 2)
        assert f"removed unfinished writer.{'7' * 32}.json" in verify_store(meta.root, repair=True).repaired
    meta.storage.remove(key)
    for damaged in (b"", b"[1]", b"\xff"):
        meta.storage.replace(key, damaged)
        require_no_writers(meta)


KILLED = """
import sys
import time
from feature_store.at_work import at_work
from feature_store.layout import open_store
with at_work(open_store(sys.argv[1]), "captions"):
    print("writing", flush=True)
    time.sleep(600)
"""


def test_a_writer_that_was_killed(meta: StoreMeta, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, meta.root], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(StoreError, match="--writers-gone"):
        verify_store(meta.root, repair=True)
    with monkeypatch.context() as patch:
        patch.setattr("feature_store.at_work.QUIET_S", 0.0)  # a minute later
        (line, *_) = verify_store(meta.root, repair=True).repaired
    assert line.startswith("removed unfinished writer.")
    assert not meta.storage.names(SCRATCH)


def test_a_sign_is_given_again_and_again(meta: StoreMeta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_store.at_work._BEAT_S", 0.02)
    with at_work(meta, "captions") as name:
        first = meta.storage.changed(f"{SCRATCH}/{name}")
        until = time.monotonic() + 30
        while meta.storage.changed(f"{SCRATCH}/{name}") == first:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert not meta.storage.names(SCRATCH)


def refused(root: str) -> None:
    with pytest.raises(StoreError, match="is being written to"):
        verify_store(root, repair=True)


def test_an_import_shows_that_it_is_at_work(place: str, tmp_path: Path) -> None:
    (tmp_path / "arrays").mkdir()
    for name in ("a", "b"):
        np.save(tmp_path / "arrays" / f"{name}.npy", features(name, 9, 512))
    seen: list[int] = []

    def look(state: ImportState) -> None:
        refused(place)
        seen.append(state.ok)

    import_arrays(place, ArraySources([tmp_path / "arrays"]), ImportConfig(), on_progress=look)
    assert len(seen) == 2
    assert verify_store(place, deep=True, repair=True).repaired == []


def test_captions_show_that_they_are_at_work(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(place, {"v": features("v", 5)})
    (tmp_path / "c.json").write_text(json.dumps({"v": {"start": [0], "end": [1], "text": ["now cut"]}}))
    seen: list[str] = []

    def look(root: str) -> str:
        refused(root)
        seen.append(root)
        return finalise(root)

    monkeypatch.setattr("feature_store.captions.finalise", look)
    write_captions(place, tmp_path / "c.json", CaptionConfig(tokenizer="wordpiece:60"))
    assert seen == [place]
    assert not open_storage(place).names(SCRATCH)


def test_a_snapshot_in_work_shows_it(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write = snapshot._write
    seen: list[str] = []

    def look(meta: StoreMeta, *rest: object) -> None:
        refused(meta.root)
        seen.append(meta.root)
        write(meta, *rest)

    monkeypatch.setattr(snapshot, "_write", look)
    make_store(place, {"v": features("v", 5)})
    assert seen == [open_store(place).root]


def test_no_writer_begins_beside_a_repair(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process repairs: whoever begins to write is told, and what the repair does itself goes on."""
    root = make_store(place, {"v": features("v", 5)})
    (tmp_path / "c.json").write_text(json.dumps({"v": {"start": [0], "end": [1], "text": ["now cut"]}}))
    np.save(tmp_path / "w.npy", features("w", 9, 512))
    with at_work(open_store(root), REPAIR), monkeypatch.context() as patch:
        assert finalise(root) == "000001"
        patch.setattr("feature_store.at_work._mine", set())
        for begin in (
            lambda: name_split(root, "s", ["v"]),
            lambda: write_captions(root, tmp_path / "c.json", CaptionConfig(tokenizer="wordpiece:60")),
            lambda: prune_store(root),
        ):
            with pytest.raises(StoreError, match=r"is being repaired: store verify --repair .*Wait until it is done"):
                begin()
    assert name_split(root, "s", ["v"]).changed == 1


def test_a_snapshot_whose_folder_is_deleted_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_store(str(tmp_path / "store"), {"v": features("v", 5)})
    write = snapshot._write

    def delete(meta: StoreMeta, folder: Path, *rest: object) -> None:
        write(meta, folder, *rest)
        meta.storage.remove(f"{SCRATCH}/{folder.name}")

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "_write", delete)
        with pytest.raises(StoreError, match=r"in which a snapshot was made, was deleted .* the same command again"):
            name_split(root, "s", ["v"])
    assert not open_storage(root).names(SCRATCH)
    assert not verify_store(root, deep=True).problems
    assert name_split(root, "s", ["v"]).changed == 1


def test_prune_waits_for_a_snapshot_and_not_for_an_extraction(meta: StoreMeta) -> None:
    finalise(meta.root)
    with at_work(meta, "extract"):
        assert prune_store(meta.root).snapshots == []
    with at_work(meta, SNAPSHOT), pytest.raises(StoreError, match=r"is being written to: a snapshot \(process"):
        prune_store(meta.root)
