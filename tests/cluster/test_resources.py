"""Which GPUs a machine lets its runs see, asked of a real (if simple) nvidia-smi."""

import time
from pathlib import Path

import pytest

from cluster.resources import this_machine

ANSWER = """#!/bin/sh
echo asked >> "$0.log"
echo "NVIDIA A100, GPU-aaaa-1"
echo "NVIDIA H100, GPU-bbbb-2"
echo "NVIDIA H100, GPU-bbcc-3"
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program, first on the path, and a machine that nobody has asked yet."""
    program = tmp_path / "nvidia-smi"
    program.write_text(ANSWER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    this_machine.cache_clear()
    return program


@pytest.fixture(autouse=True)
def forget() -> None:
    yield
    this_machine.cache_clear()


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, "AHH"), ("", ""), ("-1", ""), ("0", "A"), ("2,0", "HA"), ("0,-1,1", "A"), ("7", ""), ("0,7,1", "A"),
        ("1,1", ""), ("0,1,0", ""), ("GPU-bbcc", "H"), ("GPU-aaaa-1,2", "AH"), ("GPU-bbcc,GPU-bbcc-3", ""),
        ("0, 1", "AH"), ("NoDevFiles", ""), ("MIG-1,MIG-2", "MM"),
    ],
)  # fmt: skip
def test_visible_gpus_by_cudas_rules(
    smi: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, names: str
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert "".join(name.removeprefix("NVIDIA ")[0] for name in this_machine().gpus) == names


def test_a_hanging_nvidia_smi_is_given_up_once(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi.write_text(ANSWER + "exec sleep 60\n")
    monkeypatch.setattr("cluster.resources._PATIENCE_S", 0.5)
    started = time.monotonic()
    assert this_machine().gpus == this_machine().gpus == ()
    assert time.monotonic() - started < 10
    assert Path(f"{smi}.log").read_text().count("asked") == 1
