import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.reader import FeatureReader
from tests.vlm_dist.tasks import world
from tests.vlm_dist.tasks.test_retrieval import golden_vlm
from vlm_dist.data.batch import IGNORE, SpecialIds
from vlm_dist.data.records import TRAIN
from vlm_dist.errors import TaskDataError
from vlm_dist.model.config import ModelConfig
from vlm_dist.tasks.annotations import read_steps
from vlm_dist.tasks.batches import no_text
from vlm_dist.tasks.config import TaskDataConfig
from vlm_dist.tasks.segmentation import CoinTask, SegmentationBatch, SegmentationModel, SegmentationTask
from vlm_dist.tasks.windows import MergedLogits, Windows
from vlm_dist.train.config import FinetuneConfig

CFG = FinetuneConfig(held_out=0.25)
STEPS = TaskDataConfig(train_step=3, test_step=4)


def load(
    reader: FeatureReader,
    data: Path,
    cfg: FinetuneConfig = CFG,
    model: ModelConfig = world.MODEL,
    kind: type[SegmentationTask] = SegmentationTask,
    training: bool = True,
) -> SegmentationTask:
    task = kind(STEPS)
    task.load(data, reader, world.make_tokenizer(), model, cfg, training)
    return task


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureReader, Path]:
    return world.step_world(tmp_path_factory.mktemp("steps"))


def test_matches_golden(shared: Path, tmp_path: Path) -> None:
    golden = np.load(shared / "golden" / "ft_coin.npz")
    model = SegmentationModel(golden_vlm(golden, tmp_path, text_places=4), 779).eval()
    prefix = "w/mm_encoder.classifier."
    model.classifier.load_state_dict({n: torch.from_numpy(golden[prefix + n]) for n in ("weight", "bias")})
    names = ("vfeats", "vmasks", "caps", "cmasks", "targets")
    batch = SegmentationBatch(*(torch.from_numpy(golden[f"in/{name}"][0]) for name in names))
    seconds = int(golden["in/video_len"][0])
    windows = Windows.over(np.array([0]), np.array([seconds]), width=8, step=4)
    with torch.no_grad():
        logits = model.logits(batch)
        loss = model(batch)
        merged = MergedLogits(seconds, 779, logits.device)
        for window, start in zip(logits, windows.start.tolist(), strict=True):
            merged.add(window, start)
    real = batch.video_mask.numpy()  # what stands at padding is nobody's
    np.testing.assert_allclose(logits[real], golden["out/logits"][real], atol=1e-5)
    assert float(loss.sum / loss.terms) == pytest.approx(float(golden["out/loss"]), abs=1e-5)
    assert float(loss.terms) == int((batch.targets != IGNORE).sum())
    np.testing.assert_allclose(merged.mean(), golden["out/merged"], atol=1e-5)
    special = SpecialIds(pad=0, cls=int(batch.text[0, 0]), sep=int(batch.text[0, 1]), mask=0, vocab_size=400)
    text, text_mask = no_text(special, len(batch))
    assert torch.equal(text, batch.text)
    assert torch.equal(text_mask, batch.text_mask)


def naive_targets(segments: list[tuple[float, float, int]], start: int, length: int, width: int) -> list[int]:
    """Targets of one window as the reference facts 4.3 word them."""
    targets = [0] * length + [-100] * (width - length)
    for s, e, label in segments:
        if start < e and s < start + length:
            for place in range(max(0, int(np.floor(s)) - start), min(length, int(np.ceil(e)) - start)):
                targets[place] = label
    return targets


SEGMENT = st.tuples(st.floats(0, 18), st.floats(0.1, 8), st.integers(1, 6))


@given(segments=st.lists(SEGMENT, max_size=6))
@settings(max_examples=25, deadline=None)
def test_targets_are_the_reference_ones(
    tmp_path_factory: pytest.TempPathFactory, steps: tuple[FeatureReader, Path], segments: list[Any]
) -> None:
    reader, _ = steps
    video = max(range(reader.index.num_videos), key=lambda v: reader.index.n_rows[v])
    seconds = int(reader.index.n_rows[video])
    parts = [(s, s + length, label) for s, length, label in segments]  # some leave the video
    annotation = [{"id": str(c), "label": f"step {c}", "segment": [s, e]} for s, e, c in parts]
    folder = tmp_path_factory.mktemp("targets")
    file = folder / "COIN.json"
    own = reader.index.video_id(video)
    other = {"v0", "v1"} - {own}
    database = {own: {"subset": "training", "annotation": annotation}}
    database[other.pop()] = {"subset": "testing", "annotation": []}
    file.write_text(json.dumps({"database": database}))
    task = load(reader, file, FinetuneConfig(select_on="last", max_missing=1))
    batch = task.train_batch(np.arange(task.num_train_items), (0, 0))
    starts = Windows.over(np.array([0]), np.array([seconds]), 8, 3).start.tolist()
    expected = [naive_targets(parts, start, min(8, seconds - start), 8) for start in starts]
    assert batch.targets.tolist() == expected
    rows = reader.read(video)
    for row, start in enumerate(starts):
        window = rows[start : start + 8]
        np.testing.assert_array_equal(batch.video[row, : len(window)], window)
        assert batch.video_mask[row].sum() == len(window)


def test_splits_and_summary(steps: tuple[FeatureReader, Path]) -> None:
    task = load(*steps)
    summary = task.summary
    assert (summary["train"], summary["held-out"], summary["test"]) == (9, 3, 4)
    assert summary["num_classes"] == 5
    assert summary["labels_that_occur"] == 4
    assert task.num_train_items == summary["train_windows"] > 9
    coin = load(*steps, kind=CoinTask)
    assert coin.num_classes == 779
    assert coin.build(world.make_vlm(world.make_tokenizer())).classifier.weight.shape == (779, 32)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"id": "0"}, SegmentationTask, "video v1: label id '0' is not a whole number from 1"),
        ({"id": "779"}, CoinTask, "video v1: label id 779 is above 778"),
    ],
)
def test_annotations_that_cannot_be_used(
    tmp_path: Path, steps: tuple[FeatureReader, Path], change: dict[str, Any], kind: type[SegmentationTask], said: str
) -> None:
    document = json.loads(steps[1].read_text())
    document["database"]["v1"]["annotation"][1].update(change)
    file = tmp_path / "COIN.json"
    file.write_text(json.dumps(document))
    with pytest.raises(TaskDataError, match=said):
        load(steps[0], file, kind=kind)


def test_steps_that_leave_their_video_are_cut_or_left_out(tmp_path: Path, steps: tuple[FeatureReader, Path]) -> None:
    annotation = [
        {"id": "2", "label": "b", "segment": [1, 90]},
        {"id": "1", "label": "a", "segment": [90, 91]},
    ]
    file = tmp_path / "COIN.json"
    file.write_text(json.dumps({"database": {"v1": {"subset": "testing", "annotation": annotation}}}))
    with pytest.raises(TaskDataError, match=r"video v1: segment 1 to 90 s, but the video has (?s:.*)2 of 2 test"):
        load(steps[0], file, FinetuneConfig(max_missing=0.9), training=False)
    task = load(steps[0], file, FinetuneConfig(max_missing=1), training=False)
    assert (task.misfits.outside, task.misfits.cut) == (1, 1)
    truth = task.predict(task.build(world.make_vlm(world.make_tokenizer())), "test", "cpu").arrays["truth"]
    assert truth.tolist() == [0] + [2] * (len(truth) - 1)


def test_empty_test_split_and_missing_features(tmp_path: Path, steps: tuple[FeatureReader, Path]) -> None:
    document = json.loads(steps[1].read_text())
    file = tmp_path / "COIN.json"
    for entry in document["database"].values():
        entry["subset"] = "training"
    file.write_text(json.dumps(document))
    with pytest.raises(TaskDataError, match="no test items"):
        load(steps[0], file)
    document["database"]["lost"] = document["database"]["v1"] | {"subset": "testing"}
    file.write_text(json.dumps(document))
    with pytest.raises(TaskDataError, match=r"1 of 1 test items \(100.0%\).*lost"):
        load(steps[0], file)
    with pytest.raises(TaskDataError, match="no test items with features"):
        load(steps[0], file, FinetuneConfig(max_missing=1))


def test_the_limit_of_segments_that_leave_holds_for_each_split(
    tmp_path: Path, steps: tuple[FeatureReader, Path]
) -> None:
    """The test video's only step lies behind its end, one of forty in the file; evaluation asks for no other."""
    document = json.loads(steps[1].read_text())
    behind = {"id": "1", "label": "a", "segment": [500, 501]}
    for video, entry in document["database"].items():
        entry["subset"] = "testing" if video == "v1" else "training"
    document["database"]["v1"]["annotation"] = [behind]
    file = tmp_path / "COIN.json"
    file.write_text(json.dumps(document))
    for training in (True, False):
        with pytest.raises(TaskDataError, match="1 of 1 test segments leave"):
            load(steps[0], file, FinetuneConfig(select_on="last", max_missing=0.1), training=training)
    for entry in document["database"].values():
        entry["annotation"] = [behind] if entry["subset"] == "training" else []
    file.write_text(json.dumps(document))
    with pytest.raises(TaskDataError, match="15 of 15 training segments leave"):
        load(steps[0], file, FinetuneConfig(select_on="last", max_missing=0.1))
    assert load(steps[0], file, training=False).misfits.lines == []


def test_predictions_do_not_depend_on_the_batch(steps: tuple[FeatureReader, Path]) -> None:
    task = load(*steps)
    model = task.build(world.make_vlm(world.make_tokenizer()))
    few, many = (task.predict(model, "test", "cpu", batch).arrays for batch in (2, 64))
    np.testing.assert_array_equal(few["predicted"], many["predicted"])
    # The definition: each video alone, one window at a time, mean of the windows' logits at each second.
    reader, file = steps
    steps_read = read_steps(file)
    tests = [v for v, part in zip(steps_read.video_ids, steps_read.split, strict=True) if part != TRAIN]
    expected = []
    for video in tests:
        rows = torch.from_numpy(reader.read(reader.index.find(video)))
        total, count = torch.zeros(len(rows), 5), torch.zeros(len(rows), 1)
        for start in Windows.over(np.array([0]), np.array([len(rows)]), 8, 4).start.tolist():
            window = rows[start : start + 8][None]
            mask = torch.ones(window.shape[:2], dtype=torch.bool)
            text = no_text(SpecialIds.of(world.make_tokenizer()), 1)
            with torch.no_grad():
                total[start : start + 8] += model.logits(SegmentationBatch(window, mask, *text, mask))[0]
            count[start : start + 8] += 1
        expected.append((total / count).argmax(dim=1))
    np.testing.assert_array_equal(many["predicted"], np.concatenate(expected))


def test_it_learns_and_is_picklable(steps: tuple[FeatureReader, Path]) -> None:
    task = pickle.loads(pickle.dumps(load(*steps)))
    torch.manual_seed(0)
    model = task.build(world.make_vlm(world.make_tokenizer()))
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    order = np.random.default_rng(0)
    for epoch in range(40):
        model.train()
        loss = model(task.train_batch(order.permutation(task.num_train_items)[:24], (0, epoch)))
        optimiser.zero_grad()
        (loss.sum / loss.terms).backward()
        optimiser.step()
    metrics = task.metrics(task.predict(model, "test", "cpu"))
    assert metrics["segmentation/frame_accuracy"] > 0.8
    assert metrics["segmentation/frame_accuracy"] > metrics["segmentation/constant_frame_accuracy"] + 0.3
    assert metrics["segmentation/frame_accuracy_no_background"] > 0.8


def test_zero_shot_scores_seconds_against_label_texts(steps: tuple[FeatureReader, Path]) -> None:
    task = load(*steps, kind=CoinTask, training=False)
    tokenizer = world.make_tokenizer()
    vlm = world.make_vlm(tokenizer).eval()
    model = task.build_zero_shot(vlm)
    predictions = task.predict(model, "test", "cpu")
    assert set(np.unique(predictions.arrays["predicted"])) <= {1, 2, 3, 4}
    # A second's logits are its hidden state times the pooled text of each label, encoded alone.
    video, text_batch = task.train_batch(np.arange(1), (0, 0)), tokenizer.encode("cut the blue thing")
    text = torch.tensor([[tokenizer.cls_id, tokenizer.sep_id, *text_batch, tokenizer.sep_id]])
    mask = torch.ones_like(text, dtype=torch.bool)
    with torch.no_grad():
        alone = vlm.encode(torch.zeros(1, 1, world.WIDTH), torch.ones(1, 1, dtype=torch.bool), text, mask, "isolated")
        _, pooled = vlm.pool(alone, torch.ones(1, 1, dtype=torch.bool), mask)
        hidden = model.encode(video)[0, 1 : 1 + video.video.shape[1]]
        label = world.COLOURS.index("blue") + 1
        np.testing.assert_allclose(model.logits(video)[0, :, label], hidden @ pooled[0], atol=1e-4)
    metrics = task.metrics(predictions)
    assert metrics["coin/chance_frame_accuracy_no_background"] == pytest.approx(1 / 4)
    assert metrics["coin/chance_frame_accuracy"] == pytest.approx(1 / 5), "the same labels, and the background"
    assert metrics["coin/frame_accuracy"] <= 1 - metrics["coin/background_share"]


def test_real_coin_annotations(shared: Path, tmp_path: Path) -> None:
    """Forty real videos with real time lines: all segments fit, and background is as common as it is known to be."""
    source = read_steps(shared / "data" / "coin" / "COIN.json.gz")
    longest = np.zeros(len(source.video_ids))
    np.maximum.at(longest, source.segment_video, source.end)
    chosen = np.random.default_rng(0).permutation(len(source.video_ids))[:40]
    features = {source.video_ids[i]: world.random_rows(int(i), int(np.ceil(longest[i]))) for i in chosen}
    reader = world.make_store(tmp_path / "store", features)
    cfg = FinetuneConfig(max_missing=1.0)
    task = load(reader, shared / "data" / "coin" / "COIN.json.gz", cfg, kind=CoinTask)
    assert len(task.summary["missing"]) == 10030
    assert task.summary["train"] + task.summary["held-out"] + task.summary["test"] == 40
    model = task.build(world.make_vlm(world.make_tokenizer()))
    metrics = task.metrics(task.predict(model, "test", "cpu"))
    assert 0.3 < metrics["coin/constant_frame_accuracy"] == metrics["coin/background_share"] < 0.8
