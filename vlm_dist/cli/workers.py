"""`--nodes --gpus --workers` -> ranks that the cluster really has room for."""

from typing import TYPE_CHECKING

from cluster.resources import check_request

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
