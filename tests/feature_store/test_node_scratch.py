"""feature_store.node_scratch: temporary folders that a killed process does not leave for ever."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from feature_store import node_scratch
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
    """A $TMPDIR of its own, in which this process has made nothing yet."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(node_scratch, "_folders", {})
    return tmp_path


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
    assert len(list(tmp.iterdir())) == 2, "this process's folder and its lock"


def test_names_are_taken_once(tmp: Path) -> None:
    node_folder("a")
    with pytest.raises(FileExistsError):
        node_folder("a")
