"""feature_store.manifest: folders, files and lists, and errors that name line and column."""

import json
from pathlib import Path

import pytest

from feature_store.info import failures
from feature_store.layout import create_store, open_store
from feature_store.manifest import list_inputs
from feature_store.plan import PlannedVideo, anything_to_do, plan_videos, read_plan
from feature_store.records import VideoRecord
from feature_store.s3_storage import S3Storage
from feature_store.writer import ShardAttempt
from tests.feature_store.store_tools import features, provenance
from vlm_dist.errors import ConfigError, StoreUnreachableError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_folder_is_searched_in_order(tmp_path: Path) -> None:
    names = ["b.mp4", "a.MKV", "sub/c.webm", "sub/deep/d.avi"]
    touch(*(tmp_path / name for name in [*names, "notes.txt", ".hidden.mp4", ".cache/x.mp4", "captions.json"]))
    touch(tmp_path.with_name("elsewhere") / "e.mp4")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "z").symlink_to(tmp_path.with_name("elsewhere"))
    videos = list_inputs([tmp_path])
    assert [video.video_id for video in videos] == ["a", "b", "c", "d", "e"]
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
    with pytest.raises(ConfigError, match="no such file or folder"):
        list_inputs([tmp_path / ("x" * 300)])
    for address in ("https://host/a.mp4", Path("gs://lab/a.mp4")):
        with pytest.raises(ConfigError, match="each a local path or s3://bucket/name"):
            list_inputs([address])


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
        ("a.csv", b"video_id,path\n1,https://host/a.mp4\n", "line 2: column path: videos are local files or objects"),
        ("a.csv", b"video_id,path\n1,s3://\n", "line 2: column path: s3://: an address in a bucket"),
    ],
)
def test_errors_name_line_and_column(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list_inputs([tmp_path / name])


def put(bucket: str, *names: str, data: bytes = b"x") -> None:
    for name in names:
        S3Storage(bucket).replace(name, data)


def of(bucket: str, *names: str) -> list[PlannedVideo]:
    """Objects by their ids, without folder and suffix."""
    return [PlannedVideo(Path(name).stem, f"{bucket}/{name}") for name in names]


def test_a_prefix_of_a_bucket_is_searched_in_order(bucket: str) -> None:
    videos = ["clips/a b.MKV", "clips/b.mp4", "clips/sub/c.webm", "clips/sub/deep/søster %20#?.avi"]
    put(
        bucket, *reversed(videos), "clips/notes.txt", "clips/.hidden.mp4", "clips/.cache/x.mp4", "clips-2/y.mp4", "z.ts"
    )
    for given in (f"{bucket}/clips", f"{bucket}/clips/", Path(f"{bucket}/clips")):
        assert list_inputs([given]) == of(bucket, *videos)
    assert list_inputs([bucket]) == of(bucket, "clips-2/y.mp4", *videos, "z.ts")
    assert list_inputs([f"{bucket}/clips/sub", f"{bucket}/z.ts"]) == of(bucket, *videos[2:], "z.ts")


def test_objects_named_one_by_one(bucket: str) -> None:
    put(bucket, "film")
    given = [f"{bucket}/gone.mp4", Path(f"{bucket}/film"), Path(f"{bucket}/sub/b.AVI")]
    assert list_inputs(given) == of(bucket, "gone.mp4", "film", "sub/b.AVI")


def test_buckets_without_videos(bucket: str) -> None:
    put(bucket, "clips/notes.txt")
    for address in (bucket, f"{bucket}/clips", f"{bucket}/clip"):
        with pytest.raises(ConfigError, match=f"{address}: holds no videos"):
            list_inputs([address])
    with pytest.raises(ConfigError, match=f"{bucket}/list.csv: no such manifest"):
        list_inputs([f"{bucket}/list.csv"])
    with pytest.raises(ConfigError, match="rename it"):
        list_inputs([f"{bucket}/a/../list.csv"])
    with pytest.raises(StoreUnreachableError, match="specified bucket does not exist"):
        list_inputs(["s3://no-such-bucket/clips"])
    with pytest.raises(ConfigError, match="s3://bucket/name"):
        list_inputs([Path("s3://")])


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_manifest_and_its_videos_lie_on_either_side(tmp_path: Path, bucket: str, suffix: str) -> None:
    paths = {"a": "a.mp4", "b": "sub/b.mp4", "c": "../c.mp4", "d": "s3://other/d.mp4", "e": "/nfs/e.mp4"}
    if suffix == ".csv":
        text = "\ufeffvideo_id,path\r\n" + "".join(f"{name},{path}\r\n" for name, path in paths.items())
    else:
        text = "\n".join(json.dumps({"video_id": name, "path": path}) for name, path in paths.items())
    put(bucket, f"lists/one{suffix}", data=text.encode())
    elsewhere = {"d": "s3://other/d.mp4", "e": "/nfs/e.mp4"}
    there = {"a": f"{bucket}/lists/a.mp4", "b": f"{bucket}/lists/sub/b.mp4", "c": f"{bucket}/c.mp4", **elsewhere}
    for given in (f"{bucket}/lists/one{suffix}", Path(f"{bucket}/lists/one{suffix}")):
        assert {video.video_id: video.path for video in list_inputs([given])} == there
    (tmp_path / f"one{suffix}").write_text(text, newline="")
    here = {"a": f"{tmp_path}/a.mp4", "b": f"{tmp_path}/sub/b.mp4", "c": f"{tmp_path}/../c.mp4", **elsewhere}
    assert {video.video_id: video.path for video in list_inputs([tmp_path / f"one{suffix}"])} == here
    put(bucket, f"lists/bad{suffix}", data=text.encode() + b"\nx\n")
    with pytest.raises(ConfigError, match=rf"{bucket}/lists/bad{suffix}: line \d+"):
        list_inputs([f"{bucket}/lists/bad{suffix}"])


def commit(root: Path, video: PlannedVideo, status: str, reason: str) -> None:
    """Records what became of the one video that is to be extracted."""
    (task,) = plan_videos(root, [video], 1)
    assert task.videos == (video,)
    record = {"video_id": video.video_id, "path": video.path, "status": status, "reason": reason}
    with ShardAttempt(root, task.shard) as attempt:
        attempt.add(VideoRecord.model_validate(record), features("v", 4) if status == "ok" else None)
        assert attempt.commit()


def test_a_missing_object_has_its_turn_once_it_is_there(tmp_path: Path, bucket: str) -> None:
    create_store(tmp_path, provenance(), 512)
    (video,) = list_inputs([Path(f"{bucket}/late.mp4")])
    commit(tmp_path, video, "failed", "missing")
    assert not anything_to_do(tmp_path, [video])
    put(bucket, "late.mp4")
    assert anything_to_do(tmp_path, [video])
    commit(tmp_path, video, "ok", "")
    assert not anything_to_do(tmp_path, [video])
    assert failures(tmp_path) == []


def test_a_corpus_may_move_into_a_bucket_and_between_buckets(tmp_path: Path, bucket: str) -> None:
    root = tmp_path / "store"
    create_store(root, provenance(), 512)
    touch(tmp_path / "v.mp4")
    put(bucket, "one/v.mp4", "two/v.mp4")
    for address in (str(tmp_path / "v.mp4"), f"{bucket}/one/v.mp4", f"{bucket}/two/v.mp4"):
        videos = list_inputs([address])
        (task,) = plan_videos(root, videos, 1)
        assert task.videos == tuple(videos)
    both = list_inputs([f"{bucket}/two", f"{bucket}/one"])
    plan_videos(root, both, 1)
    assert [segment.duplicates for segment in read_plan(open_store(root))] == [(), (both[1],)]
