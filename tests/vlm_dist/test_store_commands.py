"""Commands on a store as they are typed: captions, delete, split, migrate, a picture, failures again, a store on S3."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_store.index import StoreIndex
from feature_store.layout import group_json
from feature_store.reader import FeatureReader
from tests.feature_store.store_tools import features, make_store
from vlm_dist.cli.app import main

SMALL = """
[extract.decode]
fps = 8
size = 48
[captions]
tokenizer = "wordpiece:60"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> Path:
    """A workspace with a store of six videos."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vlm-dist.toml").write_text(SMALL)
    make_store(tmp_path / "store", {f"v{n}": features(f"v{n}", 9 + n) for n in range(6)} | {"broken": None})
    told = {f"v{n}": {"start": [0.0], "end": [4.0], "text": [f"cut {n} onions"]} for n in range(6)}
    (tmp_path / "captions.json").write_text(json.dumps(told))
    monkeypatch.setenv("VLM_DIST_CLUSTER__TRACKING_URI", uri)
    return tmp_path


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Type a command that ends with a code; gives what it printed (for another code than 0: its error line)."""

    def run(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        got = main(list(words))
        shown = capsys.readouterr()
        assert got == code, shown.err
        return shown.err if code else shown.out

    return run


def test_captions_splits_deletions_and_a_picture(here: Path, typed: Callable[..., str]) -> None:
    before = {row["id"] for row in json.loads(typed("jobs", "list", "--json"))}
    assert "has no captions yet" in typed("captions", code=1)
    assert "6 captions" in typed("captions", "captions.json")
    assert "Captions are as they were" in typed("captions", "captions.json")
    result: dict[str, Any] = json.loads(typed("captions", "--tokenizer", "wordpiece:50", "--json"))
    assert result["changed"]
    assert result["run"]
    runs = [row for row in json.loads(typed("jobs", "list", "--json")) if row["id"] not in before]
    assert [row["kind"] for row in runs] == ["extract", "extract"], "one for each time that the captions changed"

    shown = typed("store", "show", "v3")
    assert all(told in shown for told in ("cut 3 onions", "videos/v3.mp4", "provenance: weights"))
    assert json.loads(typed("store", "show", "broken", "--json"))["record"]["reason"] == "corrupt"
    assert "never heard of a video 'v33'" in typed("store", "show", "v33", code=1)

    assert "2 snapshots (0.0 MB) would go, 1 kept" in typed("store", "prune", "--dry-run")
    assert json.loads(typed("store", "prune", "--keep", "2", "--json"))["snapshots"] == ["000001"]

    (here / "train.txt").write_text("v1\nv2\nlater\n")
    assert typed("store", "split", "train", "--videos", "train.txt") == (
        "Split train: 3 videos, 1 of them not in the store yet.\n"
    )
    told = typed("store", "delete", "v5", "nobody")
    assert told == "1 video deleted, 1 is deleted now; 1 is not in the store: nobody.\n"
    told = typed("store", "delete", "a", "b", "c", "d", code=2)
    assert "store has none of these videos: a, b, c, …; give ids" in told
    info = json.loads(typed("store", "info", "--json", "--plot", "store.png"))
    assert (info["splits"], info["videos"]["deleted"], info["videos"]["ok"]) == ({"train": 3}, 1, 5)
    assert (here / "store.png").stat().st_size > 5000
    assert "xyz: the ending '.xyz' is not known; name it .png" in typed("store", "info", "--plot", "a.xyz", code=2)
    (here / "full.png").symlink_to("/dev/full")
    told = typed("store", "info", "--plot", "full.png", code=2)
    assert "picture full.png cannot be written: No space left on device. Make room there, or name" in told
    assert "picture absent/a.png cannot be written: No such file" in typed(
        "store", "info", "--plot", "absent/a.png", code=2
    )
    assert "brought back" in typed("store", "delete", "v5", "--undo")
    assert StoreIndex(here / "store").num_videos == 6
    assert typed("store", "split", "train", "--remove") == "Split train is removed.\n"
    assert "which videos?" in typed("store", "delete", code=2)
    assert "which videos?" in typed("store", "split", "x", code=2)
    assert "takes no videos" in typed("store", "split", "x", "v1", "--remove", code=2)
    assert typed("store", "verify", "--deep").endswith("The store is whole.\n")
    (here / "store/features/c/0/0").unlink()
    assert "\n1 video must be extracted again: v0" in typed("store", "verify", "--repair")


def test_what_became_of_captions_is_told(here: Path, typed: Callable[..., str]) -> None:
    told = {f"v{n}": {"start": [9000.0, 9e4], "end": [1e300, 9.1e4], "text": ["x", "y"]} for n in range(6)}
    told["v0"] = {"start": [0, 1, 5], "end": [math.inf, 2, 4], "text": ["word " * 200_000, 42, "backwards"]}
    told[""] = told["\n"] = {"start": [0], "end": [1], "text": ["nobody's"]}
    (here / "odd.json").write_text(json.dumps(told))
    shown = typed("captions", "odd.json")
    for line in (
        "2 videos with captions and without features ('', '\\n' …): kept for later",
        "1 caption without text: dropped",
        "1 caption without times, or with an end that is not after the start: dropped",
        "10 captions from after the end of the video: dropped (nearly all of the file: are its times seconds, or",
        "1 caption reaching beyond the video: cut",
        "1 caption longer than captions.max_chars or captions.max_tokens: cut",
    ):
        assert line in shown


def test_odd_ids_stay_in_their_row(here: Path, typed: Callable[..., str]) -> None:
    odd = "two\nlines\x1b[31m é\u2028漢"
    make_store(here / "odd", {odd: features("v", 3), f"{odd}?": None})
    shown = "two\\nlines\\x1b[31m é\\u2028漢"
    assert f"Video {shown}" in typed("store", "show", odd, "--store", "odd")
    assert f"│ {shown}? │ corrupt" in typed("store", "failures", "odd")
    assert json.loads(typed("store", "failures", "odd", "--json"))[0]["video_id"] == f"{odd}?"


def test_a_named_split_is_what_trains(here: Path, typed: Callable[..., str]) -> None:
    typed("captions", "captions.json")
    only = ("pretrain", "--gpus", "0", "--set", "init=scratch", "--set", "split.only=few")
    assert "no split 'few' (there is: none)" in typed(*only, code=1)
    typed("store", "split", "few", "broken")
    assert "no video is left to train on" in typed(*only, code=2)


def test_an_older_store_is_brought_up(here: Path, typed: Callable[..., str]) -> None:
    path = here / "store" / "zarr.json"
    store = json.loads(path.read_text())["attributes"]["vlm_dist"]
    path.write_bytes(group_json({**store, "schema_version": 1}))
    assert "vlm-dist store migrate" in typed("store", "info", code=1)
    assert "went from schema version 1 to 2" in typed("store", "migrate")
    assert "already" in typed("store", "migrate")
    assert json.loads(typed("store", "migrate", "--json")) == {"left_behind": [], "schema_version": 2}
    typed("store", "verify")


def extract(*words: str) -> dict[str, Any]:
    """An extraction with a Ray of its own, in a process of its own: its workers take the environment from there."""
    command = [sys.executable, "-P", "-m", "vlm_dist", "extract", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_extraction_into_a_bucket_and_failures_again(
    here: Path, bucket: str, typed: Callable[..., str], make_video: Callable[..., Path]
) -> None:
    """The way of a lab whose store is on S3: extract, mend the broken file, try again, read it from there."""
    store = f"{bucket}/lab/howto"
    for name in ("v0", "v1"):
        make_video(here / "videos" / f"{name}.mp4", 3.0)
    (here / "videos" / "v2.mp4").write_text("an error page")
    words = ("--store", store, "--random-weights", "0", "--set", "extract.workers=1")
    line = ("videos", *words, "--captions", "captions.json")
    first = extract(*line)
    assert (first["store"], first["ok"], first["failed"]) == (store, 2, 1)
    assert extract(*line)["nothing_to_do"]
    assert "v2" in typed("store", "failures", store)
    assert extract(*line)["nothing_to_do"], "a failure is tried again only when that is asked for"
    (here / "videos" / "v2.mp4").write_text("another error page")
    assert extract("--retry-failed", *words)["failed"] == 1, "without a list, all that failed before are this call's"
    make_video(here / "videos" / "v2.mp4", 2.0)
    again = extract("--retry-failed", *words)
    assert (again["ok"], again["failed"]) == (1, 0)
    assert "no video is to be tried again" in typed("extract", "--retry-failed", *words)
    typed("store", "verify", store, "--deep")
    info = json.loads(typed("store", "info", store, "--json"))
    assert (info["videos"]["ok"], info["clips"], info["failures"]) == (3, 3, {})
    reader = FeatureReader(store, "always", cache_bytes=1 << 30)
    rows = {reader.index.video_id(v): reader.read(v) for v in range(3)}
    assert {name: len(row) for name, row in rows.items()} == {"v0": 3, "v1": 3, "v2": 2}
    typed("store", "export", store, "files")
    assert np.array_equal(np.load(here / "files" / "v2.npy"), rows["v2"])
    assert "no store at" in typed("extract", "--retry-failed", "--store", "nowhere", "--random-weights", "0", code=2)
    assert "which videos?" in typed("extract", "--random-weights", "0", code=2)
