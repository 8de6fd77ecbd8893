"""What this machine needs for the work, checked one by one; each finding says what to do."""

import contextlib
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from cluster.resources import this_machine

_LIBRARIES = ("torch", "transformers", "tokenizers", "ray", "deepspeed", "zarr", "mlflow")
_MEMORY_GIB, _SHM_MIB, _DISK_GIB = 8, 512, 10


@dataclass(frozen=True)
class Check:
    """One finding: `missing` makes the doctor fail, `warning` does not."""

    name: str
    state: Literal["ok", "warning", "missing"]
    found: str
    advice: str = ""

    def as_json(self) -> dict[str, str]:
        """Plain values for `--json`."""
        return {"name": self.name, "state": self.state, "found": self.found, "advice": self.advice}


def check_machine(workspace: Path) -> Iterator[Check]:
    """Python, libraries, processors, memory, disk, compiler, decoder."""
    yield Check("Python", "ok", platform.python_version())
    yield from (_library(name) for name in _LIBRARIES)
    yield _decoder()
    yield _compiler()
    yield _gpus()
    yield _memory()
    yield from _shared_memory()
    yield _disk(workspace)


def _library(name: str) -> Check:
    try:
        return Check(name, "ok", version(name))
    except PackageNotFoundError:
        return Check(name, "missing", "not installed", "install vlm-dist with its dependencies: `pip install vlm-dist`")


def _decoder() -> Check:
    try:
        import av
    except ImportError as error:
        return Check("video decoder", "missing", str(error), "`pip install av` brings PyAV with its own FFmpeg")
    codec = ".".join(str(part) for part in av.library_versions.get("libavcodec", ()))
    return Check("video decoder", "ok", f"PyAV {av.__version__}, libavcodec {codec}")


def _compiler() -> Check:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "")
    if not shutil.which(compiler):
        return Check(
            "C++ compiler", "missing", "none", "DeepSpeed builds its optimiser once: `apt-get install g++` or its like"
        )
    if importlib.util.find_spec("ninja") is None and not shutil.which("ninja"):
        return Check("C++ compiler", "missing", f"{compiler}, but no ninja", "`pip install ninja`")
    return Check("C++ compiler", "ok", compiler)


def _gpus() -> Check:
    import torch

    machine = this_machine()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return Check("GPUs", "ok", f"{len(names)}: {', '.join(sorted(set(names)))}, CUDA {torch.version.cuda}")
    if machine.gpus:
        build = torch.version.cuda or "CPU"
        return Check(
            "GPUs", "missing", f"{len(machine.gpus)} there, but torch ({build} build) cannot use them",
            "install a torch build for this driver's CUDA version",
        )  # fmt: skip
    return Check("GPUs", "warning", "none", "small models train on CPUs (`--gpus 0 --workers 2`); BERT-base wants GPUs")


def _memory() -> Check:
    machine = this_machine()
    found = f"{machine.memory_gib:.0f} GiB, {machine.cpus} CPUs"
    if machine.memory_gib < _MEMORY_GIB:
        return Check("memory", "warning", found, f"with less than {_MEMORY_GIB} GiB keep models and batches small")
    return Check("memory", "ok", found)


def _shared_memory() -> Iterator[Check]:
    if not os.path.isdir("/dev/shm"):
        return
    free = shutil.disk_usage("/dev/shm").free / 2**20
    found = f"{free:,.0f} MiB free in /dev/shm"
    if free < _SHM_MIB:
        yield Check("shared memory", "warning", found, "Ray and NCCL use it; in Docker give `--shm-size=2g`")
    else:
        yield Check("shared memory", "ok", found)


def _disk(workspace: Path) -> Check:
    free = shutil.disk_usage(workspace).free / 2**30
    found = f"{free:,.1f} GiB free at {workspace}"
    try:
        with contextlib.closing(tempfile.TemporaryFile(dir=workspace)):
            pass
    except OSError as error:
        return Check("workspace", "missing", f"{workspace}: {error.strerror}", "take a folder that you may write to")
    if free < _DISK_GIB:
        return Check("workspace", "warning", found, "a store takes 1 KiB per second of video, a BERT-base run 4 GiB")
    return Check("workspace", "ok", found)
