"""Captions from pickles: HowTo100M's forms give what raw_caption.json gives; word-piece ids give their words."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_store.caption_files import iter_captions
from feature_store.captions import write_captions
from feature_store.config import CaptionConfig
from feature_store.index import StoreIndex
from feature_store.tokenizer import Tokenizer, train_wordpiece
from vlm_dist.errors import ConfigError, StoreError

RAW: dict[str, dict[str, list[Any]]] = {
    "video-000": {"start": [0.5, 2.0], "end": [1.5, 4.25], "text": ["cut the onion", "don't stir, it's ö!"]},
    "video-001": {"start": [1.0, 2], "end": [2.0, 3], "text": ["unheard of", None]},
    "video-002": {"start": [], "end": [], "text": []},
}
LINES = [text for entry in RAW.values() for text in entry["text"] if text]


def write(path: Path, value: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("form", ["json strings", "objects", "arrays"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_gives_what_the_json_gives(tmp_path: Path, form: str, protocol: int) -> None:
    (tmp_path / "raw_caption.json").write_text(json.dumps(RAW))
    values: dict[str, Any] = {
        "json strings": {video_id: json.dumps(entry) for video_id, entry in RAW.items()},
        "objects": RAW,
        "arrays": {
            video_id: {
                "start": np.array(entry["start"], float),
                "end": [np.float64(end) for end in entry["end"]],
                "text": np.array(entry["text"], object),
            }
            for video_id, entry in RAW.items()
        },
    }
    file = write(tmp_path / "raw_caption.pkl", values[form], protocol)
    assert list(iter_captions(file, allow_pickle=True)) == list(iter_captions(tmp_path / "raw_caption.json"))


def test_a_store_takes_them_and_then_nothing_changes(store: Path, tmp_path: Path) -> None:
    file, cfg = write(tmp_path / "c.pickle", RAW), CaptionConfig(tokenizer="wordpiece:80")
    with pytest.raises(ConfigError, match="--allow-pickle"):
        write_captions(store, file, cfg)
    report = write_captions(store, file, cfg, allow_pickle=True)
    assert (report.clips, report.dropped_text, report.changed) == (3, 1, True)
    assert StoreIndex(store).clip_text(1) == "don't stir, it's ö!"
    assert not write_captions(store, file, cfg, allow_pickle=True).changed


def test_word_piece_ids_give_words_that_give_the_ids(tmp_path: Path) -> None:
    tokenizer = train_wordpiece(LINES, 60)
    unknown = [tokenizer.unk_id, *tokenizer.encode("cut it")]
    ids = [tokenizer.encode(line) for line in ("don't stir, it's ö!", "thecut other on", "")]
    entry = {"start": [0, 1, 2, 3], "end": [1, 2, 3, 4], "cap": [*ids[:2], np.array(ids[2], np.int32), unknown]}
    file = write(tmp_path / "raw_caption_dedup.bert-base-uncased.pkl", {"v": entry})
    [captions] = iter_captions(file, True, tokenizer)
    assert captions.texts[0] == "don ' t stir , it ' s o !"
    assert [tokenizer.encode(text) for text in captions.texts] == [*ids, unknown[1:]]
    with pytest.raises(ConfigError, match="the tokenizer that made them"):
        list(iter_captions(file, True))
    small = Tokenizer(tokenizer.pieces[:20])
    with pytest.raises(StoreError, match="not ids below 20"):
        list(iter_captions(file, True, small))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1], "holds a list"),
        ({1: {}}, "the keys must be video ids"),
        ({"v": "{"}, "not JSON"),
        ({"v": 3}, "not an object"),
        ({"v": {"start": [1], "end": [2]}}, "no list 'text'"),
        ({"v": {"start": [1], "end": [2], "text": ["a", "b"]}}, "1 starts, 1 ends and 2 texts"),
        ({"v": {"start": [1], "end": [2], "cap": [["a"]]}}, "not ids below"),
        ({"v": {"start": [1], "end": [2], "cap": 5}}, "0 texts"),
    ],
)
def test_other_content_is_one_error(tmp_path: Path, content: Any, words: str) -> None:
    file = write(tmp_path / "c.pkl", content)
    with pytest.raises(StoreError, match=words):
        list(iter_captions(file, True, train_wordpiece(LINES, 60)))
