"""Fixtures of the store's tests."""

import os
import subprocess
from collections.abc import Iterator
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
