"""feature_store.show: what a store knows of one video, whatever became of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from feature_store.captions import write_captions
from feature_store.config import CaptionConfig
from feature_store.layout import create_store
from feature_store.marks import delete_videos
from feature_store.plan import PlannedVideo, plan_videos
from feature_store.show import video_facts
from feature_store.snapshot import finalise
from tests.feature_store.store_tools import features, make_store, provenance, write_shards
from vlm_dist.errors import StoreError


def test_every_state_of_a_video(place: str, tmp_path: Path) -> None:
    corpus: dict[str, np.ndarray | None] = {"good": features("good", 20), "bad": None, "Ü b": features("Ü b", 9)}
    make_store(place, corpus)
    told = {"good": {"start": [1.0, 2.0], "end": [2.0, 30.0], "text": ["cut it", "stir that"]}}
    (tmp_path / "captions.json").write_text(json.dumps(told))
    write_captions(place, tmp_path / "captions.json", CaptionConfig(tokenizer="wordpiece:60"))
    plan_videos(place, [PlannedVideo("new", "new.mp4")], 1)

    good = video_facts(place, "good")
    assert (good["state"], good["shard"], good["record"]["n_rows"], good["record"]["decoded_s"]) == ("ok", 0, 20, 20.0)
    assert good["provenance"] == provenance().model_dump(mode="json")
    assert good["captions"] == [
        {"start_ms": 1000, "end_ms": 2000, "text": "cut it"},
        {"start_ms": 2000, "end_ms": 20000, "text": "stir that"},
    ]
    bad = video_facts(place, "bad")
    assert (bad["state"], bad["record"]["reason"], bad["captions"]) == ("failed", "corrupt", [])
    assert video_facts(place, "Ü b")["record"]["path"] == "videos/Ü b.mp4"
    new = video_facts(place, "new")
    assert (new["state"], new["shard"], new["record"]) == ("open", None, None)
    delete_videos(place, ["good"])
    gone = video_facts(place, "good")
    assert (gone["state"], gone["record"]["n_rows"]) == ("deleted", 20)
    with pytest.raises(StoreError, match="never heard of a video 'Good'"):
        video_facts(place, "Good")


def test_before_the_first_snapshot(tmp_path: Path) -> None:
    create_store(tmp_path, provenance(), 256)
    corpus: dict[str, np.ndarray | None] = {"a": features("a", 200), "b": features("b", 200)}
    write_shards(tmp_path, corpus)
    assert video_facts(tmp_path, "a")["state"] == "ok"
    b = video_facts(tmp_path, "b")
    assert (b["state"], b["shard"]) == ("ok", 1), "it overflowed the first shard"
    finalise(tmp_path)
    assert video_facts(tmp_path, "b") == b
