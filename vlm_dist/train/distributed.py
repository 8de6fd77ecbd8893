"""Ranks -> one global batch: the collectives of a training step (variable-length gather, sums, agreement).

Every function is a plain local operation when torch.distributed is not initialised, so that the same code runs alone.
"""

from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """Rank of this process, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def of_rank_zero(value: T) -> T:
    """What rank 0 has, on every rank: decisions must not differ in a last bit."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of `values` over ranks (a new tensor of the same shape)."""
    total = values.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def all_gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows of every rank, (n_r, F) each with its own n_r (0 included) -> (sum n_r, F), ordered by rank, no gradient.

    Used for the raw visible features that are the negatives of the whole global batch (paper Eq. 5-9): they are
    frozen, so nothing flows back through the gather, and the graph has the same shape on every rank.
    """
    if world_size() == 1:
        return rows
    size = torch.tensor([rows.shape[0]], dtype=torch.int64, device=rows.device)
    sizes = [torch.empty_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    counts = [int(s) for s in sizes]
    longest = max(1, *counts)
    padded = rows.new_zeros((longest, rows.shape[1]))
    padded[: rows.shape[0]] = rows
    gathered = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
