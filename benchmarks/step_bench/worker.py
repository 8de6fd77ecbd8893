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
from vlm_dist.losses.nce import masked_token_loss
from vlm_dist.model.config import ModelConfig
from vlm_dist.model.flops import Work, step_flops
from vlm_dist.model.recompute import set_recompute
from vlm_dist.model.vlm import VLM

VOCAB = 30522  # of bert-base-uncased
WAYS = {"plain": None, "ours": "none", "ours, cheap": "cheap", "ours, layers": "layers"}
"""Name → what is made again in the backward pass; the reference's way is another model."""
_SCALE = 1024.0  # of the loss in float16


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
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    torch.manual_seed(0)
    device = torch.device(told.device)
    batch = ClipBatch(**torch.load(told.file, weights_only=True))
    model = VLM(ModelConfig(vocab_size=VOCAB, feature_dim=batch.video.shape[-1], dropout=0.0))
    work = Work.of(batch)
    model, moved = model.to(device, getattr(torch, told.precision)).train(), batch.to(device)
    step = PlainStep(model) if told.way == "plain" else _Ours(model, WAYS[told.way] or "none", batch)
    if told.compile:
        for layer in model.bert.encoder.layer:
            layer.compile(dynamic=True)
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
    def __init__(self, model: VLM, recompute: str, batch: ClipBatch) -> None:
        super().__init__()
        self.model = model
        self.counts = batch.num_masked_text, batch.num_masked_video
        set_recompute(model.bert, recompute)  # type: ignore[arg-type]

    def forward(self, batch: ClipBatch) -> Tensor:
        hidden = self.model.encode(
            batch.video, batch.video_mask, batch.text, batch.text_mask, video_labels=batch.video_labels
        )
        return masked_token_loss(self.model, hidden, batch, batch.visible_video()).loss("joint", *self.counts)


class _Update:
    """Backward pass and Adam."""

    def __init__(self, parameters: Iterable[nn.Parameter], scale: float) -> None:
        self.parameters, self.scale = list(parameters), scale
        half = self.parameters[0].dtype != torch.float32
        self.masters = [p.detach().float() for p in self.parameters] if half else self.parameters
        self.adam = torch.optim.AdamW(self.masters, lr=5e-5, betas=(0.9, 0.98), fused=True)

    def __call__(self, loss: Tensor) -> None:
        (loss * self.scale).backward()
        if self.masters is not self.parameters:
            for master, p in zip(self.masters, self.parameters, strict=True):
                master.grad, p.grad = None if p.grad is None else p.grad.float().div_(self.scale), None
        self.adam.step()
        self.adam.zero_grad()
        if self.masters is not self.parameters:
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
