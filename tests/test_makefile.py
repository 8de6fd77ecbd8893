"""What `make` says where it cannot begin."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("#!/bin/sh\nexit 127\n", "python is there and cannot be started"),
        ("#!/no/such/interpreter\n", "python is there and cannot be started"),
        ('#!/bin/sh\ncase "$2" in *version_info*) exit 1;; esac\necho Python 3.9\n', "Python 3.9 is too old"),
    ],
)
def test_a_python_that_is_of_no_use_is_named_for_what_it_is(tmp_path: Path, python: str, said: str) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    program = tmp_path / "python"
    program.write_text(python)
    program.chmod(0o755)
    command = ["make", f"PYTHON={program}", "setup"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stdout
    assert ("is too old" in done.stdout) == ("too old" in said)
