"""`--nodes --gpus --workers` -> ranks that the cluster really has room for, and that can do what is set."""

from typing import TYPE_CHECKING

from cluster.resources import check_request
from vlm_dist.errors import ConfigError

if TYPE_CHECKING:
    from cluster.resources import NodeResources
    from vlm_dist.train.ray_trainer import Workers


def worker_tags(nodes: int, workers: "Workers") -> dict[str, str]:
    """Tags that say what a run was trained on; ranks, accumulation and steps follow when the ranks tell them."""
    return {"vlm_dist.nodes": str(nodes), "vlm_dist.gpus": str(workers.count if workers.use_gpu else 0)}


def resolve_workers(have: list["NodeResources"], nodes: int, gpus: int | None, workers: int) -> "Workers":
    """Ranks for a training run.

    Args:
        have: The cluster's nodes, as `cluster.ray_local.ray_session` gives them.
        nodes: Machines.
        gpus: GPUs of each machine; None takes what the largest machine has, 0 trains on CPUs.
        workers: CPU workers in all, when there are no GPUs.

    Raises:
        ConfigError: What is there, and what to type.
    """
    from vlm_dist.train.ray_trainer import Workers

    per_node = gpus if gpus is not None else int(max((node.gpus for node in have), default=0))
    check_request(have, nodes, per_node, workers)
    if per_node:
        return Workers(nodes * per_node, use_gpu=True)
    # The most CPUs that every worker can have, wherever it is placed.
    most = int(sum(node.cpus for node in have) // workers)
    fits = (each for each in range(most, 0, -1) if sum(node.cpus // each for node in have) >= workers)
    return Workers(workers, use_gpu=False, cpus_each=float(next(fits, 1)))


def asked_workers(nodes: int, gpus: int | None, workers: int) -> "Workers | None":
    """The ranks that the command line names; None where it leaves their number to the cluster."""
    from vlm_dist.train.ray_trainer import Workers

    if gpus is None:
        return None
    return Workers(nodes * gpus, use_gpu=True) if gpus else Workers(workers, use_gpu=False)


def check_workers(workers: "Workers | None", precision: str, batch: int, setting: str) -> None:
    """Refuse what the ranks would refuse, before a cluster is asked for and a run begins; None is checked later.

    Args:
        workers: The ranks.
        precision: `train.precision`.
        batch: What one update has to share out.
        setting: The name of `batch`, for the message.

    Raises:
        ConfigError: These ranks cannot train so.
    """
    import torch

    from vlm_dist.train.engine import resolve_precision

    if workers is None:
        return
    resolve_precision(precision, torch.device("cuda" if workers.use_gpu else "cpu"))
    if batch < workers.count:
        raise ConfigError(
            f"{setting} {batch} cannot be shared by {workers.count} workers: every one needs a part of each update; "
            f"raise it, or take at most {batch} (--workers, --gpus)"
        )
