"""Action segmentation: a step label for every second (… pre-trained model → COIN → frame accuracy; paper Table 4).

Windows, targets, dummy text, head and merging are those of the reference facts 4.3. One choice is ours: an item is one
window, so that a batch mixes windows of many videos and memory does not depend on how long a video is (the reference
takes all windows of one video). 128 windows are as many as the reference's 8 videos have on average (15.4 each).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feature_store.reader import FeatureReader
from feature_store.tokenizer import Tokenizer
from vlm_dist.data.batch import IGNORE, SpecialIds
from vlm_dist.data.records import HELD_OUT, TEST, TRAIN, refuse
from vlm_dist.errors import TaskDataError
from vlm_dist.eval.predictions import Predictions
from vlm_dist.metrics.segmentation import BACKGROUND, class_accuracies, segmentation_metrics
from vlm_dist.model.config import ModelConfig
from vlm_dist.model.vlm import VLM
from vlm_dist.tasks.annotations import StepAnnotations, read_steps
from vlm_dist.tasks.base import LossSum, Recipe, Selection, Split, Task, TaskModel
from vlm_dist.tasks.batches import TaskBatch, frame_text, gather_windows, no_text, pack_texts
from vlm_dist.tasks.items import (
    Misfits,
    check_bounds,
    check_missing,
    check_splits,
    coverage_of_test,
    hold_out,
    special_ids,
)
from vlm_dist.tasks.windows import MergedLogits, Windows
from vlm_dist.train.config import FinetuneConfig


@dataclass(frozen=True)
class SegmentationBatch(TaskBatch):
    """Windows and `targets` (B, V) int64, the class of each second, IGNORE at padding."""

    targets: torch.Tensor


class SegmentationModel(TaskModel):
    """Encoder and a linear layer from the hidden state of every second to its class (no dropout, as the reference)."""

    def __init__(self, vlm: VLM, num_classes: int) -> None:
        super().__init__(vlm)
        word = next(vlm.parameters())
        self.classifier = torch.nn.Linear(vlm.config.hidden_size, num_classes, device=word.device, dtype=word.dtype)
        torch.nn.init.normal_(self.classifier.weight, std=0.02)
        torch.nn.init.zeros_(self.classifier.bias)

    def logits(self, batch: TaskBatch) -> torch.Tensor:
        """Scores (B, V, classes) float32 of the video places."""
        hidden = self.encode(batch)[:, 1 : 1 + batch.video.shape[1]]
        return self.classifier(hidden).float()

    def forward(self, batch: TaskBatch) -> LossSum:
        """Cross-entropy over the seconds that have a class."""
        assert isinstance(batch, SegmentationBatch)
        logits = self.logits(batch).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return LossSum(loss, (batch.targets != IGNORE).sum().float())


class SegmentationTask(Task):
    """Action segmentation on annotations in the form of COIN.json; classes are 0 (background) to the largest label id.

    Predictions: `predicted` and `truth` (S,) int32 over the seconds of all videos, `offsets` (videos + 1,); info has
    `video_ids`, `class_names` (id → label), `num_classes` and `constant` (the most frequent class in training).
    """

    name = "segmentation"
    kind = "segmentation"
    recipe = Recipe(batch=128, epochs=8, lr=5e-5, warmup_steps=122)
    num_classes = 0

    @property
    def selection(self) -> Selection:
        """Frame accuracy, background counted (the paper's metric; the reference takes the lowest loss on test)."""
        return Selection(f"{self.name}/frame_accuracy", "max")

    def load(
        self,
        data: Path,
        reader: FeatureReader,
        tokenizer: Tokenizer,
        model: ModelConfig,
        cfg: FinetuneConfig,
        training: bool = True,
    ) -> None:
        """See `Task.load`."""
        steps = read_steps(data)
        self.num_classes = self._count_classes(steps)
        self._special: SpecialIds = special_ids(reader, tokenizer, model)
        numbers = reader.index.find_many(steps.video_ids)
        missing = check_missing(data, steps.video_ids, numbers, steps.split, cfg.max_missing, training)
        kept = np.flatnonzero(numbers >= 0)
        self._ids = [steps.video_ids[i] for i in kept]
        self._reader, self._places, self._videos = reader, model.max_video_len, numbers[kept]
        self._seconds = np.asarray(reader.index.n_rows)[self._videos].astype(np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(self._seconds)])
        self._labels, misfits = self._label_seconds(steps, kept, cfg.max_missing, training)
        self._misfits = misfits._replace(missing=missing, **coverage_of_test(steps.split, kept))
        split = hold_out(self._ids, steps.split[kept], cfg)
        check_splits(data, split, cfg, training)
        self._test_videos: dict[Split, np.ndarray] = {
            "held-out": np.flatnonzero(split == HELD_OUT), "test": np.flatnonzero(split == TEST)
        }  # fmt: skip
        train = np.flatnonzero(split == TRAIN)
        self._train = Windows.over(
            train, self._seconds[train], self._places, min(self.options.train_step, self._places)
        )
        self._constant = int(
            np.argmax(np.bincount(self._labels[np.repeat(split == TRAIN, self._seconds)], minlength=1))
        )
        self._class_names = steps.class_names
        self._name_tokens, self._name_offsets, _ = pack_texts(
            tokenizer, list(steps.class_names.values()), model.max_text_len
        )

    def _count_classes(self, steps: StepAnnotations) -> int:
        return int(steps.label.max(initial=0)) + 1

    def _label_seconds(
        self, steps: StepAnnotations, kept: np.ndarray, limit: float, training: bool
    ) -> tuple[np.ndarray, Misfits]:
        """Class of every second of the kept videos, one after the other; a later segment of the file wins."""
        place = np.full(len(steps.video_ids), -1)
        place[kept] = np.arange(len(kept))
        video = place[steps.segment_video]
        known = video >= 0
        video, start, end, label = video[known], steps.start[known], steps.end[known], steps.label[known]
        seconds = self._seconds[video]
        where = [f"video {self._ids[v]}" for v in video]
        split = steps.split[kept][video]
        inside, misfits = check_bounds(steps.file, where, start, end, seconds, split, limit, training)
        video, start, end, label, seconds = video[inside], start[inside], end[inside], label[inside], seconds[inside]
        first = self._offsets[video] + np.floor(start).astype(np.int64)
        last = self._offsets[video] + np.minimum(np.ceil(end).astype(np.int64), seconds)
        labels = np.full(self._offsets[-1], BACKGROUND, np.int32)
        for lo, hi, c in zip(first, last, label, strict=True):
            labels[lo:hi] = c
        return labels, misfits

    @property
    def num_train_items(self) -> int:
        """Training windows."""
        return len(self._train.video)

    @property
    def train_videos(self) -> list[str]:
        """See `Task.train_videos`."""
        return [self._ids[video] for video in np.unique(self._train.video)]

    @property
    def summary(self) -> dict[str, Any]:
        """Windows, videos per split, classes, the constant baseline's class, misfits."""
        return {
            "train": len(np.unique(self._train.video)), "train_windows": self.num_train_items,
            "held-out": len(self._test_videos["held-out"]), "test": len(self._test_videos["test"]),
            "num_classes": self.num_classes, "labels_that_occur": len(self._class_names),
            "constant": self._constant, **self._misfits._asdict(),
        }  # fmt: skip

    @property
    def misfits(self) -> Misfits:
        """See `Task.misfits`."""
        return self._misfits

    def build(self, vlm: VLM) -> SegmentationModel:
        """Encoder plus a fresh linear layer."""
        return SegmentationModel(vlm, self.num_classes)

    @torch.no_grad()
    def build_zero_shot(self, vlm: VLM) -> SegmentationModel:
        """Scores each second against the pooled texts of the step labels, as CrossTask does zero-shot (facts 4.4).

        The label texts become the rows of the classifier. The background has no text and no threshold can be set
        without labels, so it is never predicted: read `frame_accuracy_no_background`, over the seconds that truly have
        a step, against `chance_frame_accuracy_no_background`; `frame_accuracy` can at most reach 1 - background_share.
        """
        model = SegmentationModel(vlm, self.num_classes).eval()
        model.classifier.weight.zero_()
        model.classifier.bias.fill_(-torch.inf)
        device = model.classifier.weight.device
        ids = np.array(list(self._class_names), np.int64)
        for part in np.array_split(np.arange(len(ids)), max(1, len(ids) // 64)):
            text, text_mask = frame_text(self._special, self._name_tokens, self._name_offsets, part)
            # The reference's dummy: one video place with a zero feature; isolated, so the text does not see it.
            video = torch.zeros(len(part), 1, vlm.config.feature_dim)
            batch = TaskBatch(video, torch.ones(len(part), 1, dtype=torch.bool), text, text_mask).to(device)
            _, pooled = vlm.pool(model.encode(batch), batch.video_mask, batch.text_mask)
            rows = torch.from_numpy(ids[part]).to(device)
            model.classifier.weight[rows] = pooled
            model.classifier.bias[rows] = 0
        return model

    def _batch(self, videos: np.ndarray, start: np.ndarray) -> SegmentationBatch:
        end = np.minimum(start + self._places, self._seconds[videos])
        video, video_mask = gather_windows(self._reader, self._videos[videos], start, end, self._places)
        places = self._offsets[videos][:, None] + start[:, None] + np.arange(video.shape[1])[None, :]
        labels = torch.from_numpy(self._labels[np.minimum(places, len(self._labels) - 1)].astype(np.int64))
        targets = torch.where(video_mask, labels, IGNORE)
        return SegmentationBatch(video, video_mask, *no_text(self._special, len(videos)), targets)

    def train_batch(self, items: np.ndarray, key: tuple[int, ...]) -> SegmentationBatch:
        """See `Task.train_batch`; an item is a window, and nothing is random here."""
        return self._batch(self._train.video[items], self._train.start[items])

    @torch.inference_mode()
    def predict(self, model: TaskModel, split: Split, device: torch.device | str, batch: int = 64) -> Predictions:
        """See `Task.predict`; batches hold windows of several videos, and only unfinished videos keep their logits."""
        assert isinstance(model, SegmentationModel)
        videos = self._test_videos[split]
        if not len(videos):
            raise TaskDataError(f"{self.name}: the {split} split has no videos")
        model.eval()
        windows = Windows.over(videos, self._seconds[videos], self._places, min(self.options.test_step, self._places))
        predicted = [merged.argmax(dim=1).cpu().numpy() for merged in self._merged(model, windows, device, batch)]
        truth = [self._labels[self._offsets[v] : self._offsets[v + 1]] for v in videos]
        arrays = {
            "predicted": np.concatenate(predicted).astype(np.int32), "truth": np.concatenate(truth),
            "offsets": np.concatenate([[0], np.cumsum(self._seconds[videos])]),
        }  # fmt: skip
        info = {
            "video_ids": [self._ids[v] for v in videos], "constant": self._constant, "num_classes": self.num_classes,
            "class_names": {str(c): name for c, name in self._class_names.items()},
        }  # fmt: skip
        return Predictions(self.name, split, arrays, info)

    def _merged(
        self, model: SegmentationModel, windows: Windows, device: torch.device | str, batch: int
    ) -> Iterator[torch.Tensor]:
        """Mean logits (seconds, classes) of each video, in the order of the windows."""
        merged: MergedLogits | None = None
        for begin in range(0, len(windows.video), batch):
            videos, starts = windows.video[begin : begin + batch], windows.start[begin : begin + batch]
            logits = model.logits(self._batch(videos, starts).to(device))
            for row, (video, start) in enumerate(zip(videos.tolist(), starts.tolist(), strict=True)):
                if merged is None:
                    merged = MergedLogits(int(self._seconds[video]), self.num_classes, logits.device)
                merged.add(logits[row], start)
                if start + self._places >= self._seconds[video]:
                    yield merged.mean()
                    merged = None

    def metrics(self, predictions: Predictions) -> dict[str, float]:
        """See `metrics.segmentation`; `chance_…` is a label drawn evenly, with and without the background.

        Labels that the annotations do not hold count in neither: the model has no reason to choose them.
        """
        arrays, info = predictions.arrays, predictions.info
        labels = len(info["class_names"])
        values = segmentation_metrics(arrays["predicted"], arrays["truth"], info["constant"]) | {
            "chance_frame_accuracy": 1 / (labels + 1),
            "chance_frame_accuracy_no_background": 1 / max(1, labels),
            "videos": float(len(info["video_ids"])),
            "seconds": float(len(arrays["truth"])),
        }
        return {f"{self.name}/{name}": value for name, value in values.items()}

    def examples(self, predictions: Predictions) -> Iterator[dict[str, Any]]:
        """One row per video: accuracies, and truth and prediction as runs [class, first second, one past the last]."""
        for video, truth, predicted in _by_video(predictions):
            correct = predicted == truth
            step = truth != BACKGROUND
            yield {
                "video_id": video, "seconds": len(truth), "frame_accuracy": float(correct.mean()),
                "frame_accuracy_no_background": float(correct[step].mean()) if step.any() else None,
                "truth": _runs(truth), "predicted": _runs(predicted),
            }  # fmt: skip

    def pictures(self, predictions: Predictions, folder: Path) -> list[Path]:
        """Time lines of truth over prediction for videos from the worst to the best, and the accuracy of each class."""
        from vlm_dist.eval.plots import draw_class_accuracies, draw_strips  # matplotlib only when a picture is wanted

        videos = sorted(_by_video(predictions), key=lambda v: (float((v[1] == v[2]).mean()), v[0]))
        accuracies = class_accuracies(predictions.arrays["predicted"], predictions.arrays["truth"])
        names = {int(c): name for c, name in predictions.info["class_names"].items()} | {BACKGROUND: "background"}
        return [
            draw_strips(videos, names, folder / f"{self.name}_timelines.png"),
            draw_class_accuracies(accuracies, names, folder / f"{self.name}_classes.png"),
        ]


class CoinTask(SegmentationTask):
    """COIN: 778 step labels and the background, 779 classes whatever part of them the file holds."""

    name = "coin"
    num_classes = 779

    def _count_classes(self, steps: StepAnnotations) -> int:
        bad = np.flatnonzero(steps.label >= CoinTask.num_classes)
        refuse(
            steps.file,
            [f"video {steps.video_ids[steps.segment_video[i]]}: label id {steps.label[i]} is above 778" for i in bad],
            "COIN's label ids 1 to 778; for other labels take `segmentation` in the place of `coin`",
        )
        return CoinTask.num_classes


def _by_video(predictions: Predictions) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    offsets = predictions.arrays["offsets"]
    for number, video in enumerate(predictions.info["video_ids"]):
        part = slice(offsets[number], offsets[number + 1])
        yield video, predictions.arrays["truth"][part], predictions.arrays["predicted"][part]


def _runs(classes: np.ndarray) -> Sequence[tuple[int, int, int]]:
    starts = np.flatnonzero(np.diff(classes, prepend=classes[0] - 1))
    ends = np.append(starts[1:], len(classes))
    return [(int(classes[lo]), int(lo), int(hi)) for lo, hi in zip(starts, ends, strict=True)]
