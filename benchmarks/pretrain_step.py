"""A pre-training step of BERT-base on the CPU, beside the way that the reference takes: time and memory, one table.

    python benchmarks/pretrain_step.py [--clips 64] [--rounds 3] [--small] [--json FILE]

The reference's way: every clip padded to 96 places, eager attention, all scores of the loss at once. Clips come from a
synthetic corpus with lengths like HowTo100M's, drawn, masked and laid out as in training; without dropout, so that
losses can be compared: where those in float32 differ, the run fails. Each measurement is a process; rounds alternate.
Twenty minutes.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
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
FIELDS = ("video", "video_mask", "video_labels", "text", "text_mask", "text_labels")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=64, help="clips of a step")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each way, of two timed steps each")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--small", action="store_true", help="a test run: 4 clips, one round")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    clips, rounds = (4, 1) if arguments.small else (arguments.clips, arguments.rounds)
    told: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with TemporaryDirectory(prefix="step-bench-") as name:
        file = _batch(Path(name), clips)
        for number in range(rounds):
            for precision in ("float32", "bfloat16"):
                for way in ("ours", "plain"):
                    print(f"round {number + 1}: {way}, {precision}", file=sys.stderr)
                    told.setdefault((way, precision), []).append(_run(way, precision, file, arguments.threads))
    rows = [row for precision in ("float32", "bfloat16") for row in _rows(told, precision, clips)]
    print(table(rows))
    tokens = told["ours", "float32"][0]["tokens"]
    print(f"\n{clips} clips, {tokens / clips:.1f} real places of 96 on average; {arguments.threads} threads")
    print(machine())
    if arguments.json:
        arguments.json.write_text(json.dumps({" ".join(key): value for key, value in told.items()}))
    ours, plain = (told[way, "float32"][0]["loss"] for way in ("ours", "plain"))
    if abs(ours - plain) > 1e-4 * abs(plain):
        raise SystemExit(f"the losses differ ({ours} and {plain}): the speeds say nothing")


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


def _run(way: str, precision: str, file: Path, threads: int) -> dict[str, Any]:
    paths = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    command = [sys.executable, "-m", "step_bench.worker", way, precision, file, "2", str(threads)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    return json.loads(done.stdout)


def _rows(told: dict[tuple[str, str], list[dict[str, Any]]], precision: str, clips: int) -> list[Row]:
    ours, plain = ([clips / s for one in told[way, precision] for s in one["seconds"]] for way in ("ours", "plain"))
    goal = 1.7 if precision == "float32" else None
    memory = [max(one["peak"] for one in told[way, precision]) for way in ("ours", "plain")]
    share = memory[0] / memory[1]
    met = share <= 0.5 if precision == "float32" else None
    return [
        compare(precision, "a step", "clips/s", ours, "the reference's way", plain, goal),
        Row(precision, "peak memory", "MB", memory[0], "the reference's way", memory[1], share, "<= 0.5 x", met),
    ]


if __name__ == "__main__":
    main()
