"""The contract of an end task, so that one trainer serves them all (… losses → tasks → metrics …).

A task knows its annotations, its attention mask, its head and loss, its metrics and its recipe. The trainer knows none
of them: it loads the task, wraps `build(vlm)` in DeepSpeed, feeds `train_batch`, and keeps the weights that are best by
`selection` on the held-out part of the training data. Paper section 4; reference facts 4.

How the seven tasks of the paper fit (two are here, the others need only a file of their own):

* retrieval on any clip list (`retrieval.py`); MSR-VTT and Youcook2 differ in the files they read. MSR-VTT visits every
  video 20 times an epoch with a random caption each: `num_train_items` = 20 x videos, and the caption is a pure
  function of (`key`, item), which is what `key` is for;
* multiple-choice QA: the same TaskModel with the video-to-text loss, `predict` keeps five scores per question;
* COIN segmentation (`segmentation.py`): an item is one window, the head a linear layer on the video places;
* step localisation: windows as COIN; a batch also holds the distinct steps' texts, which `forward` encodes in a second
  pass (one-place dummy video); zero-shot is `build_zero_shot`, and supervised training the same module;
* captioning: `forward` uses the causal text mask, `predict` decodes with beams, and metrics read the strings.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch

from feature_store.reader import FeatureReader
from feature_store.tokenizer import Tokenizer
from vlm_dist.errors import ConfigError
from vlm_dist.eval.predictions import Predictions
from vlm_dist.model.config import ModelConfig
from vlm_dist.model.vlm import VLM
from vlm_dist.tasks.batches import TaskBatch
from vlm_dist.tasks.config import TaskDataConfig
from vlm_dist.tasks.items import Misfits
from vlm_dist.train.config import FinetuneConfig

Split = Literal["held-out", "test"]


class Recipe(NamedTuple):
    """What a task takes unless the user says otherwise; `batch` is the items of one update over all ranks."""

    batch: int
    epochs: float
    lr: float
    warmup_steps: int


class Selection(NamedTuple):
    """Which metric chooses the checkpoint, and whether more or less of it is better."""

    metric: str
    mode: Literal["max", "min"]


class LossSum(NamedTuple):
    """A loss as a sum and the number of its terms on this rank (both scalar tensors, float32).

    The caller back-propagates `sum * W / N`, with W ranks whose gradients get averaged and N the sum of `terms` over
    all ranks (and accumulation steps): that is the gradient of the mean over the global batch, however it is split.
    """

    sum: torch.Tensor
    terms: torch.Tensor


class TaskModel(torch.nn.Module, ABC):
    """The encoder and what a task puts on it, as one module with one state_dict."""

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.vlm = vlm

    def encode(self, batch: TaskBatch) -> torch.Tensor:
        """Hidden states (B, 1 + V + T - 1, D) under the isolated mask: video and text do not see each other."""
        return self.vlm.encode(batch.video, batch.video_mask, batch.text, batch.text_mask, attention="isolated")

    @abstractmethod
    def forward(self, batch: TaskBatch) -> LossSum:
        """Training loss of this rank's items. With several ranks every rank must call it equally often."""


class Task(ABC):
    """One end task. After `load` it never changes.

    Attributes:
        name: What the user types; also in the MLflow experiment's name, and the prefix of all metrics.
        kind: Task family (`retrieval`, `segmentation`, later `qa`, `localization`, `captioning`).
        recipe: Defaults of batch, epochs, learning rate and warm-up.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    recipe: ClassVar[Recipe]

    def __init__(self, options: TaskDataConfig | None = None) -> None:
        self.options = options or TaskDataConfig()

    @property
    @abstractmethod
    def selection(self) -> Selection:
        """What chooses the best checkpoint."""

    @abstractmethod
    def load(
        self,
        data: Path,
        reader: FeatureReader,
        tokenizer: Tokenizer,
        model: ModelConfig,
        cfg: FinetuneConfig,
        training: bool = True,
    ) -> None:
        """Reads annotations, finds their videos in the store, and makes the train, held-out and test items.

        Part of the training videos is held out (`cfg.held_out`, by hash of the id) when `cfg.select_on` is "held-out".

        Args:
            data: Annotation file.
            reader: Features of the annotated videos.
            tokenizer: The tokenizer of the checkpoint, not of the store.
            model: Shape of the checkpoint: places, vocabulary, feature width.
            cfg: Held-out share and how many items may lack features.
            training: False when only the test items are needed; then nothing of the other splits is missed.

        Raises:
            TaskDataError: Files that are missing or malformed, labels out of range, videos in both training and test,
                an empty split, too many videos without features or segments outside their video, another width.
            CheckpointError: A tokenizer that is not the checkpoint's.
        """

    @property
    @abstractmethod
    def num_train_items(self) -> int:
        """Training items (held-out ones not counted); item numbers are 0 … num_train_items - 1."""

    @property
    @abstractmethod
    def train_videos(self) -> list[str]:
        """Ids of the videos that the training items are from, each once: an exported model keeps them."""

    @property
    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """JSON-able facts for the run: items per split, cut texts, `misfits` by field …"""

    @property
    @abstractmethod
    def misfits(self) -> Misfits:
        """Annotations that do not fit the store; the user is told."""

    @abstractmethod
    def build(self, vlm: VLM) -> TaskModel:
        """The module that is trained: encoder plus a fresh head where the task has one. `load` comes first."""

    def build_zero_shot(self, vlm: VLM) -> TaskModel:
        """The module that `predict` takes when nothing was fine-tuned.

        Raises:
            ConfigError: The task has a head that only training can give.
        """
        raise ConfigError(f"{self.name} has no zero-shot evaluation: its head must be trained; fine-tune it first")

    @abstractmethod
    def train_batch(self, items: np.ndarray, key: tuple[int, ...]) -> TaskBatch:
        """Training items as tensors, in the given order.

        Args:
            items: (n,) item numbers below `num_train_items`.
            key: Integers, such as (seed, epoch): any random choice is a pure function of them and the item number.
        """

    @abstractmethod
    def predict(self, model: TaskModel, split: Split, device: torch.device | str, batch: int = 64) -> Predictions:
        """Runs the model over a split in evaluation mode, without gradients or collectives (so one rank may call it).

        Raises:
            TaskDataError: The split has no items.
        """

    @abstractmethod
    def metrics(self, predictions: Predictions) -> dict[str, float]:
        """Metrics by MLflow-legal name (`retrieval/recall_at_5`); needs no `load`."""

    @abstractmethod
    def examples(self, predictions: Predictions) -> Iterator[dict[str, Any]]:
        """One JSON-able row per example, for the table of a run."""

    @abstractmethod
    def pictures(self, predictions: Predictions, folder: Path) -> list[Path]:
        """Draws the task's pictures into a folder and returns their paths."""
