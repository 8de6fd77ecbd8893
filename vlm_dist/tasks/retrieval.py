"""Text-video retrieval on any clip list (… pre-trained model → retrieval → recall@k; paper Tables 2, 3; facts 4.1)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feature_store.reader import FeatureReader
from feature_store.tokenizer import Tokenizer
from vlm_dist.data.batch import SpecialIds
from vlm_dist.data.records import HELD_OUT, TEST, TRAIN
from vlm_dist.errors import TaskDataError
from vlm_dist.eval.predictions import Predictions
from vlm_dist.losses.contrastive import text_to_video
from vlm_dist.metrics.retrieval import RankCounts, chance_metrics, rank_counts, ranks, retrieval_metrics
from vlm_dist.model.config import ModelConfig
from vlm_dist.model.vlm import VLM
from vlm_dist.tasks.annotations import ClipList, read_clip_list
from vlm_dist.tasks.base import LossSum, Recipe, Selection, Split, Task, TaskModel
from vlm_dist.tasks.batches import TaskBatch, frame_text, gather_windows, pack_texts
from vlm_dist.tasks.gather import gather_rows
from vlm_dist.tasks.items import (
    Misfits,
    check_bounds,
    check_missing,
    check_overlap,
    check_splits,
    coverage_of_test,
    hold_out,
    special_ids,
)
from vlm_dist.train.config import FinetuneConfig

TOP = 5  # clips listed per caption in the table


class RetrievalModel(TaskModel):
    """The bare encoder: pooled video and pooled text are scored by their dot product, so it also works zero-shot."""

    def embeddings(self, batch: TaskBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled video and pooled text, (B, D) each, float32."""
        video, text = self.vlm.pool(self.encode(batch), batch.video_mask, batch.text_mask)
        return video.float(), text.float()

    def forward(self, batch: TaskBatch) -> LossSum:
        """Cross-entropy of each text over the videos of the global batch, its own being right (text to video only).

        Clips of one video, and clips with the same caption, are not excluded as negatives (as the reference).
        """
        video, text = self.embeddings(batch)
        loss = text_to_video(text, gather_rows(video))
        return LossSum(loss, torch.tensor(float(len(batch)), device=loss.device))


class RetrievalTask(Task):
    """Retrieval on a clip list (.jsonl) or a list in the form of MSRVTT_JSFUSION_test.csv; see `tasks.annotations`.

    An item is a clip with its caption: rows floor(start):ceil(end) of the video, the first `max_video_len` of them, and
    the caption's first `max_len - max_video_len - 3` word pieces. Candidates at test are the distinct clips; when two
    clips carry the same caption, each caption still has only its own clip as right (the diagonal of the paper), unless
    `options.unique_captions` keeps the first clip of each distinct caption only.

    Predictions: `text` (N, D) and `video` (M, D) float32, `clip` (N,) the right clip of each text, `start` and `end`
    (M,) rows; info has `captions` (N) and `video_ids` (M).
    """

    name = "retrieval"
    kind = "retrieval"
    recipe = Recipe(batch=256, epochs=10, lr=5e-5, warmup_steps=122)  # Youcook2's: 128 a GPU on 2 GPUs

    @property
    def selection(self) -> Selection:
        """Mean reciprocal rank: recall@1 of a small held-out split has too few values to choose by."""
        return Selection(f"{self.name}/mean_reciprocal_rank", "max")

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
        clips = read_clip_list(data)
        self._special: SpecialIds = special_ids(reader, tokenizer, model)
        check_overlap(data, clips.video_ids, clips.split)
        numbers = reader.index.find_many(clips.video_ids)
        missing = check_missing(data, clips.video_ids, numbers, clips.split, cfg.max_missing, training)
        kept = np.flatnonzero(numbers >= 0)
        n_rows = np.asarray(reader.index.n_rows)
        start, end = _seconds(clips, kept, n_rows[numbers[kept]])
        where = [f"line {clips.lines[i]}, video {clips.video_ids[i]}" for i in kept]
        inside, misfits = check_bounds(
            data, where, start, end, n_rows[numbers[kept]], clips.split[kept], cfg.max_missing, training
        )
        kept, start, end = kept[inside], start[inside], end[inside]
        self._misfits = misfits._replace(missing=missing, **coverage_of_test(clips.split, kept))
        self._ids = [clips.video_ids[i] for i in kept]
        self._texts = [clips.texts[i] for i in kept]
        self._reader, self._places, self._videos = reader, model.max_video_len, numbers[kept]
        self._first = np.floor(start).astype(np.int64)
        self._last = np.minimum(np.ceil(end).astype(np.int64), n_rows[self._videos])
        self._last = np.minimum(self._last, self._first + self._places)
        self._tokens, self._offsets, self._cut = pack_texts(tokenizer, self._texts, model.max_text_len)
        split = hold_out(self._ids, clips.split[kept], cfg)
        check_splits(data, split, cfg, training)
        self._train = np.flatnonzero(split == TRAIN)
        self._ranked: dict[Split, np.ndarray] = {
            "held-out": self._queries(split == HELD_OUT), "test": self._queries(split == TEST)
        }  # fmt: skip

    def _queries(self, chosen: np.ndarray) -> np.ndarray:
        items = np.flatnonzero(chosen)
        if not self.options.unique_captions:
            return items
        first: dict[str, int] = {}
        for item in items.tolist():
            first.setdefault(_plain(self._texts[item]), item)
        return np.array(list(first.values()), np.int64)

    @property
    def num_train_items(self) -> int:
        """Training clips."""
        return len(self._train)

    @property
    def train_videos(self) -> list[str]:
        """See `Task.train_videos`."""
        return sorted({self._ids[item] for item in self._train})

    @property
    def summary(self) -> dict[str, Any]:
        """Clips per split, captions that were cut, misfits."""
        return {
            "train": len(self._train), "held-out": len(self._ranked["held-out"]), "test": len(self._ranked["test"]),
            "cut_captions": self._cut, **self._misfits._asdict(),
        }  # fmt: skip

    @property
    def misfits(self) -> Misfits:
        """See `Task.misfits`."""
        return self._misfits

    def build(self, vlm: VLM) -> RetrievalModel:
        """The encoder itself; there is no head."""
        return RetrievalModel(vlm)

    def build_zero_shot(self, vlm: VLM) -> RetrievalModel:
        """The same module as `build`."""
        return self.build(vlm)

    def _batch(self, items: np.ndarray) -> TaskBatch:
        video, video_mask = gather_windows(
            self._reader, self._videos[items], self._first[items], self._last[items], self._places
        )
        return TaskBatch(video, video_mask, *frame_text(self._special, self._tokens, self._offsets, items))

    def train_batch(self, items: np.ndarray, key: tuple[int, ...]) -> TaskBatch:
        """See `Task.train_batch`; nothing is random here."""
        return self._batch(self._train[items])

    @torch.inference_mode()
    def predict(self, model: TaskModel, split: Split, device: torch.device | str, batch: int = 64) -> Predictions:
        """See `Task.predict`."""
        assert isinstance(model, RetrievalModel)
        items = self._ranked[split]
        if not len(items):
            raise TaskDataError(f"{self.name}: the {split} split has no clips")
        model.eval()
        video, text = [], []
        for start in range(0, len(items), batch):
            of_video, of_text = model.embeddings(self._batch(items[start : start + batch]).to(device))
            video.append(of_video.cpu().numpy())
            text.append(of_text.cpu().numpy())
        spans = np.stack([self._videos[items], self._first[items], self._last[items]], axis=1)
        _, once, clip = np.unique(spans, axis=0, return_index=True, return_inverse=True)
        # np.unique sorts: number the clips by first appearance instead, so that rows of the list stay in order.
        order = np.argsort(once)
        clip = np.argsort(order)[clip.reshape(-1)]
        once = once[order]
        arrays = {
            "text": np.concatenate(text), "video": np.concatenate(video)[once], "clip": clip,
            "start": self._first[items[once]], "end": self._last[items[once]],
        }  # fmt: skip
        info = {"captions": [self._texts[i] for i in items], "video_ids": [self._ids[i] for i in items[once]]}
        return Predictions(self.name, split, arrays, info)

    def _counts(self, predictions: Predictions) -> RankCounts:
        arrays = predictions.arrays
        return rank_counts(arrays["text"], arrays["video"], arrays["clip"], np.arange(len(arrays["video"])))

    def metrics(self, predictions: Predictions) -> dict[str, float]:
        """Recall@1/5/10, median and reciprocal rank, text to video and back (`video_to_text_…`), and chance levels.

        `candidates` is the number of clips that were ranked, `distinct_captions` of different texts that asked.
        """
        arrays, ties = predictions.arrays, self.options.ties
        clips = np.arange(len(arrays["video"]))
        back = retrieval_metrics(rank_counts(arrays["video"], arrays["text"], clips, arrays["clip"]), ties)
        values = (
            retrieval_metrics(self._counts(predictions), ties)
            | {f"video_to_text_{name}": value for name, value in back.items()}
            | {f"chance_{name}": value for name, value in chance_metrics(len(clips)).items()}
            | {
                "candidates": float(len(clips)),
                "distinct_captions": float(len({_plain(caption) for caption in predictions.info["captions"]})),
            }
        )
        return {f"{self.name}/{name}": value for name, value in values.items()}

    def examples(self, predictions: Predictions) -> Iterator[dict[str, Any]]:
        """One row per caption: its clip, its rank (1 is best, ties averaged) and the clips that scored best."""
        arrays, ids = predictions.arrays, predictions.info["video_ids"]
        caption_of = {int(clip): c for c, clip in reversed(list(enumerate(arrays["clip"])))}
        rank = ranks(self._counts(predictions)) + 1
        for query, caption in enumerate(predictions.info["captions"]):
            scores = arrays["video"] @ arrays["text"][query]
            best = np.argsort(-scores, kind="stable")[:TOP]
            clip = int(arrays["clip"][query])
            yield {
                "caption": caption, "video_id": ids[clip],
                "start": int(arrays["start"][clip]), "end": int(arrays["end"][clip]), "rank": float(rank[query]),
                "best": [
                    {"video_id": ids[b], "start": int(arrays["start"][b]), "end": int(arrays["end"][b]),
                     "score": float(scores[b]), "caption": predictions.info["captions"][caption_of[int(b)]]}
                    for b in best
                ],
            }  # fmt: skip

    def pictures(self, predictions: Predictions, folder: Path) -> list[Path]:
        """Recall by k against chance, and the histogram of ranks."""
        from vlm_dist.eval.plots import draw_ranks  # matplotlib only when a picture is wanted

        rank = ranks(self._counts(predictions)) + 1
        return [draw_ranks(rank, len(predictions.arrays["video"]), folder / f"{self.name}_ranks.png")]


def _plain(caption: str) -> str:
    return " ".join(caption.lower().split())


def _seconds(clips: ClipList, kept: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of each kept clip; a clip without times is its whole video."""
    whole = np.isnan(clips.start[kept])
    return np.where(whole, 0, clips.start[kept]), np.where(whole, rows, clips.end[kept])
