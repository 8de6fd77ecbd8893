"""feature_store.manifest: folders, files and lists, and errors that name line and column."""

import json
from pathlib import Path

import pytest

from feature_store.manifest import list_inputs
from feature_store.plan import PlannedVideo
from vlm_dist.errors import ConfigError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_folder_is_searched_in_order(tmp_path: Path) -> None:
    names = ["b.mp4", "a.MKV", "sub/c.webm", "sub/deep/d.avi"]
    touch(*(tmp_path / name for name in [*names, "notes.txt", ".hidden.mp4", ".cache/x.mp4", "captions.json"]))
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    videos = list_inputs([tmp_path])
    assert [video.video_id for video in videos] == ["a", "b", "c", "d"]
    assert all(Path(video.path).is_file() and Path(video.path).is_absolute() for video in videos)


def test_files_keep_their_order_even_when_absent(tmp_path: Path) -> None:
    touch(tmp_path / "z.mp4", tmp_path / "film")
    videos = list_inputs([tmp_path / "z.mp4", tmp_path / "gone.mp4", tmp_path / "film"])
    assert [video.video_id for video in videos] == ["z", "gone", "film"]


def test_folders_without_videos_and_typing_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no videos"):
        list_inputs([tmp_path])
    with pytest.raises(ConfigError, match="no such file or folder"):
        list_inputs([tmp_path / "viedos"])
    with pytest.raises(ConfigError, match="no such manifest"):
        list_inputs([tmp_path / "list.csv"])


def test_csv(tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text('\ufeffpath,title,video_id\nsub/a.mp4,"one, two",first\n/abs/b.mp4,,../evil id\n')
    assert list_inputs([manifest]) == [
        PlannedVideo(video_id="first", path=str(tmp_path / "sub" / "a.mp4")),
        PlannedVideo(video_id="../evil id", path="/abs/b.mp4"),
    ]


def test_jsonl(tmp_path: Path) -> None:
    manifest = tmp_path / "list.jsonl"
    lines = [{"video_id": "é 1", "path": "a.mp4"}, {"video_id": "2", "path": "/b.mp4", "extra": 1}]
    manifest.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    assert list_inputs([manifest]) == [
        PlannedVideo(video_id="é 1", path=str(tmp_path / "a.mp4")),
        PlannedVideo(video_id="2", path="/b.mp4"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,path\n1,a.mp4\n", "line 1 must name the columns video_id and path; it has id, path"),
        ("a.csv", b"", "line 1 must name"),
        ("a.csv", b"video_id,path\n", "a.csv: lists no video"),
        ("a.jsonl", b"\n", "a.jsonl: lists no video"),
        ("a.csv", b"video_id,path\n1,a.mp4\n2,\n", "line 3: column path"),
        ("a.csv", b"video_id,path\n1\n", "line 2: column path"),
        ("a.csv", b'video_id,path\n1,"a.mp4\n', "line 2"),
        ("a.csv", b"video_id,path\n\xff\xfe,a.mp4\n", "not UTF-8"),
        ("a.csv", b"video_id,path\n1,a, b.mp4\n", "line 2: more fields than columns; quote a path"),
        ("a.csv", b'"video_id,path\n1,a.mp4\n', "line 2: unexpected end of data"),
        ("a.jsonl", b'{"video_id": "1", "path": "a\\u0000b.mp4"}\n', "line 1: column path"),
        ("a.jsonl", b'{"video_id": ' + b"9" * 5000 + b"}\n", "line 1: no JSON"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "line 1: no JSON"),
        (
            "a.jsonl",
            b'{"video_id": "1", "path": "a.mp4"}\n{"video_id": 2, "path": "b.mp4"}\n',
            "line 2: column video_id",
        ),
        ("a.jsonl", b'{"video_id": "1"}\n', "line 1: column path"),
        ("a.jsonl", b'\n{"video_id": \n', "line 2: no JSON"),
        ("a.jsonl", b"[1, 2]\n", "line 1: must be an object"),
    ],
)
def test_errors_name_line_and_column(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list_inputs([tmp_path / name])
