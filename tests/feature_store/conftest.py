"""Fixtures of the store's tests."""

import json
from pathlib import Path

import numpy as np
import pytest

from feature_store.captions import write_captions
from feature_store.config import CaptionConfig
from tests.feature_store.store_tools import make_store, random_corpus


@pytest.fixture
def corpus() -> dict[str, np.ndarray | None]:
    """Thirty videos of up to 600 rows, one of them failed."""
    return {**random_corpus(30), "broken": None}


@pytest.fixture
def store(tmp_path: Path, corpus: dict[str, np.ndarray | None]) -> Path:
    """A finished store of the corpus, without captions."""
    return make_store(tmp_path / "store", corpus)


@pytest.fixture
def narrated(tmp_path: Path, store: Path, corpus: dict[str, np.ndarray | None]) -> Path:
    """The finished store with captions for every video and one that waits."""
    captions = {
        video_id: {"start": [0, 0.5], "end": [0.7, 1.5], "text": ["now cut it", f"see {video_id}"]}
        for video_id in [*corpus, "waits"]
    }
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    write_captions(store, tmp_path / "captions.json", CaptionConfig(tokenizer="wordpiece:100"))
    return store
