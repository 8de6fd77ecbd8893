"""One process that makes steps in one way, and says what they took.

    python -m step_bench.worker WAY PRECISION BATCH.pt [--steps N] [--threads N] [--device cuda] [--compile]

Prints seconds of each step, its first loss, the peak of memory beyond what is held before (MB), real places and model
FLOPs. Gradients and the optimiser's state are in the peak of every way. In half precision weights and moments are kept
in float32 beside the model, as DeepSpeed does.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterable

import psutil
import torch
from torch import Tensor, nn

from step_bench.plain import PlainStep
from vlm_dist.data.batch import ClipBatch
from vlm_dist.model.config import ModelConfig
from vlm_dist.model.flops import Work, step_flops
from vlm_dist.model.recompute import Recompute
from vlm_dist.model.vlm import VLM
from vlm_dist.train.config import TrainConfig
from vlm_dist.train.negatives import MicroBatch, Pool
from vlm_dist.train.pretrain import PretrainModule

VOCAB = 30522  # of bert-base-uncased
WAYS: dict[str, Recompute | None] = {"plain": None, "ours": "none", "ours, cheap": "cheap", "ours, layers": "layers"}
"""Name → what is made again in the backward pass; the reference's way is another model."""
_SCALE = 16.0  # of the loss in float16: more, and the first gradients overflow


def main() -> None:
    """Warm up with a step (a few on a GPU), then time the others."""
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("precision", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("file")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--chunk", type=int, default=TrainConfig().nce_chunk)
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    torch.manual_seed(0)
    device = torch.device(told.device)
    batch = ClipBatch(**torch.load(told.file, weights_only=True))
    model = VLM(ModelConfig(vocab_size=VOCAB, feature_dim=batch.video.shape[-1], dropout=told.dropout))
    work = Work.of(batch)
    model, moved = model.to(device, getattr(torch, told.precision)).train(), batch.to(device)
    step = PlainStep(model) if told.way == "plain" else _Ours(model, WAYS[told.way] or "none", told, device)
    update = _Update(model.parameters(), _SCALE if told.precision == "float16" else 1.0)
    held, seconds, losses = _held(device), list[float](), list[float]()
    warm_up = 1 if device.type == "cpu" else 5
    for _ in range(warm_up + told.steps):
        began = time.perf_counter()
        loss = step(moved)
        update(loss)
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - began)
    figures = {"seconds": seconds[warm_up:], "loss": losses[0], "peak": _peak(device) - held,
               "tokens": work.tokens, "flops": step_flops(model.config, work)}  # fmt: skip
    print(json.dumps(figures))


class _Ours(nn.Module):
    """The training loop's own module, with the batch's visible seconds as the pool."""

    def __init__(self, model: VLM, recompute: Recompute, told: argparse.Namespace, device: torch.device) -> None:
        super().__init__()
        cfg = TrainConfig(recompute=recompute, compile=told.compile, nce_chunk=told.chunk)
        self.module = PretrainModule(model, cfg, device)

    def forward(self, batch: ClipBatch) -> Tensor:
        nothing = batch.text.new_zeros(0)
        sums = self.module(MicroBatch(batch, nothing, nothing), Pool(batch.visible_video(), nothing))
        return sums.loss("joint", batch.num_masked_text, batch.num_masked_video)


class _Update:
    """Backward pass and Adam; half-precision weights have masters in float32. As few kernels as there can be."""

    def __init__(self, parameters: Iterable[nn.Parameter], scale: float) -> None:
        self.parameters, self.scale = list(parameters), scale
        half = self.parameters[0].dtype != torch.float32
        self.masters = [p.detach().float() for p in self.parameters] if half else self.parameters
        self.adam = torch.optim.AdamW(self.masters, lr=5e-5, betas=(0.9, 0.98), fused=True)
        if half:
            for master in self.masters:
                master.grad = torch.zeros_like(master)

    def __call__(self, loss: Tensor) -> None:
        (loss * self.scale).backward()
        if self.masters is not self.parameters:
            wide, narrow = [m.grad for m in self.masters], [p.grad for p in self.parameters]
            torch._foreach_copy_(wide, narrow)
            torch._foreach_div_(wide, self.scale)
            for p in self.parameters:
                p.grad = None
        self.adam.step()
        if self.masters is self.parameters:
            self.adam.zero_grad()
        else:
            torch._foreach_copy_([p.data for p in self.parameters], self.masters)


def _held(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    return psutil.Process().memory_info().rss / 2**20


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
