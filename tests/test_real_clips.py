"""The whole way at small size on the real clips of the reference material: H.264 and MPEG-4, 19.6 to 30 fps."""

import json
from pathlib import Path

import numpy as np
import pytest

from feature_store.reader import FeatureReader
from tests.test_whole_way import Workspace
from vlm_dist.cli.app import main

SMALL = """
captions_file = "{captions}"
init = "{bert}"
[cluster]
tracking_uri = "{uri}"
[extract.decode]
size = 64
[captions]
tokenizer = "{bert}"
[clips]
clips_per_video = 4
min_text_tokens = 4
max_text_tokens = 16
[model]
hidden_size = 32
num_layers = 2
num_heads = 2
intermediate_size = 64
max_video_len = 12
max_len = 48
[train]
global_batch = 8
max_steps = 3
log_every = 1
threads = 1
[data.retrieval]
data = "test.jsonl"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shared: Path, ray_session: None, uri: str) -> Path:
    """A workspace whose store holds the ten clips."""
    root = tmp_path_factory.mktemp("real")
    clips = shared / "data" / "videos"
    text = SMALL.format(captions=clips / "captions.json", bert=shared / "golden/bert_tiny", uri=uri)
    (root / "vlm-dist.toml").write_text(text)
    captions = json.loads((clips / "captions.json").read_text())
    with (root / "test.jsonl").open("w") as lines:
        for video in ("bunny", "bikes", "pool_skimming"):
            for start, end, text in zip(*(captions[video][key] for key in ("start", "end", "text")), strict=True):
                row = {"video_id": video, "start": start, "end": end, "text": text, "split": "test"}
                lines.write(json.dumps(row) + "\n")
    assert main(["extract", str(clips), "--random-weights", "0", "--workspace", str(root)]) == 0
    return root


@pytest.fixture
def workspace(folder: Path, capsys: pytest.CaptureFixture[str]) -> Workspace:
    return Workspace(folder, capsys)


def test_every_clip_becomes_its_seconds(workspace: Workspace, folder: Path) -> None:
    info = workspace.json("store", "info", str(folder / "store"))
    assert (info["videos"]["ok"], info["videos"]["failed"]) == (10, 0)
    workspace.type("store", "verify", str(folder / "store"), "--deep")
    reader = FeatureReader(folder / "store", check="always")
    every = np.concatenate([reader.read(v) for v in range(10)]).astype(np.float32)
    assert len(every) >= 80, "the clips are a minute and a half"
    assert np.linalg.norm(every, axis=1) == pytest.approx(1, abs=2e-3)
    apart = np.linalg.norm(every[:, None] - every[None], axis=-1)[~np.eye(len(every), dtype=bool)]
    assert np.median(apart) > 0.3, "fitted random weights tell real seconds apart"


@pytest.mark.parametrize("init", [(), pytest.param(("--init", "scratch"), marks=pytest.mark.slow)])
def test_pretraining_and_retrieval(workspace: Workspace, init: tuple[str, ...]) -> None:
    trained = workspace.json("pretrain", *init, "--gpus", "0", "--workers", "1")
    assert np.isfinite(trained["metrics"]["train/loss"])
    assert "3 videos of the evaluation split retrieval test are left out" in workspace.errors, (
        "the test list's videos are left out"
    )
    found = workspace.json("evaluate", "retrieval", "--zero-shot")
    assert found["model"] == trained["model"]
    assert found["metrics"]["retrieval/candidates"] == found["metrics"]["retrieval/distinct_captions"] >= 3
