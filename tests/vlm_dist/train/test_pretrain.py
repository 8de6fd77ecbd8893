"""Pre-training on a real store: the same curve for any split over ranks and micro-batches, and a sane report."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from feature_store.captions import write_captions
from feature_store.config import CaptionConfig, StoreConfig
from tests.vlm_dist.tasks.world import make_store, random_rows
from tests.vlm_dist.train.ranks import run_ranks
from vlm_dist.data.config import ClipConfig, MaskConfig
from vlm_dist.errors import ConfigError, StoreError
from vlm_dist.model.checkpoint import load
from vlm_dist.model.config import ModelConfig
from vlm_dist.model.origin import read_trained_on
from vlm_dist.train.config import OptimConfig, TrainConfig
from vlm_dist.train.pretrain import PretrainJob, rank_clips
from vlm_dist.train.schedule import learning_rate, total_steps

VIDEOS = 10
STEPS = 4
CURVE = [4.878427, 5.226772, 5.214622, 5.089333]
"""Losses of `_job`'s updates on any machine, in float32."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of ten videos with captions, and the file with the rows of both splits."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["now", "stir", "the", "red", "onion", "then", "slice", "blue", "pepper", "and", "pour", "oil", "slowly"]
    lengths = {f"v{i}": int(rng.integers(6, 30)) for i in range(VIDEOS)}
    make_store(root / "store", {name: random_rows(i, n) for i, (name, n) in enumerate(lengths.items())})
    captions = {}
    for name, seconds in lengths.items():
        start = np.arange(0, seconds - 1, 1.5).tolist()
        said = [" ".join(rng.choice(words, 4)) for _ in start]
        captions[name] = {"start": start, "end": [s + 1.4 for s in start], "text": said}
    (root / "captions.json").write_text(json.dumps(captions))
    write_captions(root / "store", root / "captions.json", CaptionConfig(tokenizer="wordpiece:80"))
    np.savez(root / "split.npz", train=np.arange(8), validation=np.arange(8, VIDEOS))
    return root


def _job(corpus: Path, out: Path, **train: object) -> PretrainJob:
    settings = TrainConfig.model_validate(
        {
            "global_batch": 16,
            "micro_batch": 16,
            "max_steps": STEPS,
            "checkpoint_every": 100,
            "log_every": 1,
            "threads": 1,
            "optim": OptimConfig(lr=1e-3, warmup_steps=2),
            **train,
        }
    )
    return PretrainJob(
        store=str(corpus / "store"), snapshot="", reading=StoreConfig(check="always"), init="scratch",
        split=str(corpus / "split.npz"), out=str(out),
        model=ModelConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, dropout=0.0,
                          max_video_len=12, max_len=40),
        clips=ClipConfig(clips_per_video=4), masks=MaskConfig(), train=settings,
    )  # fmt: skip


def _curve(job: PretrainJob) -> tuple[list[float], dict[str, float]]:
    """Train on this rank; returns the losses that rank 0 reported (empty elsewhere) and the last validation."""
    import torch

    from vlm_dist.train import distributed
    from vlm_dist.train.worker import run_rank

    losses: list[float] = []

    def emit(kind: str, payload: object) -> None:
        if kind == "step" and distributed.rank() == 0:
            losses.append(payload.values["train/loss"])  # pyright: ignore[reportAttributeAccessIssue]

    outcome = run_rank(job, torch.device("cpu"), emit)
    return losses, outcome.metrics


def test_the_loss_curve_does_not_depend_on_ranks_or_accumulation(corpus: Path, tmp_path: Path) -> None:
    alone, validation = run_ranks(1, _curve, _job(corpus, tmp_path / "1"))[0]
    assert len(alone) == STEPS
    assert all(math.isfinite(loss) for loss in alone)
    pieces, _ = run_ranks(1, _curve, _job(corpus, tmp_path / "1x4", micro_batch=4))[0]
    ranks, validation_of_ranks = run_ranks(3, _curve, _job(corpus, tmp_path / "3", micro_batch=3))[0]
    assert alone == pytest.approx(CURVE, rel=1e-4), "seeds, sampling, masks, model and optimiser as they always were"
    assert pieces == pytest.approx(alone, rel=2e-5)
    assert ranks == pytest.approx(alone, rel=2e-5)
    assert validation_of_ranks["validation/loss"] == pytest.approx(validation["validation/loss"], rel=2e-5)
    # The exported model is whole and says what it was trained with.
    loaded = load(tmp_path / "3" / "model")
    assert loaded.config.feature_dim == 12
    assert loaded.tokenizer.vocab_size == loaded.config.vocab_size


def _select(job: PretrainJob) -> list[float]:
    import torch

    from vlm_dist.train.worker import run_rank

    losses: list[float] = []
    run_rank(job, torch.device("cpu"), lambda kind, p: losses.append(p["validation/loss"]) if "val" in kind else None)
    return losses


def test_the_lowest_validation_loss_chooses_what_is_exported(corpus: Path, tmp_path: Path) -> None:
    wild = {"validate_every": 1, "max_steps": 6, "optim": OptimConfig(lr=0.05, warmup_steps=1)}
    losses = run_ranks(1, _select, _job(corpus, tmp_path / "best", **wild))[0]
    lowest = 1 + int(np.argmin(losses))
    assert lowest < len(losses) == 6, "this rate is meant to make the loss rise again"
    run_ranks(1, _select, _job(corpus, tmp_path / "last", **wild, select="last"))
    run_ranks(1, _select, _job(corpus, tmp_path / "until", **wild | {"max_steps": lowest}, select="last"))
    best, last, until = (load_file(tmp_path / name / "model/model.safetensors") for name in ("best", "last", "until"))
    assert all((best[name] == until[name]).all() for name in best)
    assert any((best[name] != last[name]).any() for name in best)
    assert not list((tmp_path / "last" / "checkpoints").glob("best-*"))


def test_an_export_knows_its_features_and_every_video_of_its_trainings(corpus: Path, tmp_path: Path) -> None:
    first = _job(corpus, tmp_path / "first", max_steps=1)
    run_ranks(1, _select, first)
    model = tmp_path / "first" / "model"
    described = json.loads((model / "config.json").read_text())
    assert described["features"]["weights_sha256"] == "0" * 64
    trained_on = read_trained_on(model)
    ids = [f"v{i}" for i in range(VIDEOS)]
    assert (trained_on.count(ids), trained_on.count(ids[8:]), trained_on.complete) == (8, 0, True)
    np.savez(tmp_path / "other.npz", train=np.arange(8, VIDEOS), validation=np.arange(0))
    second = PretrainJob(**{**vars(_job(corpus, tmp_path / "second", max_steps=1)), "init": str(model),
                            "split": str(tmp_path / "other.npz")})  # fmt: skip
    run_ranks(1, _select, second)
    assert read_trained_on(tmp_path / "second" / "model").count(ids) == VIDEOS, "continued: those of both"


def test_pools_that_hold_all_are_the_global_one(corpus: Path, tmp_path: Path) -> None:
    """And a token's own video can be left out of its negatives, which is another loss, the same for any split."""
    few: dict[str, Any] = {"max_steps": 2, "micro_batch": 3}
    whole, _ = run_ranks(1, _curve, _job(corpus, tmp_path / "a", max_steps=2))[0]
    for form in ("group:2", "sample:100000"):
        same, _ = run_ranks(2, _curve, _job(corpus, tmp_path / form, **few, nce_pool=form))[0]
        assert same == pytest.approx(whole, rel=2e-5), form
    apart, _ = run_ranks(1, _curve, _job(corpus, tmp_path / "b", max_steps=2, nce_other_videos=True))[0]
    split, _ = run_ranks(2, _curve, _job(corpus, tmp_path / "c", **few, nce_other_videos=True))[0]
    assert split == pytest.approx(apart, rel=2e-5)
    assert apart[0] < whole[0] * (1 - 1e-3)


def test_a_local_pool_is_another_loss(corpus: Path, tmp_path: Path) -> None:
    whole, _ = run_ranks(1, _curve, _job(corpus, tmp_path / "a", max_steps=1))[0]
    local, _ = run_ranks(1, _curve, _job(corpus, tmp_path / "b", max_steps=1, micro_batch=4, nce_pool="local"))[0]
    assert local[0] < whole[0] - 0.01  # fewer negatives make the task easier


@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 64))
def test_ranks_share_every_clip_once(batch: int, world: int, micro: int) -> None:
    if batch < world:
        with pytest.raises(ConfigError, match="smaller than the number of workers"):
            rank_clips(batch, world, 0, micro)
        return
    shares = [rank_clips(batch, world, rank, micro) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1, "every rank takes as many steps"
    pieces = [piece for share in shares for piece in share]
    assert all(first < last for first, last in pieces)
    assert [c for first, last in pieces for c in range(first, last)] == list(range(batch))
    # An equal number of non-empty pieces may force one of them over the limit only when a rank has fewer clips.
    if batch % world == 0:
        assert all(last - first <= micro for first, last in pieces)


def test_a_store_without_captions_is_refused(tmp_path: Path, corpus: Path) -> None:
    make_store(tmp_path / "store", {"a": random_rows(0, 5)})
    job = _job(corpus, tmp_path)
    with pytest.raises(StoreError, match="has no captions"):
        PretrainJob(**{**vars(job), "store": str(tmp_path / "store")}).build(torch.device("cpu"))


def test_learning_rate_and_length() -> None:
    optim = OptimConfig(lr=5e-5, warmup_steps=1000, decay_steps=1_000_000)
    assert learning_rate(0, optim) == pytest.approx(5e-8)
    assert learning_rate(999, optim) == pytest.approx(5e-5)
    assert learning_rate(500_499, optim) == pytest.approx(2.5e-5)
    assert learning_rate(2_000_000, optim) == 0.0
    # 1.1M videos, 64 of them an update: about 17k updates an epoch (reference facts 3.3).
    assert total_steps(TrainConfig(epochs=1), 1_100_000, 32) == 17_188
    assert total_steps(TrainConfig(max_steps=7), 1_100_000, 32) == 7
