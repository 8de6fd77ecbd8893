"""feature_store.spool: what is kept comes back bit for bit, or not at all."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from feature_store.config import ExtractConfig
from feature_store.layout import StoreMeta, create_store
from feature_store.plan import PlannedVideo
from feature_store.records import VideoRecord
from feature_store.spool import Spool
from tests.feature_store.store_tools import features, provenance


@pytest.fixture
def meta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreMeta:
    monkeypatch.setenv("FEATURE_STORE_CACHE", str(tmp_path / "cache"))
    return create_store(tmp_path / "store", provenance())


@pytest.fixture
def video(tmp_path: Path) -> PlannedVideo:
    (tmp_path / "a.mp4").write_bytes(b"a film")
    return PlannedVideo("a ü\n", str(tmp_path / "a.mp4"))


CFG = ExtractConfig()


def spool_of(meta: StoreMeta) -> Spool:
    return Spool(meta, CFG)


def kept(spool: Spool) -> list[Path]:
    return list(spool._folder.iterdir())


def put(spool: Spool, video: PlannedVideo) -> str:
    key = spool.key(video)
    spool.put(key, VideoRecord(video_id=video.video_id), features("v", 3))
    return key


def test_what_is_put_comes_back_until_it_is_dropped(meta: StoreMeta, video: PlannedVideo) -> None:
    rows = features("v", 7)
    record = VideoRecord(video_id=video.video_id, path=video.path, decoded_s=6.5, attempts=2)
    key = spool_of(meta).key(video)
    spool_of(meta).put(key, record, rows)
    got = spool_of(meta).get(spool_of(meta).key(video))
    assert got is not None
    assert got[0] == record
    assert got[1].dtype == np.float16
    assert np.array_equal(got[1].view("<u2"), rows.view("<u2"))
    assert spool_of(meta).get(spool_of(meta).key(PlannedVideo("b", video.path))) is None
    spool_of(meta).drop([key, "0" * 32, ""])
    assert spool_of(meta).get(key) is None
    assert not kept(spool_of(meta))


def test_another_file_or_store_or_way_to_encode_has_nothing(
    meta: StoreMeta, video: PlannedVideo, tmp_path: Path
) -> None:
    key = put(spool_of(meta), video)
    assert spool_of(meta).get(key) is not None
    other = provenance().model_copy(update={"weights_sha256": "0" * 64})
    exact = CFG.model_copy(update={"deterministic": True})
    for spool in (
        spool_of(create_store(tmp_path / "other", provenance())),
        spool_of(create_store(tmp_path / "third", other)),
        Spool(meta, exact),
    ):
        assert spool.key(video) == key
        assert spool.get(key) is None
    os.utime(video.path, (1, 1))
    assert spool_of(meta).key(video) != key
    Path(video.path).unlink()
    assert spool_of(meta).key(video) == ""
    put(spool_of(meta), video)
    assert spool_of(meta).get("") is None
    assert len(kept(spool_of(meta))) == 1


def test_a_file_that_is_replaced_while_it_is_decoded(meta: StoreMeta, video: PlannedVideo) -> None:
    spool = spool_of(meta)
    key = spool.key(video)
    Path(video.path).write_bytes(b"another film")
    spool.put(key, VideoRecord(video_id=video.video_id), features("v", 3))
    assert spool.get(spool.key(video)) is None


def test_every_damage_is_nothing(meta: StoreMeta, video: PlannedVideo) -> None:
    spool = spool_of(meta)
    key = put(spool, video)
    (path,) = kept(spool)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert spool.get(key) is None, f"byte {place}"
        path.write_bytes(whole[:place])
        assert spool.get(key) is None, f"cut at {place}"
    path.write_bytes(whole)
    assert spool.get(key) is not None


def test_a_disk_that_takes_nothing(video: PlannedVideo, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATURE_STORE_CACHE", str(small_disk))
    meta = create_store(Path(video.path).parent / "store", provenance())
    spool = spool_of(meta)
    key = spool.key(video)
    spool.put(key, VideoRecord(video_id=video.video_id), np.ones((9000, meta.feature_dim), np.float16))
    assert spool.get(key) is None
    assert not kept(spool)


def test_what_nobody_has_taken_for_a_week_is_removed(meta: StoreMeta, video: PlannedVideo, tmp_path: Path) -> None:
    spool = spool_of(meta)
    key = put(spool, video)
    fresh = put(spool, PlannedVideo("b", video.path))
    week = time.time() - 8 * 24 * 3600
    os.utime(spool._folder / key, (week, week))
    spool_of(create_store(tmp_path / "other", provenance()))
    assert spool.get(key) is None
    assert spool.get(fresh) is not None
    spool.drop([fresh])
    os.utime(spool._folder, (week, week))
    spool_of(create_store(tmp_path / "third", provenance()))
    assert not spool._folder.exists()
    assert put(spool, video), "a worker whose folder has gone goes on without it"
