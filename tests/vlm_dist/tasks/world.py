"""A small real world for task tests: a feature store, a tokenizer, a model, annotations that fit them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from feature_store.layout import create_store
from feature_store.plan import PlannedVideo, plan_videos
from feature_store.reader import FeatureReader
from feature_store.records import Provenance, VideoRecord
from feature_store.snapshot import finalise
from feature_store.tokenizer import Tokenizer, train_wordpiece
from feature_store.writer import ShardAttempt
from vlm_dist.model.checkpoint import build_vlm
from vlm_dist.model.config import ModelConfig
from vlm_dist.model.vlm import VLM

WIDTH = 12
COLOURS = ("red", "green", "blue", "yellow")
ACTIONS = ("cut", "stir", "pour")
MODEL = ModelConfig(
    hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, dropout=0.0, max_video_len=8, max_len=20
)


def make_store(
    root: Path, features: Mapping[str, np.ndarray | None], width: int = WIDTH, weights: str = "0" * 64
) -> FeatureReader:
    """A committed store of the given videos; None is a video whose extraction failed."""
    create_store(root, Provenance(weights_sha256=weights, weights="random seed 0", feature_dim=width))
    for task in plan_videos(root, [PlannedVideo(video, f"{video}.mp4") for video in features], workers=1):
        with ShardAttempt(root, task.shard) as attempt:
            for video in task.videos:
                rows = features[video.video_id]
                status = {"status": "failed", "reason": "corrupt"} if rows is None else {"status": "ok"}
                attempt.add(VideoRecord(video_id=video.video_id, path=video.path, **status), rows)  # pyright: ignore
            attempt.commit()
    finalise(root)
    return FeatureReader(root)


def random_rows(seed: int, seconds: int, width: int = WIDTH) -> np.ndarray:
    """L2-normalised float16 features (seconds, width)."""
    rows = np.random.default_rng(seed).normal(size=(seconds, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def make_tokenizer() -> Tokenizer:
    """A WordPiece of a few dozen pieces."""
    return train_wordpiece([f"{a} the {c} thing slowly" for a in ACTIONS for c in COLOURS], 120)


def make_vlm(tokenizer: Tokenizer, seed: int = 0, width: int = WIDTH) -> VLM:
    """A fresh model of shape MODEL."""
    return build_vlm("scratch", MODEL, tokenizer.vocab_size, width, seed)


def scene(colour: str, action: str, seconds: int, seed: int) -> np.ndarray:
    """Features that say colour and action, with some noise."""
    rows = np.zeros((seconds, WIDTH))
    rows[:, COLOURS.index(colour)] = 1
    rows[:, 4 + ACTIONS.index(action)] = 1
    rows += 0.2 * np.random.default_rng(seed).normal(size=rows.shape)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def clip_world(folder: Path, per_split: int = 3) -> tuple[FeatureReader, Path]:
    """Videos of one scene each and a clip list: `per_split` training videos and one test video of every scene."""
    features: dict[str, np.ndarray | None] = {}
    lines = []
    for colour in COLOURS:
        for action in ACTIONS:
            for copy in range(per_split + 1):
                video = f"{colour}-{action}-{copy}"
                features[video] = scene(colour, action, 5 + copy, len(features))
                split = "test" if copy == per_split else "train"
                text = f"{action} the {colour} thing"
                lines.append({"video_id": video, "start": 0.4, "end": 4.2, "text": text, "split": split})
    return make_store(folder / "store", features), write_lines(folder / "clips.jsonl", lines)


def step_world(folder: Path, videos: int = 16) -> tuple[FeatureReader, Path]:
    """Videos of three steps between background, and their annotation in COIN's form; a quarter is test."""
    features: dict[str, np.ndarray | None] = {}
    database: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    for number in range(videos):
        colours = rng.permutation(COLOURS)[:3]
        parts, steps, second = [0.3 * random_rows(number, 2)], [], 2
        for colour in colours:
            seconds = int(rng.integers(3, 7))
            parts.append(scene(colour, "cut", seconds, number))
            label = COLOURS.index(colour) + 1
            steps.append({"id": str(label), "label": f"cut the {colour} thing", "segment": [second, second + seconds]})
            second += seconds
        parts.append(0.3 * random_rows(1000 + number, 2))
        features[f"v{number}"] = np.concatenate(parts).astype(np.float16)
        subset = "testing" if number % 4 == 0 else "training"
        database[f"v{number}"] = {"subset": subset, "annotation": steps}
    file = folder / "COIN.json"
    file.write_text(json.dumps({"database": database}))
    return make_store(folder / "store", features), file


def write_lines(file: Path, lines: list[dict[str, Any]]) -> Path:
    """A JSONL file."""
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
