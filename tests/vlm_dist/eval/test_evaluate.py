import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tests.vlm_dist.tasks import world
from vlm_dist.eval.evaluate import evaluate
from vlm_dist.eval.predictions import Predictions
from vlm_dist.tasks.config import TaskDataConfig
from vlm_dist.tasks.registry import make_task
from vlm_dist.train.config import FinetuneConfig


@pytest.mark.parametrize("name", ["retrieval", "coin"])
def test_an_evaluation_leaves_predictions_a_table_and_pictures(tmp_path: Path, name: str) -> None:
    reader, data = (world.clip_world if name == "retrieval" else world.step_world)(tmp_path)
    tokenizer = world.make_tokenizer()
    task = make_task(name)
    task.load(data, reader, tokenizer, world.MODEL, FinetuneConfig())
    model = task.build(world.make_vlm(tokenizer))
    result = evaluate(task, model, "test", "cpu", tmp_path / "out")
    predicted = task.predict(model, "test", "cpu")
    with np.load(result.predictions, allow_pickle=False) as stored:
        assert {name: array.tolist() for name, array in predicted.arrays.items()} == {
            name: stored[name].tolist() for name in stored.files if name != "header"
        }
        assert json.loads(stored["header"].tobytes())["info"] == predicted.info
    assert result.metrics | task.metrics(predicted) == result.metrics
    assert all(np.isfinite(value) for value in result.metrics.values())
    for picture in result.pictures:
        pixels = imread(picture)
        assert pixels.shape[1] >= 600
        assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 20
    assert {file.parent for file in result.files} == {tmp_path / "out"}


def test_an_evaluation_says_how_much_of_the_test_it_measured(tmp_path: Path) -> None:
    reader, data = world.clip_world(tmp_path)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    lost = [{"video_id": f"lost{i}", "text": "x", "split": split} for i, split in enumerate(["train", *["test"] * 3])]
    file = world.write_lines(tmp_path / "more.jsonl", lines + lost)
    tokenizer = world.make_tokenizer()
    task = make_task("retrieval")
    task.load(file, reader, tokenizer, world.MODEL, FinetuneConfig(max_missing=0.2), training=False)
    result = evaluate(task, task.build(world.make_vlm(tokenizer)), "test", "cpu", tmp_path)
    assert result.metrics["retrieval/test_items"] == 12
    assert result.metrics["retrieval/test_items_missing"] == 3
    assert "the test is on 12 of 15 test items" in task.misfits.lines


def test_the_retrieval_table_agrees_with_the_metrics(tmp_path: Path) -> None:
    reader, data = world.clip_world(tmp_path)
    tokenizer = world.make_tokenizer()
    task = make_task("retrieval")
    task.load(data, reader, tokenizer, world.MODEL, FinetuneConfig())
    result = evaluate(task, task.build(world.make_vlm(tokenizer)), "test", "cpu", tmp_path)
    rows = [json.loads(line) for line in result.table.read_text().splitlines()]
    assert len(rows) == result.metrics["retrieval/candidates"] == 12
    ranks = np.array([row["rank"] for row in rows])
    assert np.mean(ranks <= 5) == result.metrics["retrieval/recall_at_5"]
    assert np.median(ranks) == result.metrics["retrieval/median_rank"]
    for row in rows:
        first = row["best"][0]
        assert (first["video_id"] == row["video_id"]) == (row["rank"] == 1)
        assert row["caption"].split()[0] == row["video_id"].split("-")[1]
        assert (row["start"], row["end"]) == (0, 5)
        assert [b["score"] for b in row["best"]] == sorted((b["score"] for b in row["best"]), reverse=True)


def test_the_segmentation_table_agrees_with_the_metrics(tmp_path: Path) -> None:
    reader, data = world.step_world(tmp_path)
    tokenizer = world.make_tokenizer()
    task = make_task("segmentation")
    task.load(data, reader, tokenizer, world.MODEL, FinetuneConfig())
    result = evaluate(task, task.build(world.make_vlm(tokenizer)), "held-out", "cpu", tmp_path)
    rows = [json.loads(line) for line in result.table.read_text().splitlines()]
    seconds = [row["seconds"] for row in rows]
    mean = np.average([row["frame_accuracy"] for row in rows], weights=seconds)
    assert mean == pytest.approx(result.metrics["segmentation/frame_accuracy"])
    database = json.loads(data.read_text())["database"]
    for row in rows:
        steps = [[int(s["id"]), *s["segment"]] for s in database[row["video_id"]]["annotation"]]
        assert [run for run in row["truth"] if run[0]] == steps
        assert row["truth"][-1][2] == row["predicted"][-1][2] == row["seconds"]


def test_ties_can_be_counted_as_the_reference_does() -> None:
    same = np.ones((10, 4), np.float32)
    info = {"captions": ["x"] * 10, "video_ids": list("abcdefghij")}
    rows = np.zeros(10, np.int64)
    arrays = {"text": same, "video": same, "clip": np.arange(10), "start": rows, "end": rows + 1}
    predictions = Predictions("retrieval", "test", arrays, info)
    default = make_task("retrieval").metrics(predictions)
    pessimistic = make_task("retrieval", TaskDataConfig(ties="pessimistic")).metrics(predictions)
    reference = make_task("retrieval", TaskDataConfig(ties="reference")).metrics(predictions)
    assert (default["retrieval/recall_at_1"], default["retrieval/median_rank"]) == (0.1, 5.5)
    assert (reference["retrieval/recall_at_1"], reference["retrieval/median_rank"]) == (0.1, 5.5)
    assert (pessimistic["retrieval/recall_at_1"], pessimistic["retrieval/median_rank"]) == (0, 10)
    assert default["retrieval/distinct_captions"] == 1
