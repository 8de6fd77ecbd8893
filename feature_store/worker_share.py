"""A Ray cluster → how many extraction workers, and what each may use of its node (before anything is extracted)."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from feature_store.config import DecodeConfig, ExtractConfig
from feature_store.decode_pool import AHEAD
from vlm_dist.errors import ConfigError

_CPU_DECODERS = 2  # S3D takes nearly all of a core: one more than it needs, so that the next video is open already
_OBJECT_STORE_SHARE = 0.5  # of Ray's object store that chunks on their way may take


@dataclass(frozen=True)
class WorkerShare:
    """How many workers a cluster is given, and what each may use of its node."""

    workers: int
    cpus: int
    threads: int
    decoders: int
    chunk_seconds: int


Node = Mapping[str, float]
"""What a node has: CPU, GPU, object_store_memory (bytes)."""


def alive_nodes() -> list[Node]:
    """The nodes of the cluster that this process is connected to."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def worker_share(cfg: ExtractConfig, nodes: Sequence[Node]) -> WorkerShare:
    """Share a Ray cluster out among workers.

    Raises:
        ConfigError: more workers are asked for than there is room for (unless `cfg.wait_for_nodes`).
    """
    room = sum(workers_on(node, cfg) for node in nodes)
    wanted = cfg.workers or max(1, room)
    if wanted > room and not cfg.wait_for_nodes:
        cpus, gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
        each = f"1 CPU and {cfg.gpus_per_worker:g} GPU" if cfg.gpus_per_worker > 0 else "1 CPU"
        advice = f"use --workers {room}" if room else "extract on CPUs (--set extract.gpus_per_worker=0)"
        raise ConfigError(
            f"{wanted} extraction workers of {each} each do not fit: Ray has {cpus} CPUs and {gpus:g} GPUs; {advice}"
            ", or let them wait for nodes (--set extract.wait_for_nodes=true)"
        )
    # On one machine the workers share all its cores; over several, a worker of one core fits everywhere.
    if cfg.gpus_per_worker > 0:
        here = [(node, workers_on(node, cfg)) for node in nodes]
        cpus = min((int(node["CPU"]) // count for node, count in here if count), default=1)
    else:
        cpus = int(nodes[0].get("CPU", 1)) // wanted if len(nodes) == 1 else 1
    cpus = max(1, cpus)
    decoders = cfg.decoders or (max(1, cpus - 1) if cfg.gpus_per_worker > 0 else _CPU_DECODERS)
    threads = 1 if cfg.deterministic or cfg.gpus_per_worker > 0 else cpus
    chunk_seconds = cfg.chunk if cfg.deterministic else _chunk_seconds(cfg, nodes, wanted, decoders)
    return WorkerShare(wanted, cpus, threads, decoders, chunk_seconds)


def workers_on(node: Node, cfg: ExtractConfig) -> int:
    """Workers that a node has place for."""
    cpus = int(node.get("CPU", 0))
    return min(cpus, int(node.get("GPU", 0) / cfg.gpus_per_worker)) if cfg.gpus_per_worker > 0 else cpus


def _chunk_seconds(cfg: ExtractConfig, nodes: Sequence[Node], workers: int, decoders: int) -> int:
    """The longest chunks of which all that may be on their way fit into Ray's object store on every node."""
    longest = float(cfg.chunk)
    for node in nodes:
        if here := min(workers, workers_on(node, cfg)):
            chunks = here * decoders * (AHEAD + 1)
            room = _OBJECT_STORE_SHARE * node.get("object_store_memory", 0.0)
            longest = min(longest, room / (chunks * second_bytes(cfg.decode)))
    return max(1, int(longest))


def second_bytes(cfg: DecodeConfig) -> int:
    """Bytes of one second of frames."""
    return cfg.fps * cfg.size * cfg.size * 3
