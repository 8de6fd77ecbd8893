"""What is compared of each file, through this project's public functions."""

import ast
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from feature_store.caption_files import RawCaptions
from feature_store.captions import clean_captions
from feature_store.dedup import Caption, deduplicate_reference
from feature_store.s3d import FEATURE_DIM, S3D
from feature_store.s3d_fused import FusedS3D
from parity_bench.golden import Golden
from vlm_dist.losses.contrastive import text_to_video, video_to_text
from vlm_dist.losses.nce import masked_token_loss
from vlm_dist.metrics.retrieval import count_block, retrieval_metrics
from vlm_dist.metrics.segmentation import segmentation_metrics
from vlm_dist.model.attention_masks import attention_mask, real_places
from vlm_dist.tasks.batches import TaskBatch
from vlm_dist.tasks.retrieval import RetrievalModel
from vlm_dist.tasks.segmentation import SegmentationBatch, SegmentationModel
from vlm_dist.tasks.windows import MergedLogits, Windows

FLOAT32 = 1e-5


class Difference(NamedTuple):
    """The largest difference of one thing; None where this project cannot compute it yet."""

    file: str
    what: str
    largest: float | None
    allowed: float = FLOAT32

    @property
    def fits(self) -> bool:
        return self.largest is None or self.largest <= self.allowed


def _between(got: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    """Largest absolute difference; infinite where shapes differ or a number is not finite."""
    a, b = (torch.as_tensor(x).detach().double() for x in (got, expected))
    if a.shape != b.shape:
        return float("inf")
    difference = (a - b).abs()
    return float(difference.nan_to_num(float("inf")).max()) if difference.numel() else 0.0


def s3d(folder: Path) -> Iterator[Difference]:
    """Embeddings and mixed_5c of every recorded clip."""
    model = S3D()
    with np.load(folder / "s3d_weights.npz") as weights:
        kept = [key for key in weights.files if not key.startswith("text_module.")]  # of no use for features
        model.load_state_dict({key: torch.from_numpy(weights[key]) for key in kept})
    numbers = np.load(folder / "s3d_io.npz")
    for clip in (key.removeprefix("clip_") for key in numbers.files if key.startswith("clip_")):
        clips = torch.from_numpy(numbers[f"clip_{clip}"]).permute(0, 2, 3, 4, 1).to(torch.uint8)
        embedding, mixed_5c = (FusedS3D(model, layer)(clips) for layer in FEATURE_DIM)
        yield Difference("s3d_io.npz", f"emb_{clip}", _between(embedding, numbers[f"emb_{clip}"]), 5e-5)
        yield Difference("s3d_io.npz", f"mixed_5c_{clip}", _between(mixed_5c, numbers[f"mixed_5c_{clip}"]), 2e-4)


def pretraining(folder: Path, name: str) -> Iterator[Difference]:
    """Hidden states of all layers at real places, projected video, loss, and every gradient."""
    golden = Golden(folder / f"{name}.npz")
    model, batch = golden.model().train(), golden.batch()  # without dropout; training keeps the gradients
    real = real_places(batch.video_mask, batch.text_mask)
    seen: list[Tensor] = []
    model.bert.embeddings.register_forward_hook(lambda module, args, out: seen.append(out[real]))
    for layer in model.bert.encoder.layer:  # they see real places only, one behind the other
        layer.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    hidden = model.encode(
        batch.video, batch.video_mask, batch.text, batch.text_mask, video_labels=batch.video_labels
    )  # fmt: skip
    for number, states in enumerate(seen):
        yield Difference(f"{name}.npz", f"hidden states {number}", _between(states, golden[f"out/h{number}"][real]))
    projected = model.project_video(batch.video.masked_fill(batch.video_labels[..., None], 0))
    yield Difference(f"{name}.npz", "projected video", _between(projected, golden["out/vtokens"]))
    kind = "joint" if name == "pretrain_mtm" else "mfm-mlm"
    sums = masked_token_loss(model, hidden, batch, batch.visible_video(), kind, constant_column=True)
    loss = sums.loss(kind, batch.num_masked_text, batch.num_masked_video)
    loss.backward()
    yield Difference(f"{name}.npz", "loss", _between(loss, golden["out/loss"]))
    expected, got = golden.gradients(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    if unlike := expected.keys() ^ got.keys():
        yield Difference(f"{name}.npz", f"gradients that one side lacks: {sorted(unlike)[:3]}", float(len(unlike)), 0)
    gaps = {key: _between(got[key], expected[key]) for key in expected.keys() & got.keys()}
    worst = max(gaps, key=lambda key: gaps[key])
    yield Difference(f"{name}.npz", f"{len(gaps)} gradients, worst of {worst}", gaps[worst])


def retrieval(folder: Path) -> Iterator[Difference]:
    """Isolated attention mask, pooled embeddings, and the contrastive losses."""
    golden, name = Golden(folder / "ft_joint.npz"), "ft_joint.npz"
    batch = golden.batch()
    mask = attention_mask("isolated", batch.video_mask, batch.text_mask)[:, 0]
    yield Difference(name, "isolated attention mask", float((mask != golden["out/iso_mask"]).sum()), 0)
    model = RetrievalModel(golden.model()).eval()
    with torch.no_grad():
        video, text = model.embeddings(TaskBatch(batch.video, batch.video_mask, batch.text, batch.text_mask))
        ways = {"T2V": text_to_video(text, video) / len(text), "V2T": video_to_text(text, video) / len(text)}
    yield Difference(name, "pooled video", _between(video, golden["out/test/pooled_video"]))
    yield Difference(name, "pooled text", _between(text, golden["out/test/pooled_text"]))
    for way, loss in {**ways, "MM": sum(ways.values())}.items():
        yield Difference(name, f"{way} loss", _between(loss, golden[f"out/loss/{way}ContraLoss"]))


def segmentation(folder: Path) -> Iterator[Difference]:
    """Logits of the windows, loss, and the windows merged to a video."""
    golden, name = Golden(folder / "ft_coin.npz"), "ft_coin.npz"
    width, classes = golden["in/vmasks"].shape[-1], golden["out/logits"].shape[-1]
    model = SegmentationModel(golden.model(), classes).eval()
    head = golden.named("w/mm_encoder.classifier.")
    model.classifier.load_state_dict(head)
    inputs = (golden[f"in/{key}"][0] for key in ("vfeats", "vmasks", "caps", "cmasks", "targets"))
    batch = SegmentationBatch(*inputs)
    seconds = int(golden["in/video_len"][0])
    with torch.no_grad():
        logits, loss = model.logits(batch), model(batch)
    merged = MergedLogits(seconds, classes, logits.device)
    starts = Windows.over(np.array([0]), np.array([seconds]), width=width, step=width // 2).start
    for window, start in zip(logits, starts.tolist(), strict=True):
        merged.add(window, start)
    real = batch.video_mask
    yield Difference(name, "logits of real seconds", _between(logits[real], golden["out/logits"][real]))
    yield Difference(name, "loss", _between(loss.sum / loss.terms, golden["out/loss"]))
    yield Difference(name, "merged windows", _between(merged.mean(), golden["out/merged"]))


def metrics(folder: Path) -> Iterator[Difference]:
    """Recall@k and median rank with the reference's ties; frame accuracy."""
    inputs, expected = np.load(folder / "metrics_inputs.npz"), json.loads((folder / "metrics.json").read_text())
    keys = {"R1": "recall_at_1", "R5": "recall_at_5", "R10": "recall_at_10", "MR": "median_rank"}
    for case in (key.removeprefix("sim_") for key in inputs.files if key.startswith("sim_")):
        scores = inputs[f"sim_{case}"]
        got = retrieval_metrics(count_block(scores, np.eye(len(scores), dtype=bool)), "reference")
        gap = max(abs(got[ours] - expected[f"retrieval_{case}"][theirs]) for theirs, ours in keys.items())
        yield Difference("metrics.json", f"retrieval_{case}", gap, 1e-12)
    got = segmentation_metrics(inputs["coin_pred"], inputs["coin_true"], constant=0)
    for ours, theirs in {"frame_accuracy": "coin", "constant_frame_accuracy": "coin_all_background"}.items():
        yield Difference("metrics.json", theirs, abs(got[ours] - expected[theirs]["frame_acc"]), 1e-12)
    for what in ("qa", "crosstask", "nlg"):
        if what in expected:
            yield Difference("metrics.json", what, None)


def deduplication(folder: Path) -> Iterator[Difference]:
    """Captions that the reference's rule keeps, for every recorded coin."""
    for name, case in json.loads((folder / "dedup.json").read_text()).items():
        raw = case["input"]
        texts = [float("nan") if text == "nan" else text for text in raw["text"]]
        cleaned = clean_captions(RawCaptions(name, raw["start"], raw["end"], texts), "off", Counter())
        captions = [Caption(c.start / 1000, c.end / 1000, c.text) for c in cleaned]
        unlike = 0
        for text, seeds in case["results_by_seed"].items():
            expected = ast.literal_eval(text)
            for seed in seeds:
                kept, _ = deduplicate_reference(captions, Random(seed))
                got = {key: [getattr(c, key) for c in kept] for key in ("start", "end", "text")}
                unlike += got != expected
        yield Difference("dedup.json", name, float(unlike), 0)


def _not_built(folder: Path, name: str) -> Iterator[Difference]:
    yield Difference(name, "all of it", None)


CHECKS: dict[str, Callable[[Path], Iterator[Difference]]] = {
    "s3d_io.npz": s3d,
    "pretrain_mtm.npz": lambda folder: pretraining(folder, "pretrain_mtm"),
    "pretrain_mfmmlm.npz": lambda folder: pretraining(folder, "pretrain_mfmmlm"),
    "ft_joint.npz": retrieval,
    "ft_coin.npz": segmentation,
    "ft_crosstask.npz": lambda folder: _not_built(folder, "ft_crosstask.npz"),
    "ft_nlg.npz": lambda folder: _not_built(folder, "ft_nlg.npz"),
    "metrics.json": metrics,
    "dedup.json": deduplication,
}
