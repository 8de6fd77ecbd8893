"""The whole way on a corpus that is rendered here: videos → features → pre-training → end tasks → a table."""

import dataclasses
import json
import shlex
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from vlm_dist.cli.context import Context
from vlm_dist.cli.evaluate import run_evaluate
from vlm_dist.cli.extract_store import extract_to_store
from vlm_dist.cli.finetune import run_finetune
from vlm_dist.cli.output import duration, print_table
from vlm_dist.cli.pretrain import run_pretrain
from vlm_dist.config import FILE
from vlm_dist.demo.world import World, render_world

VIDEOS = 92
WORKERS = 2
FINETUNE = {
    "retrieval": {"finetune.batch": 32, "finetune.lr": 3e-4, "finetune.warmup_steps": 10, "finetune.max_steps": 60},
    "segmentation": {"finetune.batch": 16, "finetune.lr": 5e-4, "finetune.warmup_steps": 20, "finetune.max_steps": 150},
}


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demo measured; every value is a share between 0 and 1."""

    captions: int
    chance_recall_at_5: float
    zero_shot_recall_at_5: float
    recall_at_5: float
    constant_frame_accuracy: float
    frame_accuracy: float
    failures: dict[str, str]
    seconds: float

    @property
    def learned(self) -> bool:
        """The demo's promise: five times chance in retrieval, ten points above the constant answer in segmentation."""
        return (
            self.recall_at_5 >= 5 * self.chance_recall_at_5
            and self.frame_accuracy >= self.constant_frame_accuracy + 0.10
        )


def run_demo(folder: Path, seed: int = 0, videos: int = VIDEOS) -> DemoResult:
    """Do every step in the workspace `folder`, or what is left of them after an interruption.

    Args:
        folder: Made when it is not there.
        seed: Decides the videos, the random S3D weights, and all training.
        videos: Whole videos; a few broken ones come on top.
    """
    from cluster.mlflow_server import tracking_server

    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / FILE).exists():
        (folder / FILE).write_text(resources.files("vlm_dist.demo").joinpath(FILE).read_text("utf-8"), "utf-8")
    context = Context.open(folder, [f"train.seed={seed}"])
    with tracking_server(context.settings.cluster, folder), context.ray():
        with _stage(1, "Render narrated videos"):
            world = _world(folder, videos, seed)
            print(f"{len(world.train)} training and {len(world.test)} test videos, {duration(world.seconds)} in all, "
                  f"and {len(world.broken)} broken files: {world.videos}")  # fmt: skip
        with _stage(2, "Extract S3D features with Ray (random weights: no download, no knowledge of the world)"):
            extract_to_store(context, [world.videos], seed)
        with _stage(3, "Pre-train with Ray Train and DeepSpeed (masked tokens, test videos left out)"):
            pretrained = run_pretrain(context, workers=WORKERS)["run"]
        with _stage(4, "Zero-shot: find the clip that a caption describes"):
            zero_shot = _zero_shot(context, pretrained, folder / "zero-shot.json")
            print(
                f"R@5 {zero_shot['retrieval/recall_at_5']:.3f}, chance {zero_shot['retrieval/chance_recall_at_5']:.3f}"
            )
        tuned: dict[str, dict[str, float]] = {}
        for number, (task, settings) in enumerate(FINETUNE.items(), start=5):
            with _stage(number, f"Fine-tune and test: {task}"):
                overrides = [f"train.seed={seed}", *(f"{key}={value}" for key, value in settings.items())]
                tuned[task] = run_finetune(Context.open(folder, overrides), task)["metrics"]
    result = DemoResult(
        captions=int(tuned["retrieval"]["retrieval/distinct_captions"]),
        chance_recall_at_5=tuned["retrieval"]["retrieval/chance_recall_at_5"],
        zero_shot_recall_at_5=zero_shot["retrieval/recall_at_5"],
        recall_at_5=tuned["retrieval"]["retrieval/recall_at_5"],
        constant_frame_accuracy=tuned["segmentation"]["segmentation/constant_frame_accuracy"],
        frame_accuracy=tuned["segmentation"]["segmentation/frame_accuracy"],
        failures=_failures(context),
        seconds=time.monotonic() - started,
    )
    _report(result, folder)
    return result


@contextmanager
def _stage(number: int, title: str) -> Generator[None]:
    print(f"\n[{number}/6] {title}", flush=True)
    started = time.monotonic()
    yield
    print(f"      ({duration(time.monotonic() - started)})", flush=True)


def _world(folder: Path, videos: int, seed: int) -> World:
    """Render the corpus, unless an earlier run of this seed has done it."""
    out = folder / "world"
    record = out / "world.json"
    asked = {"videos": videos, "seed": seed}
    if record.is_file():
        known: dict[str, Any] = json.loads(record.read_text())
        if known.pop("asked") == asked:
            paths = {name: out / known[name] for name in ("videos", "captions", "annotations", "clips")}
            return World(**{**known, **paths, "train": tuple(known["train"]), "test": tuple(known["test"])})
    shutil.rmtree(out, ignore_errors=True)
    world = render_world(out, videos=videos, seed=seed)
    known = {name: value.name if isinstance(value, Path) else value for name, value in vars(world).items()}
    record.write_text(json.dumps({"asked": asked, **known}, indent=1))
    return world


def _zero_shot(context: Context, pretrained: str, record: Path) -> dict[str, float]:
    """Metrics of the pre-trained model, measured unless an earlier demo has measured the model of this very run."""
    known: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {}
    if known.get("pretrained") != pretrained:
        known = {"pretrained": pretrained, **run_evaluate(context, "retrieval", pretrained, zero_shot=True)}
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps(known, indent=1))
        temporary.replace(record)
    return known["metrics"]


def _failures(context: Context) -> dict[str, str]:
    from feature_store.info import failures

    return {record.video_id: record.reason for record in failures(context.store)}


def next_commands(folder: Path) -> list[str]:
    """What to type after the demo, for a shell."""
    on_runs = [f"vlm-dist {name} --workspace {shlex.quote(str(folder))}" for name in ("jobs list", "compare", "ui")]
    return [*on_runs, f"vlm-dist store info {shlex.quote(str(folder / 'store'))}"]


def _report(result: DemoResult, folder: Path) -> None:
    print()
    rows = [
        (f"text → video, R@5 over {result.captions} captions", f"{result.chance_recall_at_5:.3f} (chance)",
         f"{result.zero_shot_recall_at_5:.3f}", f"{result.recall_at_5:.3f}"),
        ("step segmentation, frame accuracy", f"{result.constant_frame_accuracy:.3f} (most frequent label)",
         "-", f"{result.frame_accuracy:.3f}"),
    ]  # fmt: skip
    print_table(("on held-out videos", "baseline", "zero-shot", "fine-tuned"), rows, right=("zero-shot", "fine-tuned"))
    print_table(("broken video", "reason"), result.failures.items(), title="Left out, and said so")
    print(f"The whole way took {duration(result.seconds)}. It was made on rendered videos with random S3D weights:")
    print("the numbers show that the machinery learns, not how good VLM is. Go on with:")
    for line in next_commands(folder):
        print(f"  {line}")
    print("  vlm-dist init my-project    # your own videos")
