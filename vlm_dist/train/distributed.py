"""Ranks -> one global batch: the collectives of a training step (variable-length gather, sums, agreement).

Every function is a plain local operation when torch.distributed is not initialised, so that the same code runs alone.
"""

from collections.abc import Sequence
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


def all_gather_counts(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Numbers of every rank: (W, len(counts)) int64 on the CPU, ordered by rank."""
    own = torch.tensor(counts, dtype=torch.int64)
    if world_size() == 1:
        return own[None]
    own = own.to(device)
    every = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(every, own)
    return torch.stack(every).cpu()


def neighbours(size: int) -> dist.ProcessGroup:
    """New groups of `size` ranks that follow one another, W being a multiple; gives this rank's (a collective)."""
    group, _ = dist.new_subgroups(size)
    assert isinstance(group, dist.ProcessGroup)
    return group


def all_gather_rows(
    rows: torch.Tensor, sizes: Sequence[int] | None = None, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Rows of every rank, (n_r, F) each with its own n_r (0 included) -> (sum n_r, F), ordered by rank, no gradient.

    Used for the raw visible features that are the negatives (paper Eq. 5-9): they are frozen, so nothing flows back
    through the gather, and the graph has the same shape on every rank.

    Args:
        rows: of this rank.
        sizes: n_r of all ranks, where they are known; else they are gathered first.
        group: ranks that take part; None is all.
    """
    world = dist.get_world_size(group) if dist.is_initialized() else 1
    if world == 1:
        return rows
    if sizes is None:
        own = torch.tensor([len(rows)], dtype=torch.int64, device=rows.device)
        every = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(every, own, group=group)
        sizes = [int(size) for size in every]
    padded = rows.new_zeros((max(1, *sizes), rows.shape[1]))
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
