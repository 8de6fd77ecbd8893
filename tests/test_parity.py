"""benchmarks/parity.py: passes on the reference's recordings, and sees one number that is wrong."""

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

FILES = ("ft_joint.npz", "ft_nlg.npz", "pretrain_mtm.npz", "dedup.json")


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], None]:
    """The script's main, asked for `tmp_path`."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.setattr("sys.argv", ["parity.py", str(tmp_path)])
    return importlib.import_module("parity").main


def test_the_recordings_pass_and_a_wrong_number_does_not(
    parity: Callable[[], None], shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in FILES:
        shutil.copy(shared / "golden" / name, tmp_path)
    shutil.copytree(shared / "golden" / "bert_tiny", tmp_path / "bert_tiny")
    parity()
    told = capsys.readouterr().out
    assert {name for name in FILES if f"| {name} | " in told} == set(FILES)
    assert "| NO |" not in told
    assert "| ft_nlg.npz | all of it | | | not built yet |" in told
    with np.load(tmp_path / "ft_joint.npz") as arrays:
        numbers = {key: arrays[key].copy() for key in arrays.files}
    numbers["out/test/pooled_text"].flat[-1] += 2e-5
    (tmp_path / "ft_joint.npz").unlink()
    np.savez(tmp_path / "ft_joint.npz", **numbers)
    with pytest.raises(SystemExit, match=r"1 of .* differ by more than is allowed"):
        parity()
    assert "| ft_joint.npz | pooled text | 2" in capsys.readouterr().out


def test_a_folder_without_recordings(parity: Callable[[], None]) -> None:
    with pytest.raises(SystemExit, match=r"holds none of s3d_io\.npz"):
        parity()
