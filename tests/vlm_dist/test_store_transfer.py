"""`vlm-dist store import` and `store export` as they are typed: results, error lines, exit codes, the tracked run."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_dist.cli.app import main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with six arrays, one of them bad, and captions as a pickle."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "features"
    folder.mkdir()
    for number in range(5):
        rows = np.random.default_rng(number).standard_normal((4 + number, 32)).astype(np.float32)
        np.save(folder / f"v{number}.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    np.save(folder / "zeros.npy", np.zeros((3, 32)))
    captions = {f"v{k}": json.dumps({"start": [0], "end": [2], "text": [f"cut {k} onions"]}) for k in range(4)}
    (tmp_path / "raw_caption.pkl").write_bytes(pickle.dumps(captions))
    return tmp_path


def typed(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of a command line that ends with this code."""
    capsys.readouterr()
    got = main(["store", *words])
    shown = capsys.readouterr()
    assert got == code, shown.err
    return shown.out, shown.err


@pytest.fixture
def server(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tracking server for all commands: each would start its own."""
    monkeypatch.setenv("VLM_DIST_CLUSTER__TRACKING_URI", uri)


@pytest.mark.usefixtures("server")
def test_features_come_in_and_go_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _runs(capsys)
    line = ("import", "features", "--captions", "raw_caption.pkl", "--tokenizer", "wordpiece:60", "--allow-pickle")
    out, _ = typed(capsys, *line, "--extractor", "slowfast", "--json", "--strict", code=3)
    first: dict[str, Any] = json.loads(out)
    assert (first["ok"], first["failed"], first["nothing_to_do"], first["rows"]) == (5, 1, False, 30)
    assert first["run"]
    out, _ = typed(capsys, *line, "--extractor", "slowfast")
    assert "Nothing to do: all 6 arrays are in the store or have failed before." in out
    assert "Captions are as they were: 4 captions of 4 videos." in out
    assert "all_zero" in out
    assert "with --retry-failed tries them again" in out
    info = json.loads(typed(capsys, "info", "--json")[0])
    assert info["fingerprint"] == first["fingerprint"]
    assert info["provenance"]["extractor"] == "slowfast"
    assert info["clips"] == 4
    assert "zeros" in typed(capsys, "failures")[0]
    (here / "more.json").write_text(json.dumps({"v4": {"start": [0], "end": [2], "text": ["cut 3 onions"]}}))
    out, _ = typed(capsys, "import", "features", "--extractor", "slowfast", "--captions", "more.json")
    assert "5 captions" in out
    assert " word pieces, the store's own." in out

    out, _ = typed(capsys, "export", "store", "out", "--json")
    assert json.loads(out)["npy"] == 5
    assert {path.name for path in (here / "out").iterdir()} == {
        *(f"v{number}.npy" for number in range(5)), "videos.parquet", "clips.parquet", "export.json",
    }  # fmt: skip
    out, _ = typed(capsys, "export", "store", "out", "--npy")
    assert "0 feature files written (0.0 MB), 5 were there." in out
    assert "tables" not in out
    out, _ = typed(capsys, "import", "out", "--store", "again", *line[2:], "--json")
    assert json.loads(out)["fingerprint"] == first["fingerprint"]

    new = [run for name, run in _runs(capsys).items() if name not in before]
    assert [(run["kind"], run["status"]) for run in new] == [("import", "FINISHED")] * 2


def _runs(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """The newest runs by their ids."""
    capsys.readouterr()
    assert main(["jobs", "list", "--json"]) == 0
    return {run["id"]: run for run in json.loads(capsys.readouterr().out)}


@pytest.mark.usefixtures("server")
def test_an_import_tells_of_its_own_failures(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the others one line; a file that repeats an id is counted as that wherever failures are counted."""
    typed(capsys, "import", "features")
    for folder, width in (("wide", 16), ("more", 32)):
        (here / folder).mkdir()
        for number in range(3):
            np.save(here / folder / f"{folder}{number}.npy", np.eye(4, width, dtype=np.float32))
    np.save(here / "more" / "v0.npy", np.eye(4, 32, dtype=np.float32))
    out, _ = typed(capsys, "import", "wide")
    assert "0 videos (0 s of video, 0.0 MB) imported" in out
    assert "; 3 failed.\n" in out
    assert "3 videos without features " in out
    assert "The store has 1 other video without features: `vlm-dist store failures" in out
    out, _ = typed(capsys, "import", "more")
    assert "; 0 failed, 1 repeated an id.\n" in out
    assert "1 video without features: 0 failed, 1 " in out  # the title is folded to the table
    assert "wide0" not in out
    assert "The store has 4 other videos without features" in out
    again, _ = typed(capsys, "import", "more", "--json", "--strict", code=3)
    assert json.loads(again)["failed"] == 1


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (("import", "absent"), 2, "absent: no such file or folder"),
        (("import", "raw_caption.pkl"), 2, "raw_caption.pkl is a pickle, and a pickle can hold a program"),
        (("import", "raw_caption.pkl", "--allow-pickle"), 1, "none of the 4 arrays can be features"),
        (("import", "features", "--captions", "raw_caption.pkl"), 2, "add --allow-pickle if you trust"),
        (("import", "features", "--captions", "absent.json"), 2, "caption file"),
        (("import", "features", "--weights", "absent.pth"), 1, "no such weights file"),
        (("export", "absent", "out"), 1, "absent: there is nothing"),
        (("export", "store"), 2, "Missing argument 'DIR'"),
    ],
)
def test_errors_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], line: tuple[str, ...], code: int, words: str
) -> None:
    out, err = typed(capsys, *line, code=code)
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert out == ""
    assert not (here / "store").exists()


@pytest.mark.usefixtures("server")
def test_a_failed_array_is_tried_again_when_it_is_mended(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed(capsys, "import", "features")
    rows = np.random.default_rng(9).standard_normal((3, 32)).astype(np.float32)
    np.save(here / "features" / "zeros.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    assert "Nothing to do" in typed(capsys, "import", "features")[0]
    out = json.loads(typed(capsys, "import", "features", "--retry-failed", "--json", "--strict")[0])
    assert (out["ok"], out["failed"]) == (1, 0)
    assert json.loads(typed(capsys, "info", "--json")[0])["videos"]["ok"] == 6
