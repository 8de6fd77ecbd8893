"""Fine-tuning on real ranks: what the exported model keeps, and what cannot be shared out."""

import json
from pathlib import Path
from typing import Any

import pytest

from feature_store.config import StoreConfig
from tests.vlm_dist.tasks import world
from tests.vlm_dist.train.ranks import run_ranks
from vlm_dist.model.checkpoint import save_vlm
from vlm_dist.model.origin import TrainedOn, read_trained_on
from vlm_dist.tasks.config import TaskDataConfig
from vlm_dist.train.config import FinetuneConfig, TrainConfig
from vlm_dist.train.finetune import FinetuneJob


def _job(folder: Path, data: Path, trained_on: TrainedOn | None, **finetune: Any) -> FinetuneJob:
    tokenizer = world.make_tokenizer()
    save_vlm(world.make_vlm(tokenizer), tokenizer, folder / "init", trained_on=trained_on)
    return FinetuneJob(
        "retrieval", TaskDataConfig(), str(data), str(folder / "store"), "", StoreConfig(check="always"),
        str(folder / "init"), str(folder / "out"), TrainConfig(threads=1), FinetuneConfig(**finetune),
    )  # fmt: skip


def _run(job: FinetuneJob) -> str:
    import torch

    from vlm_dist.errors import ConfigError
    from vlm_dist.train.worker import run_rank

    try:
        return str(run_rank(job, torch.device("cpu"), lambda kind, payload: None).step)
    except ConfigError as error:
        return str(error)


def test_fewer_items_than_workers_is_said(tmp_path: Path) -> None:
    world.make_store(tmp_path / "store", {f"v{i}": world.random_rows(i, 6) for i in range(3)})
    lines = [{"video_id": f"v{i}", "text": "cut", "split": "test" if i == 2 else "train"} for i in range(3)]
    data = world.write_lines(tmp_path / "clips.jsonl", lines)
    said = run_ranks(3, _run, _job(tmp_path, data, None, max_steps=2, select_on="last"))
    assert all("2 training items cannot be shared by 3 workers" in text for text in said), said


@pytest.mark.parametrize("before", [None, TrainedOn.of(["long ago"])])
def test_an_export_keeps_what_its_model_was_trained_on(tmp_path: Path, before: TrainedOn | None) -> None:
    _, data = world.clip_world(tmp_path)
    assert run_ranks(1, _run, _job(tmp_path, data, before, max_steps=2, select_on="last", batch=8)) == ["2"]
    kept = read_trained_on(tmp_path / "out" / "model")
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    ids = {split: {line["video_id"] for line in lines if line["split"] == split} for split in ("train", "test")}
    assert kept.count(ids["train"]) == len(ids["train"]) == 36
    assert kept.count(ids["test"]) == 0
    assert kept.complete == bool(before)
    assert kept.count(["long ago"]) == bool(before)
    assert json.loads((tmp_path / "out/model/config.json").read_text())["features"]["extractor"] == "s3d"
