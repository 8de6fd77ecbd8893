"""The DeepSpeed engine and its checkpoints: exact resume, any world size, the gradient of the global mean."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.vlm_dist.train.ranks import run_ranks
from vlm_dist.errors import CheckpointError, ConfigError
from vlm_dist.train import distributed
from vlm_dist.train.checkpoints import CheckpointFolder
from vlm_dist.train.config import OptimConfig
from vlm_dist.train.engine import Engine, EngineState, resolve_precision
from vlm_dist.train.schedule import learning_rate

ROWS = 8  # rows of the global batch, whatever the world size


def _module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3))


def _allow_fp16() -> None:
    """DeepSpeed refuses fp16 on CPUs, which can do it slowly: so that scaling and resume are tested here."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True  # pyright: ignore[reportAttributeAccessIssue]


def _engine(accumulation: int, stage: int = 1, precision: str = "fp32") -> Engine:
    return Engine(_module(), OptimConfig(lr=1e-2, warmup_steps=2, clip_norm=0.5), precision=precision,
                  zero_stage=stage, accumulation=accumulation, device=torch.device("cpu"))  # fmt: skip


def _steps(engine: Engine, first: int, last: int) -> list[float]:
    """Train on a batch that depends on the step alone; returns the gradient norms."""
    norms = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randn(ROWS, 7, generator=generator)
        share = rows.chunk(distributed.world_size())[distributed.rank()]
        outcome = None
        for micro in share.chunk(engine.accumulation):
            loss = engine(micro.to(engine.dtype)).float().pow(2).sum() / ROWS * engine.scale
            engine.backward(loss)
            outcome = engine.update(learning_rate(engine.applied, OptimConfig(lr=1e-2, warmup_steps=2)))
        assert outcome is not None
        norms.append(outcome.grad_norm)
    return norms


def _train(first: int, last: int, folder: str, accumulation: int, stage: int = 1, precision: str = "fp32") -> tuple:
    """Resume from `folder` at step `first` (if not 0), train, save; returns (norms, final weights)."""
    if precision == "fp16":
        _allow_fp16()
    engine = _engine(accumulation, stage, precision)
    checkpoints = CheckpointFolder(Path(folder))
    if first:
        newest, complaints = checkpoints.newest()
        assert newest is not None
        assert newest.step == first
        assert not complaints
        engine.load_state(checkpoints.load(newest)[0])
        distributed.barrier()
    norms = _steps(engine, first, last)
    state = engine.export_state()
    if distributed.rank() == 0:
        checkpoints.save(last, state, {})
    distributed.barrier()
    return norms, {k: v.numpy() for k, v in state.weights.items()}


def _train_twice(folder: str, *how: Any) -> tuple:
    """Six steps, and the first three of them as a run of its own, on the same ranks; returns what the six gave."""
    _train(0, 3, f"{folder}/cut", *how)
    return _train(0, 6, f"{folder}/whole", *how)


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), (1, "fp16")])
def test_resumed_run_is_bit_identical(tmp_path: Path, stage: int, precision: str) -> None:
    whole = run_ranks(2, _train_twice, str(tmp_path), 2, stage, precision)[0]
    resumed = run_ranks(2, _train, 3, 6, str(tmp_path / "cut"), 2, stage, precision)[0]
    assert resumed[0] == whole[0][3:]
    for name, tensor in whole[1].items():
        assert (resumed[1][name] == tensor).all(), name


def test_world_size_and_accumulation_do_not_change_the_curve(tmp_path: Path) -> None:
    alone = run_ranks(1, _train, 0, 6, str(tmp_path / "one"), 4)[0]
    run_ranks(2, _train, 0, 3, str(tmp_path / "elastic"), 1)
    elastic = run_ranks(1, _train, 3, 6, str(tmp_path / "elastic"), 2)[0]
    assert elastic[0] == pytest.approx(alone[0][3:], rel=1e-5)
    for name, tensor in alone[1].items():
        assert elastic[1][name] == pytest.approx(tensor, abs=1e-6), name


def _reference(steps: int) -> dict[str, torch.Tensor]:
    """The same training in plain PyTorch: mean gradient of the whole batch, clip, AdamW."""
    module = _module()
    optim = OptimConfig(lr=1e-2, warmup_steps=2)
    adam = torch.optim.AdamW(module.parameters(), betas=optim.betas, eps=optim.eps, weight_decay=0.0)
    for step in range(steps):
        rows = torch.randn(ROWS, 7, generator=torch.Generator().manual_seed(step))
        adam.zero_grad()
        (module(rows).pow(2).sum() / ROWS).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        adam.param_groups[0]["lr"] = learning_rate(step, optim)
        adam.step()
    return module.state_dict()


def test_equals_plain_pytorch(tmp_path: Path) -> None:
    weights = run_ranks(2, _train, 0, 5, str(tmp_path), 2)[0][1]
    for name, tensor in _reference(5).items():
        assert weights[name] == pytest.approx(tensor.numpy(), abs=2e-6), name


def test_state_of_another_model_is_refused() -> None:
    good = {name: p.detach() for name, p in _module().named_parameters()}
    counters = {"adam_step": 0.0, "applied": 0, "skipped": 0, "scaler": {}, "precision": "fp32"}
    refused = run_ranks(1, _refusals, EngineState(good, {}, counters))[0]
    assert "extra.weight" in refused[0]
    assert "0.weight has shape (5, 6)" in refused[1]


def _refusals(state: EngineState) -> list[str]:
    engine = _engine(1)
    messages = []
    for change in ({"extra.weight": torch.zeros(1)}, {"0.weight": torch.zeros(5, 6)}):
        with pytest.raises(CheckpointError) as caught:
            engine.load_state(EngineState(state.weights | change, {}, state.counters))
        messages.append(str(caught.value))
    return messages


def test_precision() -> None:
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"
    assert resolve_precision("auto", torch.device("cuda")) == "fp16"
    with pytest.raises(ConfigError, match="fp16 needs GPUs"):
        resolve_precision("fp16", torch.device("cpu"))
