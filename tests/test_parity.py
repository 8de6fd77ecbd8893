"""benchmarks/parity.py: passes on the reference's recordings, and sees one number that is wrong."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "parity.py"
FILES = ("ft_joint.npz", "ft_nlg.npz", "pretrain_mtm.npz", "dedup.json")


def parity(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, check=False)


def test_the_recordings_pass_and_a_wrong_number_does_not(shared: Path, tmp_path: Path) -> None:
    for name in FILES:
        shutil.copy(shared / "golden" / name, tmp_path)
    shutil.copytree(shared / "golden" / "bert_tiny", tmp_path / "bert_tiny")
    done = parity(tmp_path)
    assert done.returncode == 0, done.stderr
    assert {name for name in FILES if f"| {name} | " in done.stdout} == set(FILES)
    assert "| NO |" not in done.stdout
    assert "| ft_nlg.npz | all of it | | | not built yet |" in done.stdout
    with np.load(tmp_path / "ft_joint.npz") as arrays:
        numbers = {key: arrays[key].copy() for key in arrays.files}
    numbers["out/test/pooled_text"].flat[-1] += 2e-5
    (tmp_path / "ft_joint.npz").unlink()
    np.savez(tmp_path / "ft_joint.npz", **numbers)
    done = parity(tmp_path)
    assert done.returncode == 1
    assert "1 of " in done.stderr
    assert "| ft_joint.npz | pooled text | 2" in done.stdout


def test_a_folder_without_recordings(tmp_path: Path) -> None:
    done = parity(tmp_path)
    assert done.returncode == 1
    assert "holds none of s3d_io.npz" in done.stderr
