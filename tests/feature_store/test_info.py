"""`store info` and `store failures`: what they count, and how they say that the counts can't be right."""

import json
from pathlib import Path

import numpy as np
import pytest

from feature_store.commit import void
from feature_store.index import StoreIndex
from feature_store.info import failures, store_info
from feature_store.layout import open_store, shard_key
from feature_store.local_storage import LocalStorage
from tests.feature_store.store_tools import make_store

Corpus = dict[str, np.ndarray | None]


def test_info_and_failures(narrated: Path, corpus: Corpus) -> None:
    info = store_info(narrated)
    assert json.loads(json.dumps(info)) == info
    rows = sum(len(rows) for rows in corpus.values() if rows is not None)
    assert info["videos"] == {"planned": 31, "ok": 30, "failed": 1, "open": 0, "deleted": 0}
    assert (info["rows"], info["hours"], info["failures"]) == (rows, rows / 3600, {"corrupt": 1})
    index = StoreIndex(narrated)
    assert (info["clips"], info["tokens"], info["snapshot"]) == (index.num_clips, index.num_tokens, index.name)
    assert (info["captions_without_video"], info["fingerprint"]) == (2, index.fingerprint)
    assert info["provenance"]["weights"] == "random seed 0"
    (failed,) = failures(narrated)
    assert (failed.video_id, failed.reason, failed.path) == ("broken", "corrupt", "videos/broken.mp4")
    void(open_store(narrated), 0)
    assert store_info(narrated)["videos"]["open"] > 0


def test_info_of_an_empty_store(tmp_path: Path) -> None:
    info = store_info(make_store(tmp_path / "store", {}))
    assert (info["videos"]["planned"], info["clips"], info["tokenizer"]) == (0, 0, None)


def test_info_reads_every_record_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, keys = LocalStorage.read, list[str]()

    def counted(self: LocalStorage, key: str) -> bytes:
        keys.append(key)
        return read(self, key)

    monkeypatch.setattr(LocalStorage, "read", counted)
    shards = store_info(store)["shards"]
    once = [key for key in keys if key.startswith(("_commits/", "_plan/"))]
    assert len(once) == len(set(once))
    assert shards == {"planned": 16, "committed": len([key for key in once if key.startswith("_commits/")])}


def test_info_names_shards_that_are_missing(narrated: Path) -> None:
    assert store_info(narrated)["damage"] == []
    (narrated / shard_key(0)).unlink()
    assert "the first of shard 0" in store_info(narrated)["damage"][0]
