"""Videos → store → pre-training → end tasks → comparison, by the commands that a user types, on rendered videos."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.mlflow_server import tracking_server
from jobs.runs import extract_run
from vlm_dist.cli.app import main
from vlm_dist.cli.context import Context
from vlm_dist.demo.run import _zero_shot
from vlm_dist.demo.world import render_world
from vlm_dist.model.checkpoint import load

VIDEOS = 8
SMALL = """
captions_file = "world/raw_caption.json"
init = "scratch"
[extract.decode]
fps = 8
size = 48
[captions]
tokenizer = "wordpiece:120"
[clips]
clips_per_video = 4
[model]
hidden_size = 32
num_layers = 2
num_heads = 2
intermediate_size = 64
max_video_len = 12
max_len = 48
[train]
global_batch = 16
max_steps = 12
checkpoint_every = 5
log_every = 4
threads = 1
[train.optim]
lr = 1e-3
warmup_steps = 2
[finetune]
select_on = "last"
max_steps = 4
batch = 8
[data.retrieval]
data = "world/clips.jsonl"
[data.segmentation]
data = "world/COIN.json"
"""


class Workspace:
    """A folder, and a way to type commands in it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys

    def type(self, *words: str, code: int = 0) -> str:
        """What a command printed on stdout, after its exit code was compared; stderr is in `errors`."""
        found = main([*words, "--workspace", str(self.folder)])
        printed = self._capsys.readouterr()
        self.errors = printed.err
        assert found == code, f"{words} ended with {found}:\n{printed.out}\n{printed.err}"
        return printed.out

    def refused(self, *words: str) -> str:
        """The error line of a command that does not do what it was asked."""
        assert main([*words, "--workspace", str(self.folder)]) in (1, 2)
        return self._capsys.readouterr().err

    def json(self, *words: str, code: int = 0) -> Any:
        """The JSON that a command printed, and nothing beside it."""
        return json.loads(self.type(*words, "--json", code=code))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Iterator[Path]:
    """A workspace with a rendered world, while its tracking server runs."""
    root = tmp_path_factory.mktemp("workspace")
    render_world(root / "world", videos=VIDEOS, seed=0)
    (root / "vlm-dist.toml").write_text(SMALL)
    with tracking_server(ClusterConfig(), root):
        yield root


@pytest.fixture
def workspace(folder: Path, capsys: pytest.CaptureFixture[str]) -> Workspace:
    return Workspace(folder, capsys)


@pytest.fixture(scope="module")
def extracted(folder: Path) -> Path:
    """The workspace after extraction; the captions came later."""
    words = ["extract", str(folder / "world" / "videos"), "--random-weights", "0", "--workspace", str(folder)]
    assert main([*words, "--set", "captions_file="]) == 0
    assert main(words) == 0
    return folder


@pytest.fixture(scope="module")
def pretrained(extracted: Path) -> Path:
    """The workspace after pre-training on two workers."""
    assert main(["pretrain", "--gpus", "0", "--workers", "2", "--workspace", str(extracted)]) == 0
    return extracted


def test_extract_records_broken_videos_and_does_nothing_twice(workspace: Workspace, extracted: Path) -> None:
    info = workspace.json("store", "info", str(extracted / "store"))
    assert info["videos"]["ok"] == VIDEOS
    assert info["provenance"]["weights"] == "random seed 0"
    assert info["clips"] > VIDEOS
    failures = {row["video_id"]: row["reason"] for row in workspace.json("store", "failures", str(extracted / "store"))}
    assert failures == {"download_broke_off": "truncated", "disk_was_full": "empty_file", "error_page": "not_a_video",
                        "only_sound": "no_video_stream", "cooking_0000": "duplicate"}  # fmt: skip
    workspace.type("store", "verify", str(extracted / "store"), "--deep")

    with tracking_server(ClusterConfig(), extracted) as uri:
        assert extract_run(uri, info["fingerprint"]), "captions alone made another store, and that was a run"
    runs = len(workspace.json("jobs", "list"))
    again = workspace.type("extract", str(extracted / "world" / "videos"), "--random-weights", "0")
    assert "Nothing to do" in again
    assert len(workspace.json("jobs", "list")) == runs
    workspace.type("extract", str(extracted / "world" / "videos"), "--random-weights", "0", "--strict", code=3)


def test_a_store_of_another_extractor_is_not_mixed(workspace: Workspace, extracted: Path) -> None:
    before = (extracted / "store" / "CURRENT").read_text()
    videos = str(extracted / "world" / "videos")
    workspace.type("extract", videos, "--random-weights", "1", code=1)
    assert "random seed 0" in workspace.errors
    workspace.type("extract", videos, "--random-weights", "0", "--set", "extract.decode.fps=10", code=1)
    assert "fps" in workspace.errors
    assert (extracted / "store" / "CURRENT").read_text() == before


def test_pretraining_leaves_the_test_videos_out_and_is_found_again(workspace: Workspace, pretrained: Path) -> None:
    again = workspace.json("pretrain", "--gpus", "0", "--workers", "2")
    assert again["metrics"]["validation/loss"] > 0
    record = json.loads((Path(again["model"]).parent / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["outcome"]["step"] == 12
    import numpy as np

    from feature_store.reader import FeatureReader

    index = FeatureReader(pretrained / "store").index
    with np.load(Path(again["model"]).parent / "split.npz") as split:
        trained = {index.video_id(int(row)) for row in [*split["train"], *split["validation"]]}
    coin = json.loads((pretrained / "world" / "COIN.json").read_text())["database"]
    tested = {name for name, video in coin.items() if video["subset"] == "testing"}
    assert tested
    assert trained
    assert not trained & tested


def test_a_plan_says_what_a_cluster_would_take(workspace: Workspace, extracted: Path) -> None:
    plan = workspace.json("pretrain", "--nodes", "4", "--gpus", "2", "--dry-run", "--set", "train.nce_pool=group:4")
    assert (plan["ranks"], plan["on_gpu"], plan["precision"]) == (8, True, "fp16")
    assert plan["micro_batches"] * plan["micro_batch"] * plan["ranks"] == plan["global_batch"] == 16
    alone = workspace.json("pretrain", "--gpus", "0", "--dry-run")
    assert (alone["ranks"], alone["received_bytes"], alone["gradient_bytes"]) == (1, 0, 0)
    assert alone["negatives"] == pytest.approx(2 * plan["negatives"], abs=2), "a group of four sees half of eight ranks"
    assert alone["step_flops"] > 6 * plan["step_flops"], "of one rank; the pool is projected on each"
    assert alone["hours"] > 0
    said = workspace.type("pretrain", "--gpus", "0", "--dry-run")
    assert "1 CPU worker, fp32" in said
    assert not list(extracted.glob("runs/pretrain-*/plan*")), "nothing was begun"


def test_zero_shot_fine_tuning_and_comparison(workspace: Workspace, pretrained: Path) -> None:
    zero_shot = workspace.json("evaluate", "retrieval", "--zero-shot")
    assert zero_shot["form"] == "zero-shot"
    assert 0 <= zero_shot["metrics"]["retrieval/recall_at_5"] <= 1

    workspace.type("finetune", "retrieval", "--gpus", "0", "--workers", "2", "--set", "finetune.select_on=test")
    tuned = workspace.json("evaluate", "retrieval")
    assert tuned["form"] == "fine-tuned"
    assert Path(tuned["predictions"]).is_file()

    workspace.type("finetune", "segmentation", "--gpus", "0", "--workers", "1")
    segmented = workspace.json("evaluate", "segmentation")
    finished = workspace.json("finetune", "segmentation", "--gpus", "0", "--workers", "1")
    assert segmented["metrics"] == pytest.approx(finished["metrics"])
    assert 0 < segmented["metrics"]["segmentation/constant_frame_accuracy"] < 1

    rows = workspace.json("jobs", "list")
    assert {row["status"] for row in rows} == {"FINISHED"}
    assert {row["kind"] for row in rows} == {"extract", "pretrain", "finetune", "evaluate"}
    tables = workspace.json("compare")
    assert {table["task"] for table in tables} >= {"retrieval", "segmentation"}
    (table,) = workspace.json("compare", tuned["run"])
    assert table["task"] == "retrieval"
    (row,) = [row for row in table["rows"] if row["source"] == "ours"]
    assert (row["n"], row["runs"]) == (1, [r["name"] for r in rows if r["id"] == tuned["run"]])
    assert row["values"]["recall_at_5"]["mean"] == tuned["metrics"]["retrieval/recall_at_5"]
    assert tuned["metrics"]["retrieval/test_items"] > 0 == tuned["metrics"]["retrieval/test_items_missing"]


def test_a_run_page_has_config_tags_metrics_and_files(workspace: Workspace, pretrained: Path) -> None:
    from mlflow.tracking import MlflowClient

    (row,) = [row for row in workspace.json("jobs", "list") if row["kind"] == "pretrain"]
    with tracking_server(ClusterConfig(), pretrained) as uri:
        client = MlflowClient(uri)
        run = client.get_run(row["id"])
        assert run.data.params["train.global_batch"] == "16"
        assert run.data.tags["vlm_dist.store_fingerprint"]
        assert run.data.tags["vlm_dist.versions"]
        size = {name: run.data.tags[f"vlm_dist.{name}"] for name in ("ranks", "nodes", "gpus", "accumulation", "steps")}
        assert size == {"ranks": "2", "nodes": "1", "gpus": "0", "accumulation": "1", "steps": "12"}
        assert run.data.tags["vlm_dist.source_model"] == "scratch"
        extraction = client.get_run(run.data.tags["vlm_dist.extract_run"])
        assert extraction.data.tags["vlm_dist.store_fingerprint"] == run.data.tags["vlm_dist.store_fingerprint"]
        assert "| train/loss |" in run.data.tags["mlflow.note.content"]
        assert [point.step for point in client.get_metric_history(row["id"], "train/loss")] == [4, 8, 12, 12]
        assert "config.resolved.json" in {file.path for file in client.list_artifacts(row["id"])}


def test_more_gpus_than_there_are(workspace: Workspace, extracted: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    workspace.type("pretrain", "--gpus", "8", "--set", "train.seed=5", code=2)
    assert "0 GPUs" in workspace.errors
    assert "--gpus 0 --workers" in workspace.errors


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("pretrain --gpus 0 --workers 2 --set train.precision=fp16", "fp16 needs GPUs"),
        ("pretrain --gpus 0 --set train.global_batch=7", "not a multiple of clips_per_video 4"),
        ("pretrain --gpus 0 --workers 5 --set train.global_batch=4", "global_batch 4 cannot be shared by 5 workers"),
        ("pretrain --gpus 0 --nodes 4 --workers 2 --set train.seed=6", "type `--nodes 1 --gpus 0 --workers 2`"),
        ("finetune retrieval --gpus 0 --set train.precision=fp16", "fp16 needs GPUs"),
        ("finetune retrieval --gpus 0 --workers 2 --set finetune.batch=1", "finetune.batch 1 cannot be shared by 2"),
        ("pretrain --gpus -1", "--gpus"),
    ],
)
def test_what_can_never_work_is_refused_before_a_run_begins(
    workspace: Workspace, pretrained: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    before = workspace.json("jobs", "list")
    if "--nodes" not in line:  # how many machines there are, only the cluster knows
        monkeypatch.setattr("cluster.ray_local.ray_session", lambda _: pytest.fail("a cluster was asked for"))
    workspace.type(*line.split(), code=2)
    assert said in workspace.errors
    assert [row["id"] for row in workspace.json("jobs", "list")] == [row["id"] for row in before]


def test_a_demo_measures_one_model_once(workspace: Workspace, pretrained: Path, tmp_path: Path) -> None:
    context = Context.open(pretrained, None)
    run = workspace.json("pretrain", "--gpus", "0", "--workers", "2")["run"]
    first = _zero_shot(context, run, tmp_path / "zero-shot.json")
    runs = workspace.json("jobs", "list")
    assert _zero_shot(context, run, tmp_path / "zero-shot.json") == first
    assert len(workspace.json("jobs", "list")) == len(runs)


def test_a_bert_folder_starts_pretraining_on_its_own_vocabulary(
    workspace: Workspace, extracted: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from feature_store.reader import FeatureReader

    # A BERT of other words than the store's is refused before anything is trained.
    torch.manual_seed(0)
    config = BertConfig(vocab_size=77, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertForMaskedLM(config).save_pretrained(tmp_path / "other")
    workspace.type("pretrain", "--init", str(tmp_path / "other"), "--gpus", "0", code=1)
    assert "word pieces" in workspace.errors
    # One of the same words is taken, and decides the model's sizes.
    index = FeatureReader(extracted / "store").index
    assert index.tokenizer_dir is not None
    pieces = len((index.tokenizer_dir / "vocab.txt").read_text().splitlines())
    config.vocab_size = pieces
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    done = workspace.json("pretrain", "--init", str(tmp_path / "bert"), "--gpus", "0", "--max-steps", "2")
    described = json.loads((Path(done["model"]) / "config.json").read_text())
    assert described["model"]["num_layers"] == 1


def test_one_file_without_a_store(
    workspace: Workspace, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "world" / "videos" / "cooking_0001.mp4", tmp_path / "my video.mp4")
    result = workspace.json("extract", "my video.mp4", "--npy", "--random-weights", "0")
    rows = np.load(tmp_path / "my video.npy")
    assert rows.shape == (result["rows"], 512)
    assert np.linalg.norm(rows.astype(np.float32), axis=1) == pytest.approx(1, abs=2e-3)
    (tmp_path / "my video.npy").unlink()
    workspace.type("extract", "my video.mp4", "--npy", code=2)
    assert "s3d_howto100m.pth" in workspace.errors


@pytest.mark.slow
def test_a_time_limit_ends_in_a_checkpoint_and_the_same_command_goes_on(
    workspace: Workspace, extracted: Path, tmp_path: Path
) -> None:
    changes = ("train.seed=5", "train.max_steps=6", "train.log_every=2", "train.checkpoint_every=100")
    line = ("pretrain", "--gpus", "0", *(word for change in changes for word in ("--set", change)))
    assert "there is no checkpoint in" in workspace.refused(*line, "--resume", "must")
    stopped = workspace.json(*line, "--max-hours", "1e-9")
    assert stopped["model"] == ""
    (told,) = workspace.json("checkpoint", "list")["checkpoints"]
    assert (told["step"], told["ranks"], told["state"]) == (2, 1, "committed")
    whole = workspace.json(*line, "--resume", "must")
    assert whole["resumed_from"] == 2
    run = Path(whole["model"]).parent
    assert workspace.json("checkpoint", "verify", run.name)["problems"].keys() == {"step_00000002", "step_00000006"}
    workspace.type("checkpoint", "export", str(tmp_path / "model"), run.name, "--step", "6")
    ours, theirs = load(tmp_path / "model").model.state_dict(), load(Path(whole["model"])).model.state_dict()
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    weights = run / "checkpoints" / "step_00000006" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "bytes, its manifest says" in workspace.type("checkpoint", "verify", run.name, code=1)
    assert "is damaged" in workspace.refused("checkpoint", "export", str(tmp_path / "other"), run.name, "--step", "6")
    assert "1 checkpoints left" in workspace.type("checkpoint", "prune", run.name)
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000002"]
