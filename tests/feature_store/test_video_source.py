"""feature_store.video_source: a local file for a video in a bucket, what it leaves behind, and why there is none."""

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from feature_store.config import DecodeConfig
from feature_store.decode import DecodeError, SecondsReader
from feature_store.s3_storage import S3Storage
from feature_store.video_source import existing, local_video, s3_address, video_identity
from vlm_dist.errors import ConfigError, ExtractionError, StoreUnreachableError

SMALL = DecodeConfig(fps=16, size=64)
MakeVideo = Callable[..., Path]


def put(address: str, data: bytes) -> str:
    bucket, _, key = address.removeprefix("s3://").partition("/")
    S3Storage(f"s3://{bucket}").replace(key, data)
    return address


def why_not(path: str) -> tuple[str, str]:
    """Reason and message of a video that gives no local file."""
    with pytest.raises(DecodeError) as caught, local_video(path):
        pytest.fail("there is a file")
    return caught.value.reason, str(caught.value)


def scratch_files() -> list[Path]:
    return [path for path in Path(os.environ["FEATURE_STORE_CACHE"]).rglob("video*") if path.is_file()]


def test_an_address_has_two_slashes_again() -> None:
    for given in (Path("s3://lab/a/b.mp4"), "s3:/lab/a/b.mp4", "s3://lab/a/b.mp4", "s3://lab/a/b.mp4/"):
        assert s3_address(given) == "s3://lab/a/b.mp4"
    for given in ("a.mp4", "/s3:/a.mp4", "s3.mp4", Path("s3/a.mp4"), "gs://lab/a.mp4"):
        assert s3_address(given) is None
    with pytest.raises(ConfigError, match="s3://bucket/name"):
        s3_address("s3://")


def test_a_local_file_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"abc")
    with local_video(str(tmp_path / "a.mp4")) as file:
        assert file == tmp_path / "a.mp4"
    assert file.exists()


def test_an_object_decodes_as_the_file_does_and_its_copy_goes(
    tmp_path: Path, bucket: str, make_video: MakeVideo
) -> None:
    video = make_video(tmp_path / "a.mkv", 2.5)
    for name in ("a.mkv", "with space/søster 妹 %20?#.mkv", "a." + "x" * 300):
        with local_video(put(f"{bucket}/{name}", video.read_bytes())) as copy:
            assert copy.suffix == (".mkv" if name.endswith(".mkv") else "")
            assert scratch_files() == [copy]
            assert np.array_equal(np.stack([*SecondsReader(copy, SMALL)]), np.stack([*SecondsReader(video, SMALL)]))
        assert scratch_files() == []


def test_an_error_of_the_block_names_the_object_and_leaves_no_copy(bucket: str, broken_videos: dict[str, Path]) -> None:
    address = put(f"{bucket}/cut.mp4", broken_videos["truncated"].read_bytes())
    with pytest.raises(DecodeError) as caught, local_video(address) as copy:
        list(SecondsReader(copy, SMALL))
    assert str(caught.value).startswith(f"{address}: ")
    assert caught.value.reason == "truncated"
    assert caught.value.decoded_s > 2
    with pytest.raises(ExtractionError, match=f"^{address} is odd$"), local_video(address) as copy:
        raise ExtractionError(f"{copy} is odd")
    assert scratch_files() == []


FETCH = """
import resource, sys
from feature_store.video_source import local_video, video_identity
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
with local_video(sys.argv[1] + "/small.mp4"): before = peak()
with local_video(sys.argv[1] + "/large.mp4") as copy: print(copy.stat().st_size >> 20, peak() - before)
assert "torch" not in sys.modules
"""


def test_a_large_object_is_never_whole_in_memory(bucket: str) -> None:
    put(f"{bucket}/small.mp4", b"x")
    put(f"{bucket}/large.mp4", bytes(120 << 20))
    done = subprocess.run([sys.executable, "-c", FETCH, bucket], check=True, capture_output=True, text=True)
    mebibytes, grown = map(int, done.stdout.split())
    assert mebibytes == 120
    assert grown < 80


def test_an_object_that_is_replaced_halfway_is_not_mixed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_store.s3_storage._PART_BYTES", 1000)
    rng = np.random.default_rng(0)
    data = rng.bytes(4500)
    with local_video(put(f"{bucket}/a.mp4", data)) as copy:
        assert copy.read_bytes() == data
    written: list[bytes] = []

    def replaced_after_the_first_piece(piece: bytes, crc: int) -> int:
        if not written:
            put(f"{bucket}/a.mp4", rng.bytes(4500))
        written.append(piece)
        return crc

    monkeypatch.setattr("feature_store.s3_storage.crc32c", replaced_after_the_first_piece)
    reason, message = why_not(f"{bucket}/a.mp4")
    assert reason == "error"
    assert f"{bucket}/a.mp4 was replaced" in message
    assert len(written) == 1


def test_what_is_not_there(bucket: str) -> None:
    assert why_not(f"{bucket}/gone.mp4") == ("missing", f"{bucket}/gone.mp4: no such object")
    reason, message = why_not("s3://no-such-bucket/a.mp4")
    assert reason == "error"
    assert message.startswith("s3://no-such-bucket/a.mp4: there is no such bucket")
    for name in ("a//b.mp4", "a/../b.mp4", "new\nline.mp4", "half a \udcff.mp4"):
        reason, message = why_not(f"{bucket}/{name}")
        assert reason == "error"
        assert f"{bucket}/{name}" in message
        assert "rename it" in message


class _Forbidding(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def forbidden(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket that gives no access."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Forbidding)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield "s3://forbidden"
    server.shutdown()
    server.server_close()


def test_no_access_says_what_to_do(forbidden: str) -> None:
    reason, message = why_not(f"{forbidden}/a.mp4")
    assert reason == "error"
    assert f"{forbidden}/a.mp4" in message
    assert "Access Denied" in message
    assert "AWS_ACCESS_KEY_ID" in message
    for asked in (video_identity, lambda path: existing([path])):
        with pytest.raises(DecodeError, match="AWS_ACCESS_KEY_ID") as caught:
            asked(f"{forbidden}/a.mp4")
        assert caught.value.reason == "error"


def test_a_full_disk_of_the_node_is_no_failure_of_the_video(
    bucket: str, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEATURE_STORE_CACHE", str(small_disk))
    address = put(f"{bucket}/a.mp4", bytes(1 << 20))
    with pytest.raises(StoreUnreachableError, match="Free some space"), local_video(address):
        pytest.fail("there is a file")
    assert scratch_files() == []


def test_identity_changes_with_the_content(tmp_path: Path, bucket: str) -> None:
    file, address = tmp_path / "a.mp4", f"{bucket}/a.mp4"
    for path in (str(file), address, str(tmp_path), bucket + "/folder", "a\0b", "x" * 5000):
        assert video_identity(path) == ""
    seen: list[str] = []
    for data in (b"one", b"two", b"three"):
        file.write_bytes(data)
        os.utime(file, ns=(0, len(seen)))  # clocks of file systems are coarse
        put(address, data)
        seen += [video_identity(str(file)), video_identity(address)]
        assert seen[-2:] == [video_identity(str(file)), video_identity(address)]
    assert len(set(seen)) == 6
    assert "" not in seen
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert video_identity(str(tmp_path / "loop")) == ""
    assert existing([address, str(file), f"{bucket}/b.mp4", str(tmp_path / "b.mp4")]) == {address, str(file)}


def test_a_decode_error_of_another_process_keeps_its_numbers() -> None:
    error = pickle.loads(pickle.dumps(DecodeError("a.mp4: cut", "truncated", 1.5, 4.0)))
    assert (str(error), error.reason, error.decoded_s, error.claimed_s) == ("a.mp4: cut", "truncated", 1.5, 4.0)
