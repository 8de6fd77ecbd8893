"""Fixtures of the store's tests."""

from pathlib import Path

import numpy as np
import pytest

from tests.feature_store.store_tools import make_store, random_corpus


@pytest.fixture
def corpus() -> dict[str, np.ndarray | None]:
    """Thirty videos of up to 600 rows, one of them failed."""
    return {**random_corpus(30), "broken": None}


@pytest.fixture
def store(tmp_path: Path, corpus: dict[str, np.ndarray | None]) -> Path:
    """A finished store of the corpus, without captions."""
    return make_store(tmp_path / "store", corpus)
