"""Loss -> updated weights: DeepSpeed ZeRO-1/2 under one small surface, with a state that no world size is written into.

DeepSpeed keeps each rank's share of the fp32 weights and of Adam's moments in flat partitions. `export_state` joins
them into whole tensors by parameter name and `load_state` cuts them for the world that is there now, so a run goes on
with another number of ranks, and a checkpoint is plain safetensors instead of pickles.
"""

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_dist.errors import CheckpointError, ConfigError
from vlm_dist.train.config import OptimConfig
from vlm_dist.train.distributed import rank, world_size

MOMENTS = ("exp_avg", "exp_avg_sq")
PRECISION_DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class UpdateOutcome:
    """What one update did: the gradient norm before clipping, the loss scale, and whether fp16 skipped it."""

    grad_norm: float
    loss_scale: float
    skipped: bool


@dataclass(frozen=True)
class EngineState:
    """All that an optimiser step depends on; tensors are float32 on the CPU, by parameter name."""

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    counters: dict[str, Any]


def resolve_precision(wanted: str, device: torch.device) -> str:
    """`auto` -> fp16 on a GPU (as the paper), fp32 on a CPU. Errors: ConfigError for fp16 on a CPU."""
    if wanted == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    if wanted == "fp16" and device.type == "cpu":
        raise ConfigError(
            "train.precision fp16 needs GPUs; on CPU workers use fp32 or bf16 (--set train.precision=bf16)"
        )
    return wanted


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed without its start-up compilation and its chatter, on the device that the caller trains on."""
    os.environ["DS_ACCELERATOR"] = device.type  # else it takes a GPU that it sees, also from CPU workers
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # An inference-only C++ extension is compiled for 65 s at the first initialize on a CPU; training never calls it.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
    return deepspeed


class Engine:
    """A module, its Adam and its gradients, spread over the ranks by DeepSpeed.

    `engine(*inputs)` runs the module, `backward(loss)` adds gradients, and every `accumulation`-th `update(lr)` takes
    a step. Gradients are averaged over ranks and accumulation steps, so a loss is passed as `share_of_sum`:
    W * accumulation / N_global * local sum (`scale` gives the factor).
    """

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        *,
        precision: str,
        zero_stage: int,
        accumulation: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self.precision = precision
        self.accumulation = accumulation
        self.module = module.to(device)
        deepspeed = import_deepspeed(device)
        optimizer = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=device.type == "cuda",
        )
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # counts nothing here: batches are made by the objective
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": optim.clip_norm,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": zero_stage, "overlap_comm": False, "contiguous_gradients": True,
                                  "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000},
            "zero_allow_untested_optimizer": True,
        }  # fmt: skip
        if precision == "fp16":
            settings["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 14, "loss_scale_window": 1000,
                                "hysteresis": 2, "consecutive_hysteresis": False, "min_loss_scale": 1}  # fmt: skip
        elif precision == "bf16":
            settings["bf16"] = {"enabled": True}
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=self.module,
            model_parameters=optimizer.param_groups[0]["params"],
            optimizer=optimizer,
            config=settings,
        )
        self.applied = 0
        self.skipped = 0

    @property
    def dtype(self) -> torch.dtype:
        """Data type of weights and activations."""
        return PRECISION_DTYPE[self.precision]

    @property
    def scale(self) -> float:
        """Factor that turns (local sum / global count) into the loss whose averaged gradient is the global mean's."""
        return float(world_size() * self.accumulation)

    def __call__(self, *inputs: Any) -> Any:
        """Forward pass of the module."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients."""
        self._engine.backward(loss)

    def update(self, lr: float) -> UpdateOutcome | None:
        """End of a micro-batch; None but at the accumulation boundary, where the weights are updated at rate `lr`."""
        boundary = self._engine.is_gradient_accumulation_boundary()
        for group in self._zero.param_groups:
            group["lr"] = lr
        before = int(self._engine.skipped_steps)
        self._engine.step()
        if not boundary:
            return None
        skipped = int(self._engine.skipped_steps) > before
        self.applied += not skipped
        self.skipped += skipped
        norm = self._engine.get_global_grad_norm()
        return UpdateOutcome(float(norm) if norm is not None else float("nan"), self._loss_scale(), skipped)

    def _loss_scale(self) -> float:
        scaler = self._zero.loss_scaler
        return float(getattr(scaler, "cur_scale", getattr(scaler, "loss_scale", 1.0)))

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def _flat_groups(self) -> Iterator[tuple[list[tuple[str, nn.Parameter]], Tensor]]:
        """(parameters in flattening order, this rank's fp32 partition) of each DeepSpeed group."""
        names = {id(p): name for name, p in self._named_parameters()}
        groups = self._zero.bit16_groups
        for params, partition in zip(groups, self._zero.single_partition_of_fp32_groups, strict=True):
            yield [(names[id(p)], p) for p in params], partition

    @staticmethod
    def _join(partition: Tensor) -> Tensor:
        """Partitions of all ranks -> one flat fp32 tensor on the CPU (padding at its end)."""
        if world_size() == 1:
            return partition.detach().float().cpu()
        whole = partition.new_empty(partition.numel() * world_size())
        torch.distributed.all_gather_into_tensor(whole, partition.detach().contiguous())
        return whole.float().cpu()

    @staticmethod
    def _split(whole: Tensor, params: list[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
        tensors, offset = {}, 0
        for name, p in params:
            tensors[name] = whole[offset : offset + p.numel()].view(p.shape).clone()
            offset += p.numel()
        return tensors

    @staticmethod
    def _slice(tensors: dict[str, Tensor], params: list[tuple[str, nn.Parameter]], partition: Tensor) -> Tensor:
        """Whole tensors -> this rank's flat partition, zero-padded as DeepSpeed pads it."""
        flat = torch.cat([tensors[name].reshape(-1).float() for name, _ in params])
        length = partition.numel() * world_size()
        assert length >= flat.numel()
        flat = torch.nn.functional.pad(flat, (0, length - flat.numel()))
        start = rank() * partition.numel()
        return flat[start : start + partition.numel()].to(partition)

    def weights_hash(self) -> int:
        """A number of 63 bits that all ranks share as long as their weights are the same to the last bit."""
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for _, p in self._named_parameters():
            bits = p.detach().view(torch.int16 if p.element_size() == 2 else torch.int32)
            total = total * 1_000_003 + bits.sum(dtype=torch.int64)
        return int(total)

    def export_weights(self) -> dict[str, Tensor]:
        """Whole fp32 weights, equal on every rank (a collective: every rank must call it)."""
        weights: dict[str, Tensor] = {}
        for params, partition in self._flat_groups():
            weights |= self._split(self._join(partition), params)
        return weights

    def export_state(self) -> EngineState:
        """Whole fp32 weights and moments, equal on every rank (a collective: every rank must call it)."""
        moments: dict[str, dict[str, Tensor]] = {key: {} for key in MOMENTS}
        adam_step = 0.0
        for params, partition in self._flat_groups():
            state = self._zero.optimizer.state.get(partition, {})
            for key in MOMENTS:
                moments[key] |= self._split(self._join(state.get(key, torch.zeros_like(partition))), params)
            adam_step = float(state.get("step", 0.0))
        scaler = {k: v for k, v in vars(self._zero.loss_scaler).items() if isinstance(v, int | float | bool)}
        counters = {"adam_step": adam_step, "applied": self.applied, "skipped": self.skipped, "scaler": scaler,
                    "precision": self.precision}  # fmt: skip
        return EngineState(self.export_weights(), moments, counters)

    def load_state(self, state: EngineState) -> None:
        """Go on from `state`, whatever world it was written by. Errors: CheckpointError naming the first difference."""
        wanted = {name: p.shape for name, p in self._named_parameters()}
        if missing := sorted(wanted.keys() ^ state.weights.keys()):
            raise CheckpointError(f"the checkpoint's parameters are not this model's: {', '.join(missing[:5])} differ")
        for name, shape in wanted.items():
            if state.weights[name].shape != shape:
                found = tuple(state.weights[name].shape)
                raise CheckpointError(f"the checkpoint's {name} has shape {found}, this model's {tuple(shape)}")
        with torch.no_grad():
            for name, p in self._named_parameters():
                p.copy_(state.weights[name].to(p))
            for params, partition in self._flat_groups():
                partition.copy_(self._slice(state.weights, params, partition))
                if state.counters["adam_step"] > 0:
                    entry: dict[str, Tensor] = {
                        key: self._slice(state.moments[key], params, partition) for key in MOMENTS
                    }
                    entry["step"] = torch.tensor(state.counters["adam_step"])
                    if self.device.type == "cuda":  # the fused kernel keeps its step on the device
                        entry["step"] = entry["step"].to(partition.device)
                    self._zero.optimizer.state[partition] = entry
        if state.counters["precision"] == self.precision:  # another precision starts with a loss scale of its own
            for key, value in state.counters["scaler"].items():
                setattr(self._zero.loss_scaler, key, value)
        self.applied, self.skipped = state.counters["applied"], state.counters["skipped"]
