"""What this machine and a Ray cluster have, and whether what was asked for can ever fit."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from vlm_dist.errors import ConfigError

_PATIENCE_S = 5.0  # nvidia-smi takes a second; a broken driver lets it hang


@dataclass(frozen=True)
class Machine:
    """This machine as a run may use it (container limits respected)."""

    cpus: int
    memory_gib: float
    gpus: tuple[str, ...]

    def __str__(self) -> str:
        kinds = ", ".join(f"{self.gpus.count(name)} x {name}" for name in dict.fromkeys(self.gpus)) or "no GPU"
        return f"{kinds}, {self.cpus} CPUs, {self.memory_gib:.0f} GiB"


@cache
def this_machine() -> Machine:
    """CPUs, memory and GPUs of this machine, without importing torch."""
    return Machine(_cpus(), _memory_bytes() / 2**30, _gpus())


@dataclass(frozen=True)
class NodeResources:
    """CPUs and GPUs of one Ray node."""

    cpus: float
    gpus: float


def check_request(have: list[NodeResources], nodes: int, gpus_per_node: int, workers: int) -> None:
    """Refuse a request for training workers that can never fit.

    Args:
        have: The nodes of the cluster (`ray_nodes()`).
        nodes: Machines asked for.
        gpus_per_node: GPUs asked for on each; 0 trains on CPUs.
        workers: CPU workers asked for in all when `gpus_per_node` is 0.

    Raises:
        ConfigError: What is there, and what to type.
    """
    cpus, gpus = sum(node.cpus for node in have), sum(node.gpus for node in have)
    place = "this machine has" if len(have) == 1 else f"the {len(have)} nodes of the cluster have"
    there = f"{place} {gpus:g} GPUs and {cpus:g} CPUs"
    if nodes < 1 or gpus_per_node < 0 or workers < 0:
        raise ConfigError(f"--nodes {nodes} --gpus {gpus_per_node} --workers {workers}: give at least one node")
    fitting = [node for node in have if node.gpus >= gpus_per_node]
    if gpus_per_node == 0 and workers > cpus:
        raise ConfigError(f"{workers} workers need {workers} CPUs, and {there}; type `--workers {cpus:g}`")
    if len(fitting) >= nodes:
        return
    if gpus_per_node == 0:
        instead = f"type `--nodes {len(have)} --gpus 0 --workers {workers}`"
    elif gpus == 0:
        instead = f"type `--gpus 0 --workers {min(2, int(cpus)) or 1}` to train on CPUs (small models only)"
    else:
        most = max(int(node.gpus) for node in have)
        per_node = min(gpus_per_node, most)
        instead = f"type `--nodes {sum(node.gpus >= per_node for node in have)} --gpus {per_node}`"
    asked = f"{nodes} node{'s' * (nodes != 1)}" + (f" with {gpus_per_node} GPUs each" if gpus_per_node else "")
    raise ConfigError(f"asked for {asked}, and {there}; {instead}, or set cluster.ray_address to a larger cluster")


def _cpus() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            allowed = min(allowed, max(1, int(limit) // int(period)))
    return allowed


def _memory_bytes() -> int:
    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        total = min(total, int(text))
    return total


def _gpus() -> tuple[str, ...]:
    """Names of the NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "" or not shutil.which("nvidia-smi"):
        return ()
    query = ["nvidia-smi", "--query-gpu=name,uuid", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):  # a hanging driver: nothing could be trained on it either
        return ()
    lines = [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []
    there = [(name, uuid) for name, _, uuid in (line.rpartition(", ") for line in lines)]
    return tuple(name for name, _ in there) if visible is None else _visible(there, visible)


def _visible(there: list[tuple[str, str]], wanted: str) -> tuple[str, ...]:
    """The GPUs (name, uuid) that an entry of CUDA_VISIBLE_DEVICES names, by CUDA's own rules.

    Entries are numbers or beginnings of uuids. The first that names no GPU ends the list (-1 is used so); a GPU that
    is named twice leaves none. Parts of GPUs (MIG) are not listed by name: each counts as one.
    """
    chosen: list[str] = []
    names: list[str] = []
    for entry in map(str.strip, wanted.split(",")):
        if entry.startswith("MIG-"):
            found = (entry, entry)
        elif entry.isdecimal():
            found = there[int(entry)][::-1] if int(entry) < len(there) else None
        else:
            found = next(((uuid, name) for name, uuid in there if entry and uuid.startswith(entry)), None)
        if found is None:
            break
        if found[0] in chosen:
            return ()
        chosen.append(found[0])
        names.append(found[1])
    return tuple(names)
