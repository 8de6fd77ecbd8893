"""Batches of clips as training takes them: 256 clips of 8 videos, drawn, read, laid out and masked, on one core."""

import time
from pathlib import Path

import numpy as np
import torch

from feature_store.captions import write_captions
from feature_store.config import CaptionConfig
from feature_store.reader import FeatureReader
from feature_store.tokenizer import load_tokenizer
from store_bench.corpus import Corpus, write_caption_file, write_store
from store_bench.table import Row, bound
from vlm_dist.data.batch import ClipBatch, SpecialIds
from vlm_dist.data.clips import load_clips
from vlm_dist.data.config import ClipConfig, MaskConfig
from vlm_dist.data.masks import mask_batch
from vlm_dist.data.rng import ClipKeys
from vlm_dist.data.sampler import GlobalOrder
from vlm_dist.model.config import ModelConfig

BATCH = 256
GOAL = 40
WINDOW = 0.5
_FIELDS = ("video", "video_mask", "video_labels", "text", "text_mask", "text_labels")


def measure(scratch: Path, corpus: Corpus, rounds: int) -> tuple[list[Row], dict]:
    """The rows of this section, and all figures."""
    root, file = scratch / "store", scratch / "captions.jsonl"
    write_store(root, corpus)
    write_caption_file(file, corpus)
    write_captions(root, file, CaptionConfig(tokenizer="wordpiece:8000"))
    reader = FeatureReader(root, check="sampled")
    ids = SpecialIds.of(load_tokenizer(str(reader.index.tokenizer_dir)))
    order = GlobalOrder(np.arange(reader.index.num_videos), 0, BATCH, ClipConfig().clips_per_video)
    torch.set_num_threads(1)

    def load(keys: ClipKeys) -> ClipBatch:
        return load_clips(reader, keys, ClipConfig(), ModelConfig(), ids)

    def whole(keys: ClipKeys) -> ClipBatch:
        return mask_batch(load(keys), keys, MaskConfig(), ids).trim()

    def one_by_one(keys: ClipKeys) -> ClipBatch:
        items = [load(keys[clip : clip + 1]) for clip in range(len(keys))]
        batch = ClipBatch(*(torch.cat([getattr(item, name) for item in items]) for name in _FIELDS))
        return mask_batch(batch, keys, MaskConfig(), ids).trim()

    first = order.keys(0)
    for name in _FIELDS:
        assert torch.equal(getattr(whole(first), name), getattr(one_by_one(first), name)), name
    figures: dict[str, list[float]] = {"ours": [], "one by one": []}
    update = 0
    for _ in range(rounds):
        for name, make in (("ours", whole), ("one by one", one_by_one)):
            done, cpu, began = 0, time.process_time(), time.perf_counter()
            while time.perf_counter() < began + WINDOW:
                make(order.keys(update))
                done, update = done + 1, update + 1
            figures[name].append(done / (time.process_time() - cpu))
    row = bound(
        "clip batches",
        "256 clips of 8 videos",
        "batches/core-s",
        figures["ours"],
        GOAL,
        "clip by clip",
        figures["one by one"],
    )
    return [row], figures
