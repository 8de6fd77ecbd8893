import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feature_store.reader import FeatureReader
from tests.vlm_dist.tasks import world
from tests.vlm_dist.train.ranks import run_ranks
from vlm_dist.errors import CheckpointError, TaskDataError
from vlm_dist.model.config import ModelConfig
from vlm_dist.model.foreign import read_reference
from vlm_dist.model.vlm import VLM
from vlm_dist.tasks.batches import TaskBatch
from vlm_dist.tasks.config import TaskDataConfig
from vlm_dist.tasks.retrieval import RetrievalModel, RetrievalTask
from vlm_dist.train.config import FinetuneConfig

CFG = FinetuneConfig(held_out=0.25)


def load(
    reader: FeatureReader,
    data: Path,
    cfg: FinetuneConfig = CFG,
    model: ModelConfig = world.MODEL,
    training: bool = True,
    **options: Any,
) -> RetrievalTask:
    task = RetrievalTask(TaskDataConfig(**options))
    task.load(data, reader, world.make_tokenizer(), model, cfg, training)
    return task


def line(video: str, split: str = "test", text: str = "cut the red thing", **span: float) -> dict[str, Any]:
    return {"video_id": video, "text": text, "split": split, **span}


@pytest.fixture(scope="module")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> FeatureReader:
    seconds = {"a": 30, "b": 5, "c": 1}
    features = {video: world.random_rows(n, n) for video, n in seconds.items()}
    return world.make_store(tmp_path_factory.mktemp("retrieval") / "store", features | {"broken": None})


def test_a_batch_is_the_rows_and_the_pieces_of_its_clips(tmp_path: Path, small_store: FeatureReader) -> None:
    long_text = "cut stir pour " * 200
    file = world.write_lines(
        tmp_path / "clips.jsonl",
        [
            line("a", "train", start=2.5, end=7.1),
            line("b", "train"),
            line("a", "train", long_text, start=3, end=29.9),
            line("c"),
        ],
    )
    task = load(small_store, file, FinetuneConfig(select_on="last"))
    assert task.num_train_items == 3
    assert task.summary["cut_captions"] == 1
    batch = pickle.loads(pickle.dumps(task)).train_batch(np.array([2, 0, 1]), (0, 0))
    a, b = (small_store.read(small_store.index.find(video)) for video in "ab")
    for row, expected in enumerate([a[3:11], a[2:8], b]):
        np.testing.assert_array_equal(batch.video[row, : len(expected)], expected)
        assert batch.video_mask[row].sum() == len(expected)
        assert not batch.video[row, len(expected) :].any()
    tokenizer = world.make_tokenizer()
    pieces = tokenizer.encode("cut the red thing")
    row = [tokenizer.cls_id, tokenizer.sep_id, *pieces, tokenizer.sep_id]
    assert batch.text[1].tolist() == row + [tokenizer.pad_id] * (batch.text.shape[1] - len(row))
    assert batch.text_mask.sum(dim=1).tolist() == [9 + 3, len(row), len(row)]
    assert batch.text[0].tolist() == [tokenizer.cls_id, tokenizer.sep_id, *tokenizer.encode(long_text)[:9],
                                      tokenizer.sep_id]  # fmt: skip
    assert len(batch) == 3


def test_missing_videos_are_listed_or_refused(tmp_path: Path, small_store: FeatureReader) -> None:
    file = world.write_lines(tmp_path / "x.jsonl", [line("a"), line("b"), line("c"), line("broken"), line("never")])
    with pytest.raises(TaskDataError, match=r"2 of 5 test items \(40.0%\) have no features.*2 videos: broken, never"):
        load(small_store, file, training=False)
    task = load(small_store, file, FinetuneConfig(max_missing=0.4), training=False)
    assert task.summary["missing"] == ["broken", "never"]
    assert task.misfits.lines == [
        "2 annotated videos have no features in the store and are left out: broken, never",
        "the test is on 3 of 5 test items",
    ]
    assert task.summary["test"] == 3


def test_the_limit_of_missing_videos_holds_for_each_split(tmp_path: Path, small_store: FeatureReader) -> None:
    """Nine tenths of the test may be missing where it is a tenth of the file: of all items that is less than 10 %."""
    train = [line("a", "train", start=i, end=i + 1) for i in range(20)]
    held = [line("c", "val")] * 4
    for split, name in (("test", "test"), ("val", "held-out")):
        lost = [line("never", split), line("b", "test")]
        file = world.write_lines(tmp_path / f"{split}.jsonl", [*train, *held, *lost])
        with pytest.raises(TaskDataError, match=f"1 of . {name} items"):
            load(small_store, file, FinetuneConfig(max_missing=0.19))
    task = load(small_store, file, FinetuneConfig(max_missing=0.19), training=False)  # its test is whole
    assert task.misfits.lines == []
    assert (task.misfits.test_items, task.misfits.test_items_missing) == (1, 0)


def test_an_evaluation_needs_no_training_videos(tmp_path: Path, small_store: FeatureReader) -> None:
    lines = [line(f"absent{i}", "train") for i in range(30)] + [line("b", "train", start=4, end=60)] * 9 + [line("a")]
    file = world.write_lines(tmp_path / "x.jsonl", lines)
    with pytest.raises(TaskDataError, match="30 of 39 training items"):
        load(small_store, file)
    task = load(small_store, file, training=False)
    assert task.misfits.lines == []
    assert task.summary["test"] == 1


def test_clips_that_leave_their_video_are_told_or_refused(tmp_path: Path, small_store: FeatureReader) -> None:
    fine = [line("a", start=s, end=s + 1) for s in range(17)]
    lines = [*fine, line("b", start=5, end=6), line("b", start=3, end=9), line("b", start=4, end=5.9)]
    file = world.write_lines(tmp_path / "x.jsonl", lines)
    with pytest.raises(TaskDataError, match=r"line 18, video b: segment 5 to 6 s.*\n.*\n.*2 of 20 test segments leave"):
        load(small_store, file, FinetuneConfig(max_missing=0.05), training=False)
    task = load(small_store, file, training=False)
    assert (task.misfits.outside, task.misfits.cut, task.summary["test"]) == (1, 1, 19)
    assert task.misfits.lines == [
        "1 segments lie behind the end of their video and are left out, 1 end behind it and are cut; the first: "
        "line 18, video b: segment 5 to 6 s, but the video has 5 s of features",
        "the test is on 19 of 20 test items",
    ]
    found = task.predict(task.build(world.make_vlm(world.make_tokenizer())), "test", "cpu").arrays
    assert found["start"].tolist()[-2:] == [3, 4]
    assert found["end"].tolist()[-2:] == [5, 5]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([line("a", "train"), line("b", "train"), line("b")], "1 videos are in more than one split.*: b"),
        ([line("a", "train"), line("b", "train")], "no test items with features"),
        ([line("a")], "no training items with features"),
        ([line("a", "train"), line("b")], "no held-out items with features; set finetune.held_out"),
        ([line("b", start=1, end=9)], "line 1, video b: segment 1 to 9 s, but the video has 5 s"),
        ([line("b", start=5, end=5.5)], "segment 5 to 5.5 s"),
    ],
)
def test_annotations_that_cannot_be_used(
    tmp_path: Path, small_store: FeatureReader, lines: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(TaskDataError, match=said):
        load(small_store, world.write_lines(tmp_path / "x.jsonl", lines))


def test_another_width_or_vocabulary_is_refused(tmp_path: Path, small_store: FeatureReader) -> None:
    file = world.write_lines(tmp_path / "x.jsonl", [line("a")])
    with pytest.raises(TaskDataError, match="features are 12 wide, the checkpoint reads 512"):
        load(small_store, file, model=world.MODEL.model_copy(update={"feature_dim": 512}), training=False)
    with pytest.raises(CheckpointError, match="word pieces, the checkpoint only 10"):
        load(small_store, file, model=world.MODEL.model_copy(update={"vocab_size": 10}), training=False)


def test_whole_videos_are_held_out_and_always_the_same(tmp_path: Path) -> None:
    reader, file = world.clip_world(tmp_path)
    task, again = load(reader, file), load(reader, file)
    assert task.summary["train"] + task.summary["held-out"] == 36
    assert task.summary["held-out"] == 9
    vlm = world.make_vlm(world.make_tokenizer())
    held = task.predict(task.build(vlm), "held-out", "cpu").info["video_ids"]
    assert held == again.predict(again.build(vlm), "held-out", "cpu").info["video_ids"]
    assert load(reader, file, FinetuneConfig(select_on="test")).num_train_items == 36


def test_unique_captions_and_several_captions_of_a_clip(tmp_path: Path, small_store: FeatureReader) -> None:
    lines = [
        line("a", start=0, end=4),
        line("b", text="Cut the RED  thing"),
        line("a", text="stir it", start=0.2, end=3.5),  # the same rows as the first: one candidate
        line("c", text="pour"),
    ]
    file = world.write_lines(tmp_path / "x.jsonl", lines)
    vlm = world.make_vlm(world.make_tokenizer())
    task = load(small_store, file, training=False)
    predictions = task.predict(task.build_zero_shot(vlm), "test", "cpu", batch=3)
    assert predictions.arrays["clip"].tolist() == [0, 1, 0, 2]
    assert predictions.info["video_ids"] == ["a", "b", "c"]
    metrics = task.metrics(predictions)
    assert metrics["retrieval/candidates"] == 3
    assert metrics["retrieval/distinct_captions"] == 3
    assert metrics["retrieval/chance_recall_at_1"] == pytest.approx(1 / 3)
    unique = load(small_store, file, training=False, unique_captions=True)
    kept = unique.predict(unique.build(vlm), "test", "cpu")
    assert kept.info["captions"] == ["cut the red thing", "stir it", "pour"]
    # An item's embedding does not depend on its neighbours in the batch, nor on the padding that they bring.
    np.testing.assert_allclose(kept.arrays["text"], predictions.arrays["text"][[0, 2, 3]], atol=2e-6)


def test_it_learns(tmp_path: Path) -> None:
    reader, file = world.clip_world(tmp_path)
    task = load(reader, file)
    model = task.build(world.make_vlm(world.make_tokenizer()))
    before = task.metrics(task.predict(model, "test", "cpu"))
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    order = np.random.default_rng(0)
    for epoch in range(40):
        model.train()
        batch = task.train_batch(order.permutation(task.num_train_items)[:24], (0, epoch))
        loss = model(batch)
        optimiser.zero_grad()
        (loss.sum / loss.terms).backward()
        optimiser.step()
    after = task.metrics(task.predict(model, "test", "cpu"))
    assert before["retrieval/recall_at_1"] < 0.5
    assert after["retrieval/recall_at_1"] > 0.8
    assert after["retrieval/video_to_text_recall_at_1"] > 0.8
    assert after[task.selection.metric] > before[task.selection.metric]


def test_matches_golden(shared: Path, tmp_path: Path) -> None:
    golden = np.load(shared / "golden" / "ft_joint.npz")
    model = RetrievalModel(golden_vlm(golden, tmp_path, text_places=16))
    batch = TaskBatch(*(torch.from_numpy(golden[f"in/{name}"]) for name in ("vfeats", "vmasks", "caps", "cmasks")))
    video, text = model.embeddings(batch)
    np.testing.assert_allclose(video.detach(), golden["out/train/pooled_video"], atol=1e-5)
    np.testing.assert_allclose(text.detach(), golden["out/train/pooled_text"], atol=1e-5)
    loss = model(batch)
    assert (loss.sum / loss.terms).item() == pytest.approx(float(golden["out/loss/T2VContraLoss"]), abs=1e-5)


def golden_vlm(golden: Any, folder: Path, text_places: int) -> VLM:
    """The encoder of a golden file of an end task (its prediction head is not in there, and not used)."""
    file = folder / "reference.pt"
    torch.save({key[2:]: torch.from_numpy(golden[key]) for key in golden.files if key.startswith("w/")}, file)
    weights = read_reference(file)
    sizes = {"num_heads": 4, "max_video_len": 8, "max_len": 8 + text_places, "dropout": 0.0}
    vlm = VLM(ModelConfig(**sizes, **weights.sizes))
    found = vlm.load_state_dict(weights.tensors, strict=False)
    assert all(key.startswith("head.") for key in found.missing_keys)
    assert all(key.startswith("classifier.") for key in found.unexpected_keys)
    return vlm.eval()


SIZES = (5, 3)


def gradients_of_share(vlm: VLM, batch: TaskBatch) -> tuple[float, list[np.ndarray]]:
    """Loss and averaged gradients as the trainer makes them: sum * W / N, then the mean over ranks."""
    from vlm_dist.train import distributed

    world_size, rank = distributed.world_size(), distributed.rank()
    share = slice(0, len(batch)) if world_size == 1 else slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    model = RetrievalModel(vlm)
    own = TaskBatch(batch.video[share], batch.video_mask[share], batch.text[share], batch.text_mask[share])
    total, count = model(own)
    assert float(count) == len(own)
    (total * (world_size / float(distributed.all_sum(count)))).backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    mean = [(distributed.all_sum(g) / world_size).numpy() for g in grads]
    return float(distributed.all_sum(total.detach())) / len(batch), mean


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Candidates are the videos of all ranks, of unequal shares, and the gradients those of one big batch."""
    reader, file = world.clip_world(tmp_path)
    task = load(reader, file)
    batch = task.train_batch(np.arange(sum(SIZES)), (0, 0))
    vlm = world.make_vlm(world.make_tokenizer())
    loss, expected = gradients_of_share(vlm, batch)
    vlm.zero_grad(set_to_none=True)
    for other_loss, grads in run_ranks(2, gradients_of_share, vlm, batch):
        assert other_loss == pytest.approx(loss, abs=1e-6)
        for ours, theirs in zip(grads, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)
    assert max(np.abs(g).max() for g in expected) > 1e-3
