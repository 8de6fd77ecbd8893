"""Embeddings of every rank, with gradients (batches → embeddings of all ranks → contrastive loss)."""

from typing import Any

import torch

from vlm_dist.train import distributed


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, start: int) -> torch.Tensor:
        ctx.own = slice(start, start + rows.shape[0])
        return distributed.all_gather_rows(rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return distributed.all_sum(grads[0])[ctx.own], None


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks, this rank's first.

    Every rank scores its own queries against all ranks' rows, so a row takes part in the loss sum of every rank. The
    backward pass therefore *sums* its gradients over the ranks; with the trainer's scaling (`sum * W / N`, gradients
    averaged over the W ranks) the result is the gradient of one big batch on one rank.

    Args:
        rows: (n, D) float32, n may differ between ranks (half precision would overflow in the sum of scaled gradients).

    Returns:
        (sum of n, D), own rows first. A collective when there are several ranks.
    """
    if distributed.world_size() == 1:
        return rows
    counts = distributed.all_gather_rows(torch.tensor([[rows.shape[0]]], device=rows.device))
    start = int(counts[: distributed.rank()].sum())
    return torch.roll(_GatherRows.apply(rows, start), -start, dims=0)
