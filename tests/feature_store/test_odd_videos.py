"""feature_store.decode on files that are odd, joined, cut off or damaged: the whole video or a reason, nothing else."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest

from feature_store.config import DecodeConfig
from feature_store.decode import DecodeError, SecondsReader
from tests.feature_store.timed_videos import CODECS, steady, write_frames

SMALL = DecodeConfig(fps=16, size=64)
MakeVideo = Callable[..., Path]


def rows(path: Path, cfg: DecodeConfig = SMALL) -> int:
    return sum(1 for _ in SecondsReader(path, cfg))


def reason(path: Path, cfg: DecodeConfig = SMALL) -> str:
    """Why a file is refused; `ok` where it is not."""
    try:
        rows(path, cfg)
    except DecodeError as error:
        return error.reason if str(path) in str(error) else f"a message without the path: {error}"
    return "ok"


@pytest.mark.parametrize(
    ("suffix", "name", "other"),
    [(".mp4", b"avc1", b"zz9q"), (".mkv", b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/XXX"), (".avi", b"FMP4", b"QQ77")],
)
def test_no_decoder_for_the_codec(tmp_path: Path, suffix: str, name: bytes, other: bytes) -> None:
    path = write_frames(tmp_path / f"a{suffix}", steady(2))
    path.write_bytes(path.read_bytes().replace(name, other))
    with pytest.raises(DecodeError, match="no decoder for its codec") as caught:
        rows(path)
    assert caught.value.reason == "not_a_video"


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    assert reason(tmp_path / f"{'a' * 300}.mp4") == "error"
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    assert reason(tmp_path / "loop.mp4") == "missing"
    locked = write_frames(tmp_path / "locked.mp4", steady(1))
    locked.chmod(0)
    if not os.access(locked, os.R_OK):  # root may read everything
        assert reason(locked) == "error"


def test_a_length_that_cannot_be_understood_is_ignored(tmp_path: Path) -> None:
    path = write_frames(tmp_path / "a.mkv", steady(3))
    path.write_bytes(path.read_bytes().replace(b"00:00:03", b"0x:00:03"))
    reader = SecondsReader(path, SMALL)
    assert len(list(reader)) == 3
    assert reader.claimed_s == 0.0


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".mp4", ".flv", ".ts"])
def test_a_late_start_is_not_a_missing_end(tmp_path: Path, suffix: str) -> None:
    """Matroska states when the video ends, not how long it is."""
    reader = SecondsReader(write_frames(tmp_path / f"a{suffix}", steady(4, start_s=20)), SMALL)
    assert len(list(reader)) == 4
    assert reader.claimed_s in (0.0, pytest.approx(4.0, abs=0.1))


@pytest.mark.parametrize("suffix", [".mkv", ".flv", ".mp4", ".ts", ".avi", ".webm"])
def test_sound_may_go_on_after_the_picture(tmp_path: Path, suffix: str) -> None:
    path = write_frames(tmp_path / f"a{suffix}", steady(3), sound_s=6)
    path.write_bytes(path.read_bytes().replace(b"DURATION", b"DURATIOX"))  # Matroska's length of each stream
    assert SecondsReader(path, SMALL).claimed_s < 4
    assert rows(path) in (3, 4)  # FLV and MPEG-TS count from the first sound on, a little earlier


def test_a_video_that_starts_after_its_sound_is_long_enough_only_with_its_end(tmp_path: Path) -> None:
    for suffix in (".mp4", ".mkv"):
        path = write_frames(tmp_path / f"late{suffix}", steady(4, start_s=3), sound_s=8)
        reader = SecondsReader(path, SMALL)
        assert len(list(reader)) == 7
        assert reader.claimed_s == pytest.approx(7.0, abs=0.1)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
        assert reason(path) == "truncated"


@pytest.mark.parametrize("sound_s", [0, 6])
@pytest.mark.parametrize("suffix", [*CODECS, ".fragmented.mp4"])
def test_a_cut_file_is_found(tmp_path: Path, suffix: str, sound_s: int) -> None:
    options = {"movflags": "frag_keyframe+empty_moov"} if suffix == ".fragmented.mp4" else None
    whole = write_frames(tmp_path / f"a{suffix}", steady(6), sound_s, options)
    assert reason(whole) == "ok"
    data = whole.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    for share in (0.3, 0.5, 0.7, 0.85):
        size = int(len(data) * share)
        while suffix == ".ts" and 0 in (size % 188, size % 192, size % 204):
            size += 1  # between two packets the cut of an MPEG-TS cannot be seen
        cut.write_bytes(data[:size])
        assert reason(cut) == "truncated", share


@pytest.mark.parametrize("gap_s", [0, 1000])
@pytest.mark.parametrize("suffix", [".ts", ".mpg"])
def test_joined_files_are_read_to_their_end(tmp_path: Path, make_video: MakeVideo, suffix: str, gap_s: int) -> None:
    """Clocks start anew where recordings were joined: back, or far ahead."""
    codec = "mpeg1video" if suffix == ".mpg" else "libx264"
    parts = [
        make_video(
            tmp_path / f"{number}{suffix}", 4.0, fps=25, codec=codec,
            pictures=lambda n, number=number: np.full((64, 64, 3), 20 + 100 * number + n // 5, np.uint8),
            container_options={"output_ts_offset": str(number * gap_s)},
        ).read_bytes()
        for number in range(2)
    ]  # fmt: skip
    joined = tmp_path / f"joined{suffix}"
    for order in ([0, 1], [1, 0]):
        joined.write_bytes(b"".join(parts[number] for number in order))
        seconds = list(SecondsReader(joined, SMALL))
        assert len(seconds) == 8
        assert [int(second.mean() > 90) for second in seconds] == [*[order[0]] * 4, *[order[1]] * 4]


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_pictures_that_are_held_stay(tmp_path: Path, suffix: str) -> None:
    seconds = list(SecondsReader(write_frames(tmp_path / f"slides{suffix}", [0, 5, 25, 26]), SMALL))
    assert len(seconds) >= 26
    shown = [round((float(second[:, 32:].mean()) - 20) / 5) for second in seconds[:26]]
    assert shown == [*[0] * 5, *[5] * 20, 25]


def test_damaged_time_stamps_do_not_make_a_video_longer(tmp_path: Path) -> None:
    path = write_frames(tmp_path / "a.flv", steady(3))
    data = bytearray(path.read_bytes())
    at = 13
    for number in range(60):  # walk over the tags: type, size, time (3 bytes and a fourth above them)
        size = int.from_bytes(data[at + 1 : at + 4], "big")
        if number > 30:
            data[at + 4] |= 0x10  # 17 minutes later
        at += size + 15
        if at >= len(data):
            break
    path.write_bytes(data)
    assert rows(path) in (3, 4)


def test_a_first_picture_long_after_the_sound_is_of_another_clock(tmp_path: Path) -> None:
    """In a format whose clock may start anew; 5 s are a late picture, 50 s are none."""
    for start_s, seconds in ((5, 8), (50, 3)):
        path = write_frames(tmp_path / f"{start_s}.ts", steady(3, start_s=start_s), sound_s=2)
        assert rows(path) in (seconds, seconds + 1)


def damaged(data: bytes, other: bytes, rng: Random) -> bytes:
    """A file with flipped bits, a damaged head, without its end, with zeros, doubled parts, or another file's end."""
    out = bytearray(data)
    a, b = sorted(rng.randrange(len(out)) for _ in range(2))
    match rng.choice(["flip", "head", "cut", "zero", "double", "splice"]):
        case "flip":
            for _ in range(rng.choice([1, 5, 50])):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        case "head":
            for _ in range(rng.choice([1, 3, 10])):
                out[rng.randrange(min(len(out), 2000))] = rng.randrange(256)
        case "cut":
            del out[a:]
        case "zero":
            out[a : a + 2000] = bytes(len(out[a : a + 2000]))
        case "double":
            out[a:a] = out[a:b]
        case _:
            out[a:] = other[rng.randrange(len(other)) :]
    return bytes(out)


def test_whatever_a_file_holds_only_a_decode_error_comes_out(tmp_path: Path) -> None:
    whole = {suffix: write_frames(tmp_path / f"a{suffix}", steady(1), sound_s=1).read_bytes() for suffix in CODECS}
    rng, found = Random(0), Counter[str]()
    for _ in range(60):
        suffix = rng.choice(list(whole))
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(damaged(whole[suffix], whole[rng.choice(list(whole))], rng))
        reader = SecondsReader(path, SMALL.model_copy(update={"timeout_s": 10.0}))
        try:
            assert len(list(reader)) <= 4
            found["ok"] += 1
        except DecodeError as error:
            found[error.reason] += 1
        assert 0 <= reader.claimed_s < 1e12
    assert {"ok", "truncated", "corrupt"} <= set(found)
