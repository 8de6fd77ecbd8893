"""`vlm-dist pretrain --dry-run`: settings and a store -> what the training would take, as a table."""

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vlm_dist.cli.context import Context
from vlm_dist.cli.models import check_origin, find_origin
from vlm_dist.cli.output import duration, print_table
from vlm_dist.cli.pretrain import open_store_with_captions, read_model, split_corpus
from vlm_dist.cli.workers import asked_workers, check_workers

if TYPE_CHECKING:
    from vlm_dist.train.plan import TrainPlan


def plan_pretrain(context: Context, nodes: int, gpus: int | None, workers: int) -> dict[str, Any]:
    """Say what a pre-training would take, for any number of machines, and start nothing."""
    from vlm_dist.train.plan import plan_pretraining

    settings = context.settings
    store, index = open_store_with_captions(context)
    origin = find_origin(context, settings.init)
    check_origin(context, origin, store)
    split = split_corpus(context, index)
    model = read_model(origin.weights, settings.model, store, index)
    ranks = asked_workers(nodes, gpus, workers) or asked_workers(nodes, 0, workers)
    assert ranks is not None
    check_workers(ranks, settings.train.precision, settings.train.global_batch, "train.global_batch")
    cores = 0 if ranks.use_gpu else max(1, (os.cpu_count() or 1) // ranks.count)
    plan = plan_pretraining(
        index, split.train, model.config, settings.clips, settings.masks, settings.train,
        parameters=sum(p.numel() for p in model.parameters()), ranks=ranks.count, cores_each=cores,
    )  # fmt: skip
    print_table(("plan", ""), _rows(plan))
    print(
        "Memory and time rest on measurements of BERT-base (benchmarks/README.md): expect them within a factor of two."
    )
    return {**asdict(plan), "hours": plan.hours}


def _rows(plan: "TrainPlan") -> list[tuple[str, str]]:
    who = f"{plan.ranks} {'GPU' if plan.on_gpu else 'CPU worker'}{'s' * (plan.ranks != 1)}"
    each = f"about {duration(plan.seconds_per_step)}" if plan.seconds_per_step >= 1 else "less than a second"
    return [
        ("trained on", f"{who}, {plan.precision}"),
        ("updates", f"{plan.steps:,}, {plan.epochs:.2f} passes over the training videos"),
        ("an update", f"{plan.global_batch:,} clips = {plan.ranks} × {plan.micro_batches} × {plan.micro_batch}"),
        ("a clip", f"{plan.tokens_per_clip:.1f} tokens, {plan.masked_per_clip:.1f} of them masked"),
        ("model", f"{plan.parameters:,} parameters; {_scaled(plan.step_flops, 'FLOP')} a rank and update"),
        ("negatives", f"{plan.negatives:,} for each masked token: {plan.nce_share:.0%} of the arithmetic"),
        ("a rank receives", f"{_scaled(plan.received_bytes, 'B')} of features, {_scaled(plan.gradient_bytes, 'B')} for "
         "gradients and weights, an update"),
        ("a rank's memory", f"{_scaled(plan.state_bytes, 'B')} of weights and moments, about "
         f"{_scaled(plan.activation_bytes, 'B')} of activations"),
        ("time", f"{each} an update, {duration(3600 * plan.hours)} in all"),
    ]  # fmt: skip


def _scaled(number: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000
    return f"{number:.3g} P{unit}"
