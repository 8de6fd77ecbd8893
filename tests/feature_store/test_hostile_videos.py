"""feature_store.decode against the files that a crawl brings, in a process of its own: no crash, no hang, a reason.

Run with -s to see how many files are whole and how many have which reason. More kinds of damage: test_odd_videos.py.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import av
import numpy as np
import pytest
from av.video.stream import VideoStream

from feature_store.config import DecodeConfig
from feature_store.info import failures
from feature_store.layout import create_store
from feature_store.manifest import list_inputs
from feature_store.plan import plan_videos
from feature_store.reader import FeatureReader
from feature_store.records import VideoRecord
from feature_store.snapshot import finalise
from feature_store.writer import ShardAttempt
from tests.feature_store.store_tools import features, provenance
from tests.feature_store.timed_videos import steady, write_frames
from tests.feature_store.video_files import moving_square, write_audio, write_video

SMALL = DecodeConfig(fps=16, size=64, timeout_s=5.0)
HANG_S = 10.0
SIZE = {"width": 64, "height": 48}
CODECS = {".mp4": "libx264", ".mkv": "libx264", ".avi": "mpeg4"}  # tried at length; others in test_odd_videos.py
REASONS = {"missing", "empty_file", "not_a_video", "no_video_stream", "zero_seconds", "truncated", "corrupt", "timeout"}
REASONS.add("error")  # as `SecondsReader` documents them

# Decodes files one after the other and says what became of each; one that takes too long ends the process.
DECODER = """
import faulthandler, json, sys, time
import numpy as np
from feature_store.config import DecodeConfig
from feature_store.decode import DecodeError, SecondsReader
cfg, hang_s, paths = DecodeConfig.model_validate_json(sys.argv[1]), float(sys.argv[2]), json.loads(sys.stdin.read())
for path in paths:
    faulthandler.dump_traceback_later(hang_s, exit=True)
    reader, start = SecondsReader(path, cfg), time.monotonic()
    try:
        seconds = [(second.shape, str(second.dtype)) for second in reader]
        told = {"reason": "", "message": "", "seconds": seconds}
    except DecodeError as error:
        told = {"reason": error.reason, "message": str(error), "seconds": []}
    print(json.dumps(told | {"decoded_s": reader.decoded_s, "took_s": time.monotonic() - start}), flush=True)
"""


class Outcome(NamedTuple):
    """What became of a file: seconds, or the reason why there are none."""

    rows: int
    reason: str


def outcomes(paths: Sequence[Path]) -> list[Outcome]:
    """Decodes the files in a process of its own, and checks what must hold for any file whatever it is."""
    command = [sys.executable, "-c", DECODER, SMALL.model_dump_json(), str(HANG_S)]
    done = subprocess.run(
        command, input=json.dumps([*map(str, paths)]), capture_output=True, text=True, timeout=HANG_S * (len(paths) + 1)
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(paths), f"{paths[len(told)]} ended the process ({done.returncode}): {done.stderr[-2000:]}"
    assert done.returncode == 0
    found: list[Outcome] = []
    for path, one in zip(paths, told, strict=True):
        if one["reason"]:
            assert one["reason"] in REASONS, (path, one)
            assert str(path) in one["message"], (path, one)
        else:
            assert one["seconds"], (path, "neither seconds nor a reason")
            assert {(tuple(shape), dtype) for shape, dtype in one["seconds"]} == {((16, 64, 64, 3), "uint8")}
            assert len(one["seconds"]) - 1 < one["decoded_s"] <= len(one["seconds"])
        found.append(Outcome(len(one["seconds"]), one["reason"]))
    return found


def counts(title: str, found: Sequence[Outcome]) -> Counter[str]:
    """How many are whole and how many have which reason; printed."""
    counted = Counter(one.reason or "whole" for one in found)
    print(f"{title}: {', '.join(f'{number} {name}' for name, number in counted.most_common())}")
    return counted


@pytest.fixture(params=CODECS)
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Three seconds in each container, of 48 pictures."""
    return write_video(tmp_path / f"whole{request.param}", 3.0, codec=CODECS[request.param], **SIZE)


def test_truncated_at_thirty_points(tmp_path: Path, whole: Path) -> None:
    data = whole.read_bytes()
    sizes = [0, 1, 8, 100, *np.linspace(200, len(data) - 2, 25, dtype=int).tolist(), len(data) - 1]
    paths = [tmp_path / f"cut {size}{whole.suffix}" for size in sizes]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(data[:size])
    found = outcomes([whole, *paths])
    told = counts(f"{whole.suffix} cut at {len(sizes)} points", found[1:])
    assert found[0] == Outcome(3, "")
    assert found[1] == Outcome(0, "empty_file")
    assert {one.rows for one in found if not one.reason} == {3}, "what is whole has every second"
    assert told["whole"] <= 6, "what may be missing is behind the last picture, or within the last 5 %"
    assert set(told) <= {"whole", "empty_file", "not_a_video", "truncated"}


def test_a_hundred_flipped_bits(tmp_path: Path, whole: Path) -> None:
    data, rng, paths = whole.read_bytes(), Random(4), list[Path]()
    for number in range(100):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        paths.append(tmp_path / f"bit {number}{whole.suffix}")
        paths[-1].write_bytes(damaged)
    found = outcomes(paths)
    told = counts(f"{whole.suffix} with one of {8 * len(data)} bits flipped, 100 times", found)
    assert told["whole"] >= 80
    assert told.total() == 100
    longest = 48 * 10 if whole.suffix == ".avi" else 16  # by its frame rate AVI may hold each picture for 10 s
    assert all(one.rows <= longest for one in found), "a damaged time is no long video"


def picture_seconds(path: Path, codec: str, pix_fmt: str, width: int, height: int) -> Path:
    """Three seconds of any shape."""
    pictures = moving_square(0, width, height)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        for number in range(48):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pictures(number), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def odd_files(folder: Path) -> dict[Path, Outcome]:
    """What a crawl brings, and what must become of it."""
    ok, no_video = Outcome(3, ""), Outcome(0, "not_a_video")
    whole = write_video(folder / "whole.mp4", 3.0, **SIZE)
    loop, empty, zeros = folder / "loop.mp4", folder / "empty.mp4", folder / "zeros.mp4"
    loop.symlink_to(loop)
    empty.touch()
    zeros.write_bytes(bytes(10_000))
    expected = {
        whole: ok,
        loop: Outcome(0, "missing"),
        empty: Outcome(0, "empty_file"),
        zeros: no_video,
        write_audio(folder / "sound.mp4"): Outcome(0, "no_video_stream"),
        picture_seconds(folder / "1x1.mp4", "libx264", "yuv444p", 1, 1): ok,
        picture_seconds(folder / "1x1.avi", "mpeg4", "yuv420p", 1, 1): ok,
        picture_seconds(folder / "1x1.webm", "libvpx", "yuv420p", 1, 1): ok,
        picture_seconds(folder / "odd.mp4", "libx264", "yuv444p", 63, 49): ok,
        picture_seconds(folder / "odd.avi", "mpeg4", "yuv420p", 63, 49): ok,
        picture_seconds(folder / "odd.webm", "libvpx", "yuv420p", 63, 49): ok,
        write_video(folder / "300 fps.mp4", 3.0, fps=300, **SIZE): ok,
    }
    for suffix, codec in {**CODECS, ".webm": "libvpx"}.items():
        expected[write_video(folder / f"one frame{suffix}", 1 / 16, codec=codec, **SIZE)] = Outcome(1, "")
    for name in ("mp4.avi", "mp4.mkv", "mp4.3gp", "with  space .mp4", "line\nbreak.mp4", "søster 妹 🎬.mp4", "-i.mp4"):
        (folder / name).write_bytes(whole.read_bytes())
        expected[folder / name] = ok
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{whole}\n#EXT-X-ENDLIST\n"
    for name, text in {"hls.mp4": playlist, "concat.mp4": "ffconcat version 1.0\nfile whole.mp4\n"}.items():
        (folder / name).write_text(text)
        expected[folder / name] = no_video
    return expected


def test_odd_files(tmp_path: Path) -> None:
    expected = odd_files(tmp_path / "crawl")
    videos = list_inputs([tmp_path / "crawl"])
    assert sorted(video.path for video in videos) == sorted(map(str, expected))
    found = outcomes([*expected])
    counts("odd files", found)
    assert dict(zip(expected, found, strict=True)) == expected


def set_bits(path: Path, at: int, bits: int) -> Path:
    """Damages a file."""
    data = bytearray(path.read_bytes())
    data[at] |= bits
    path.write_bytes(data)
    return path


def test_one_bit_does_not_make_hours_of_a_held_picture(tmp_path: Path) -> None:
    times = write_frames(tmp_path / "times.mp4", steady(3))
    set_bits(times, times.read_bytes().index(b"stts") + 16, 0x02)  # how long the first picture lasts
    rate = write_video(tmp_path / "rate.avi", 3.0, codec="mpeg4", **SIZE)
    set_bits(rate, rate.read_bytes().index(b"vids") + 21, 0x10)  # the lower half of the frame rate
    start = write_frames(tmp_path / "start.flv", steady(3), sound_s=3)
    data = start.read_bytes()
    set_bits(start, 13 + 15 + int.from_bytes(data[14:17], "big") + 7, 0x01)  # time of the first tag behind the header
    found = outcomes([times, rate, start])
    assert [one.reason for one in found[:2]] == ["corrupt", "corrupt"]
    assert found[2].rows <= 4


def test_a_stated_length_that_is_too_short_hides_no_pictures(tmp_path: Path) -> None:
    path = write_video(tmp_path / "short.mp4", 20.0, **SIZE)
    data = bytearray(path.read_bytes())
    at = data.index(b"mdhd") + 20  # length of the track, behind version, two dates and time scale
    data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") // 10).to_bytes(4, "big")
    path.write_bytes(data)
    assert outcomes([path]) == [Outcome(20, "")]


def test_ids_are_no_paths_and_count_once(tmp_path: Path) -> None:
    ids = [
        "../../x",
        "/etc/x",
        "..",
        ".",
        "a/../../b",
        "line\nbreak",
        "søster 妹 🎬",
        "a b",
        "x" * 1000,
        "%2e%2e%2f",
        "../../x",
    ]
    folder, root = tmp_path / "deep" / "er", tmp_path / "deep" / "er" / "store"
    folder.mkdir(parents=True)
    lines = [{"video_id": name, "path": f"{number}.mp4"} for number, name in enumerate(ids)]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(root)}
    create_store(root, provenance(), 1024)
    videos = list_inputs([folder / "list.jsonl"])
    assert [video.video_id for video in videos] == ids
    for task in plan_videos(root, videos, 1):
        with ShardAttempt(root, task.shard) as attempt:
            for video in task.videos:
                attempt.add(VideoRecord(video_id=video.video_id, path=video.path), features(video.video_id, 3))
            assert attempt.commit()
    finalise(root)
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(root)} == before
    reader = FeatureReader(root)
    for name in ids:
        assert np.array_equal(reader.read(reader.index.find(name)), features(name, 3))
    assert [(r.video_id, r.path, r.reason) for r in failures(root)] == [(ids[-1], videos[-1].path, "duplicate")]
