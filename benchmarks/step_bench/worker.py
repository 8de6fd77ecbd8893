"""One process that makes steps in one way, and says what they took.

    python -m step_bench.worker ours|plain float32|bfloat16 BATCH.pt STEPS THREADS

Prints `{"seconds": [...], "loss": first loss, "peak": MB beyond what is held before, "tokens": real places}`;
gradients and the optimiser's state are in the peak of both ways.
"""

import json
import resource
import sys
import time

import psutil
import torch

from step_bench.plain import PlainStep
from vlm_dist.data.batch import ClipBatch
from vlm_dist.losses.nce import masked_token_loss
from vlm_dist.model.config import ModelConfig
from vlm_dist.model.vlm import VLM

VOCAB = 30522  # of bert-base-uncased


def main() -> None:
    """Warm up with a step, then time the others."""
    way, precision, file, steps, threads = sys.argv[1:6]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    batch = ClipBatch(**torch.load(file, weights_only=True))
    model = VLM(ModelConfig(vocab_size=VOCAB, feature_dim=batch.video.shape[-1], dropout=0.0))
    model = model.to(getattr(torch, precision))
    step = PlainStep(model) if way == "plain" else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, betas=(0.9, 0.98))
    held, seconds, losses = _held(), [], []
    for _ in range(1 + int(steps)):
        began = time.perf_counter()
        loss = step(batch) if step else _ours(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
        losses.append(float(loss.detach()))
    tokens = int(batch.video_mask.sum() + batch.text_mask.sum())
    print(json.dumps({"seconds": seconds[1:], "loss": losses[0], "peak": _peak() - held, "tokens": tokens}))


def _ours(model: VLM, batch: ClipBatch) -> torch.Tensor:
    hidden = model.encode(
        batch.video, batch.video_mask, batch.text, batch.text_mask, video_labels=batch.video_labels
    )  # fmt: skip
    sums = masked_token_loss(model, hidden, batch, batch.visible_video())
    return sums.loss("joint", batch.num_masked_text, batch.num_masked_video)


def _held() -> float:
    return psutil.Process().memory_info().rss / 2**20


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
