"""`vlm-dist extract` as it is typed: exit codes that do not change, and wrong usage that is found before the work."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from feature_store.reader import FeatureReader
from vlm_dist.cli.app import main

SETTINGS = """
[cluster]
tracking_uri = "{uri}"
[extract]
workers = 1
[extract.decode]
fps = 16
size = 64
"""


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path], ray_session: None, uri: str
) -> Path:
    """A workspace with a video, another of the same name, and a broken one."""
    root = tmp_path_factory.mktemp("workspace")
    (root / "vlm-dist.toml").write_text(SETTINGS.format(uri=uri))
    make_video(root / "videos" / "good.mp4", 2.0)
    make_video(root / "videos" / "again" / "good.mp4", 1.0)
    (root / "broken.mp4").write_text("not a film")
    return root


def extract(folder: Path, *words: str) -> int:
    return main(["extract", *words, "--workspace", str(folder)])


def test_wrong_usage_is_found_before_the_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "caps.txt").write_text("1 0.0 hello")
    videos = str(folder / "videos")
    assert extract(folder, videos, "--random-weights", "0", "--captions", str(folder / "caps.txt")) == 2
    assert "the ending '.txt' is not known" in capsys.readouterr().err
    assert extract(folder, videos, "--random-weights", "0", "--set", "extract.decode.fps=25") == 2
    assert "must be even" in capsys.readouterr().err
    (folder / "caps.json").write_text('{"good": {"start": [0], "end": [1], "text": ["x"]}, "v2": {')
    words = ("--captions", str(folder / "caps.json"), "--tokenizer", "wordpiece:120")
    assert extract(folder, videos, "--random-weights", "0", *words) == 1
    assert "no captions of video v2 after video good" in capsys.readouterr().err
    (folder / "caps.json").write_text("{}")
    words = ("--captions", str(folder / "caps.json"), "--tokenizer", "wordpiece:many")
    assert extract(folder, videos, "--random-weights", "0", *words) == 2
    assert "give wordpiece:N with a number of pieces" in capsys.readouterr().err
    assert not (folder / "store").exists()


@pytest.mark.slow
def test_equal_runs_end_with_equal_codes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos, good, broken = (str(folder / name) for name in ("videos", "videos/again/good.mp4", "broken.mp4"))
    strict = ("--random-weights", "0", "--strict")
    assert [extract(folder, videos, *strict) for _ in range(2)] == [3, 3], "one of the two of one name was left out"
    assert [extract(folder, good, *strict) for _ in range(2)] == [0, 0], "nothing is wrong with what was listed"
    assert [extract(folder, broken, *strict) for _ in range(2)] == [3, 3]
    assert [extract(folder, good, broken, *strict) for _ in range(2)] == [3, 3]
    capsys.readouterr()
    assert extract(folder, videos, "--weights", str(folder / "typo.pth")) == 1
    assert "typo.pth: no such weights file; no S3D weights" in capsys.readouterr().err


def test_what_is_printed_is_of_the_listed_videos(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos, broken, store = str(folder / "videos"), str(folder / "broken.mp4"), folder / "my store"
    words = ("--random-weights", "0", "--store", str(store))
    (folder / "said.json").write_text('{"good": {"start": [0], "end": [1], "text": ["cut the onion"]}}')
    capsys.readouterr()

    assert extract(folder, broken, *words) == 1
    assert "broken.mp4: no known video format" in capsys.readouterr().err

    assert extract(folder, videos, *words, "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["failed"] == 1
    assert "Calibrating random weights on up to 48 one-second clips …" in shown.err
    assert "1 video (1 s of video) extracted in " in shown.err
    assert "on 1 worker; 0 failed, 1 repeated an id." in shown.err
    assert "1 video without features" in shown.err
    assert "no captions: pre-training needs them" in shown.err

    captions = ("--captions", str(folder / "said.json"), "--tokenizer", "wordpiece:60")
    assert extract(folder, broken, *words, *captions) == 0
    shown = capsys.readouterr()
    assert "Calibrating" not in shown.err
    assert "on 1 worker; 1 failed." in shown.out
    assert "not_a_video" in shown.out
    assert "duplicate" not in shown.out
    other = f"The store has 1 other video without features: `vlm-dist store failures '{store}'` lists all."
    assert other in shown.out

    assert extract(folder, videos, *words) == 0
    shown = capsys.readouterr()
    assert "Nothing to do: 2 videos listed, in the store already or failed before." in shown.out
    assert "Captions are as they were: 1 caption of 1 video." in shown.out
    assert "no captions" not in shown.err
    assert "duplicate" in shown.out
    assert "not_a_video" not in shown.out
    assert other in shown.out
    assert "--retry-failed" not in shown.out

    assert extract(folder, broken, *words) == 0
    assert "the same command with --retry-failed tries them again" in capsys.readouterr().out


def test_npy_refuses_what_it_would_ignore_or_overwrite(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = (str(folder / "videos" / "good.mp4"), "--npy", "--random-weights", "0")
    assert extract(folder, *words, "--store", "s", "--captions", "c.json") == 2
    assert "leave out --store and --captions, or --npy itself" in capsys.readouterr().err
    assert extract(folder, *words, "--workers", "2", "--retry-failed", "--tokenizer", "x") == 2
    assert "leave out --tokenizer and --workers and --retry-failed, or --npy itself" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert extract(folder, *words) == 0
    assert "Calibrating random weights" in capsys.readouterr().err
    written = (tmp_path / "good.npy").read_bytes()
    assert extract(folder, *words) == 2
    assert f"{tmp_path / 'good.npy'} is there already" in capsys.readouterr().err
    assert (tmp_path / "good.npy").read_bytes() == written


def test_one_video_needs_no_workspace(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ("--set", "extract.decode.size=64", "--set", "extract.decode.fps=16", "--random-weights", "0")
    monkeypatch.setattr("cluster.ray_local.ray_session", lambda cluster: pytest.fail("Ray was asked for"))
    monkeypatch.setattr("jobs.tracking.tracked_run", lambda *a, **b: pytest.fail("a run was opened"))
    video = str(folder / "videos" / "good.mp4")
    assert main(["extract", video, *small]) == 0
    said = capsys.readouterr().out
    assert "2 tokens of width 512 (mean length 1.000) in " in said
    assert f"-> {tmp_path / 'store'}, video 'good'\n" in said
    assert main(["extract", video, *small, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["width"], result["nothing_to_do"]) == (2, 512, True)
    assert main(["extract", str(folder / "broken.mp4"), *small]) == 1
    assert f"error: {folder / 'broken.mp4'}: no known video format" in capsys.readouterr().err
    assert main(["extract", str(folder / "videos" / "again" / "good.mp4"), *small]) == 1
    assert "the id 'good' is of another video" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
    assert main(["extract", video, *small, "--npy", "--set", "extract.gpus_per_worker=1"]) == 2
    assert "torch sees none here" in capsys.readouterr().err

    assert main(["extract", video, *small, "--npy", "--set", "extract.normalise=false"]) == 0
    stored = FeatureReader(tmp_path / "store").read(0).astype(np.float32)
    written = np.load(tmp_path / "good.npy").astype(np.float32)
    written /= np.linalg.norm(written, axis=1, keepdims=True)
    assert np.abs(stored - written).max() < 2e-3


def test_the_layer_is_an_option(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ("--set", "extract.decode.size=64", "--set", "extract.decode.fps=16")
    video = str(folder / "videos" / "good.mp4")
    assert main(["extract", video, *small, "--random-weights", "0"]) == 0
    kept = next((tmp_path / "store" / "_extractor").iterdir())
    assert main(["extract", video, *small, "--weights", str(kept), "--layer", "mixed_5c", "--npy"]) == 0
    assert np.load("good.npy").shape == (2, 1024)
    assert main(["extract", video, *small, "--weights", str(kept), "--layer", "fc", "--npy"]) == 2


def test_the_run_shows_what_decoded_and_what_failed(folder: Path, uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--random-weights", "0", "--store", str(folder / "shown"), "--json")
    assert extract(folder, str(folder / "videos"), str(folder / "broken.mp4"), *words) == 0
    run = json.loads(capsys.readouterr().out)["run"]
    client = MlflowClient(uri)
    names = {artifact.path for artifact in client.list_artifacts(run)}
    assert {"failures.csv", "failures.jsonl", "decoded.png"} <= names
    table = Path(client.download_artifacts(run, "failures.csv", str(folder))).read_text().splitlines()
    metrics = client.get_run(run).data.metrics
    assert table[0].startswith("video_id,reason,message")
    assert [line.split(",")[:2] for line in table[1:]] == [["broken", "not_a_video"], ["good", "duplicate"]]
    assert 0 <= metrics["extract/waiting_on_decode"] <= 1
    assert metrics["extract/videos"] == 2
