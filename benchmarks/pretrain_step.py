"""A pre-training step of BERT-base beside the way that the reference takes: time and memory, one table.

    python benchmarks/pretrain_step.py [--clips 64] [--rounds 3] [--device cuda] [--small] [--json FILE]

The reference's way: every clip padded to 96 places, eager attention, all scores of the loss at once. Clips come from a
synthetic corpus with lengths like HowTo100M's, drawn, masked and laid out as in training; without dropout, so that
losses can be compared: where those of one precision differ, the run fails. Each measurement is a process; rounds
alternate. Twenty-five minutes on two cores. On a GPU: 256 clips, both half precisions, with and without torch.compile,
and MFU, the share of the card's dense rate that the model's own arithmetic takes.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from feature_store.captions import write_captions
from feature_store.config import CaptionConfig
from feature_store.reader import FeatureReader
from feature_store.tokenizer import load_tokenizer
from store_bench.corpus import make_corpus, write_caption_file, write_store
from store_bench.table import Row, compare, machine
from store_bench.table import render as table
from vlm_dist.data.batch import SpecialIds
from vlm_dist.data.clips import load_clips
from vlm_dist.data.config import ClipConfig, MaskConfig
from vlm_dist.data.masks import mask_batch
from vlm_dist.data.sampler import GlobalOrder
from vlm_dist.model.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    """A way to make the step, as `step_bench.worker` knows it."""

    way: str
    precision: str
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.way}{', compiled' * self.compiled}, {self.precision}"


_WAYS = ("ours", "ours, cheap", "plain")
_CPU_CASES = [Case(way, precision) for precision in ("float32", "bfloat16") for way in _WAYS]
_GPU_CASES = [
    Case(way, precision, compiled)
    for precision in ("float16", "bfloat16")
    for way, compiled in (("ours", False), ("ours", True), ("ours, cheap", False), ("plain", False))
]
_AGREES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 2e-2}
"""Largest difference of losses, as a share: what rounding explains."""
_DENSE_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Of the data sheets, for half precision without sparsity."""
FIELDS = ("video", "video_mask", "video_labels", "text", "text_mask", "text_labels")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, help="clips of a step (64, on a GPU 256)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each way")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--small", action="store_true", help="a test run: 4 clips, one round")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    clips, rounds = (4, 1) if arguments.small else (arguments.clips or (256 if on_gpu else 64), arguments.rounds)
    cases = _GPU_CASES if on_gpu else _CPU_CASES
    told: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    with TemporaryDirectory(prefix="step-bench-") as name:
        file = _batch(Path(name), clips)
        for number in range(rounds):
            for case in cases:
                print(f"round {number + 1}: {case}", file=sys.stderr)
                told[case].append(_run(case, file, arguments.device, arguments.threads))
    print(table([row for case in cases if case.way != "plain" for row in _rows(told, case, clips)]))
    one = next(iter(told.values()))[0]
    if on_gpu:
        print(*_mfu(told, clips), sep="\n")
    print(f"\n{clips} clips, {one['tokens'] / clips:.1f} real places of 96 on average, {one['flops'] / 1e12:.2f} TFLOP")
    print(f"{arguments.threads} threads; {machine()}")
    if arguments.json:
        arguments.json.write_text(json.dumps({str(case): figures for case, figures in told.items()}))
    _agree(told)


def _agree(told: Mapping[Case, list[dict[str, Any]]]) -> None:
    for case, figures in told.items():
        ours, plain = figures[0]["loss"], told[Case("plain", case.precision)][0]["loss"]
        if abs(ours - plain) > _AGREES[case.precision] * abs(plain):
            raise SystemExit(f"{case}: the losses differ ({ours} and {plain}): the speeds say nothing")


def _batch(folder: Path, clips: int) -> Path:
    """Clips as training draws, reads and masks them."""
    corpus = make_corpus(folder / "corpus", 64)
    write_store(folder / "store", corpus)
    write_caption_file(folder / "captions.jsonl", corpus)
    write_captions(folder / "store", folder / "captions.jsonl", CaptionConfig(tokenizer="wordpiece:8000"))
    reader = FeatureReader(folder / "store")
    ids = SpecialIds.of(load_tokenizer(str(reader.index.tokenizer_dir)))
    cfg = ClipConfig()
    visits = -(-clips // cfg.clips_per_video)
    keys = GlobalOrder(np.arange(reader.index.num_videos), 0, visits * cfg.clips_per_video, cfg.clips_per_video).keys(0)
    batch = mask_batch(load_clips(reader, keys, cfg, ModelConfig(), ids), keys, MaskConfig(), ids)[:clips].trim()
    torch.save({field: getattr(batch, field).clone() for field in FIELDS}, folder / "batch.pt")
    return folder / "batch.pt"


def _run(case: Case, file: Path, device: str, threads: int) -> dict[str, Any]:
    paths = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    steps = 2 if device == "cpu" else 20
    options = [f"--steps={steps}", f"--threads={threads}", f"--device={device}", *["--compile"] * case.compiled]
    command = [sys.executable, "-m", "step_bench.worker", case.way, case.precision, file, *options]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    return json.loads(done.stdout)


def _rows(told: Mapping[Case, list[dict[str, Any]]], case: Case, clips: int) -> list[Row]:
    plain = told[Case("plain", case.precision)]
    rates = [[clips / s for one in figures for s in one["seconds"]] for figures in (told[case], plain)]
    memory = [max(one["peak"] for one in figures) for figures in (told[case], plain)]
    share = memory[0] / memory[1]
    promised = case.precision == "float32"
    other = "the reference's way"
    return [
        compare(str(case), "a step", "clips/s", rates[0], other, rates[1], 1.7 if promised else None),
        Row(str(case), "peak memory", "MB", memory[0], other, memory[1], share, "<= 0.5 x" if promised else "",
            share <= 0.5 if promised else None),
    ]  # fmt: skip


def _mfu(told: Mapping[Case, list[dict[str, Any]]], clips: int) -> list[str]:
    name = torch.cuda.get_device_name()
    rate = next((rate for part, rate in _DENSE_FLOPS.items() if part in name), None)
    lines: list[str] = []
    for case, figures in told.items():
        seconds = median(s for one in figures for s in one["seconds"])
        share = f"{figures[0]['flops'] / seconds / rate:.1%}" if rate else "unknown"
        lines.append(
            f"{case}: {1e3 * seconds:.1f} ms, {clips / seconds:,.0f} clips/s, "
            f"{figures[0]['tokens'] / seconds:,.0f} tokens/s, MFU {share}"
        )
    return [f"\n{name}, dense rate {rate or 'unknown'}", *lines]


if __name__ == "__main__":
    main()
