"""feature_store.node_scratch: temporary folders that a killed process does not leave for ever."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from feature_store.node_scratch import node_folder, temporary_folder

MAKER = """
import sys
from feature_store.node_scratch import node_folder
(node_folder("attempt") / "shard").write_bytes(bytes(1000))
print("made", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a node's cache in which no process has made anything yet."""
    monkeypatch.setenv("FEATURE_STORE_CACHE", str(tmp_path))
    return tmp_path / "scratch"


def maker() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", MAKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "made\n"
    return process


def test_a_killed_process_is_swept_and_a_living_one_is_not(tmp: Path) -> None:
    killed, living = maker(), maker()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(list(tmp.glob("*/attempt/shard"))) == 2
    with temporary_folder() as folder:
        assert folder.is_relative_to(tmp)
        assert len(list(tmp.glob("*/attempt/shard"))) == 1
    assert not folder.exists()
    living.communicate("")
    assert living.returncode == 0
    assert not list(tmp.glob("*/attempt"))
    assert len(list(tmp.iterdir())) == 1, "this process's folder"


def test_names_are_taken_once(tmp: Path) -> None:
    node_folder("a")
    with pytest.raises(AssertionError, match="in use"):
        node_folder("a")
