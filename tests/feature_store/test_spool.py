"""feature_store.spool: what is kept comes back bit for bit, or not at all."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

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


def kept(spool: Spool) -> list[Path]:
    return list(spool._folder.iterdir())


def test_what_is_put_comes_back_until_it_is_dropped(meta: StoreMeta, video: PlannedVideo) -> None:
    rows = features("v", 7)
    record = VideoRecord(video_id=video.video_id, path=video.path, decoded_s=6.5, attempts=2)
    Spool(meta).put(video, record, rows)
    got = Spool(meta).get(video)
    assert got is not None
    assert got[0] == record
    assert got[1].dtype == np.float16
    assert np.array_equal(got[1].view("<u2"), rows.view("<u2"))
    assert Spool(meta).get(PlannedVideo("b", video.path)) is None
    Spool(meta).drop([video, PlannedVideo("b", "gone.mp4")])
    assert Spool(meta).get(video) is None
    assert not kept(Spool(meta))


def test_another_file_or_store_or_encoder_has_nothing(meta: StoreMeta, video: PlannedVideo, tmp_path: Path) -> None:
    Spool(meta).put(video, VideoRecord(video_id=video.video_id), features("v", 3))
    other = provenance().model_copy(update={"weights_sha256": "0" * 64})
    assert Spool(create_store(tmp_path / "other", provenance())).get(video) is None
    assert Spool(create_store(tmp_path / "third", other)).get(video) is None
    os.utime(video.path, (1, 1))
    assert Spool(meta).get(video) is None
    Path(video.path).unlink()
    assert Spool(meta).get(video) is None
    Spool(meta).put(video, VideoRecord(video_id=video.video_id), features("v", 3))  # of a file that has gone: nothing
    assert len(kept(Spool(meta))) == 1


def test_every_damage_is_nothing(meta: StoreMeta, video: PlannedVideo) -> None:
    spool = Spool(meta)
    spool.put(video, VideoRecord(video_id=video.video_id), features("v", 2))
    (path,) = kept(spool)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert spool.get(video) is None, f"byte {place}"
        path.write_bytes(whole[:place])
        assert spool.get(video) is None, f"cut at {place}"
    path.write_bytes(whole)
    assert spool.get(video) is not None


def test_a_disk_that_takes_nothing(video: PlannedVideo, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATURE_STORE_CACHE", str(small_disk))
    meta = create_store(Path(video.path).parent / "store", provenance())
    spool = Spool(meta)
    spool.put(video, VideoRecord(video_id=video.video_id), np.ones((9000, meta.feature_dim), np.float16))
    assert spool.get(video) is None
    assert not kept(spool)


def test_what_nobody_goes_on_with_is_removed(meta: StoreMeta, video: PlannedVideo, tmp_path: Path) -> None:
    spool = Spool(meta)
    spool.put(video, VideoRecord(video_id=video.video_id), features("v", 2))
    week = time.time() - 8 * 24 * 3600
    os.utime(spool._folder, (week, week))
    Spool(create_store(tmp_path / "other", provenance()))
    assert not spool._folder.exists()
    spool.put(video, VideoRecord(video_id=video.video_id), features("v", 2))  # by a worker that was at it all the same
    assert spool.get(video) is None
