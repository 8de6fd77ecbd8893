"""feature_store.decode_pool on a real Ray: the same chunks as in this process, and decoders that die or hang."""

import os
import signal
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import pytest

from feature_store import decode_pool
from feature_store.chunks import read_chunks
from feature_store.config import DecodeConfig
from feature_store.decode import DecodeError
from feature_store.decode_pool import DecodePool, DecoderLostError, NoDecoderError
from tests.feature_store.test_extract import decoders_at

pytestmark = pytest.mark.usefixtures("ray_session")
CFG = DecodeConfig(fps=4, size=32)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    return [make_video(folder / f"{seconds}.mp4", seconds, seed=seconds) for seconds in (5, 20)]


@pytest.fixture(scope="module")
def pool(ray_session: None) -> DecodePool:
    return DecodePool(1, CFG, 2)


def test_the_same_chunks_as_in_this_process(pool: DecodePool, videos: list[Path]) -> None:
    for video in videos:
        got, here = list(pool.read(str(video))), list(read_chunks(str(video), CFG, 2))
        assert [len(chunk.frames) for chunk in here[:2]] == [2, 2]
        assert len(got) == len(here)
        for one, other in zip(got, here, strict=True):
            assert np.array_equal(one.frames, other.frames)
            assert one[1:] == other[1:]


def test_broken_videos_say_the_same(pool: DecodePool, broken_videos: dict[str, Path]) -> None:
    for reason, path in broken_videos.items():
        with pytest.raises(DecodeError) as here:
            list(read_chunks(str(path), CFG, 2))
        with pytest.raises(DecodeError) as there:
            list(pool.read(str(path)))
        assert (
            (there.value.reason, str(there.value)) == (here.value.reason, str(here.value)) == (reason, str(here.value))
        )
        assert (there.value.decoded_s, there.value.claimed_s) == (here.value.decoded_s, here.value.claimed_s)


def begun(pool: DecodePool, video: Path) -> Generator[object]:
    """The chunks after the first one, while the decoder waits with the file open."""
    chunks = pool.read(str(video))
    next(chunks)
    return chunks


def test_a_decoder_that_dies_costs_its_video_only(pool: DecodePool, videos: list[Path]) -> None:
    chunks = begun(pool, videos[1])
    (decoder,) = decoders_at(videos[1].stem)
    os.kill(decoder.pid, signal.SIGKILL)
    with pytest.raises(DecoderLostError):
        list(chunks)
    assert len(list(pool.read(str(videos[0])))) == 3


@pytest.mark.slow
def test_a_decoder_that_hangs(pool: DecodePool, videos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_hang_s", 2.0)
    chunks = begun(pool, videos[1])
    (decoder,) = decoders_at(videos[1].stem)
    os.kill(decoder.pid, signal.SIGSTOP)
    with pytest.raises(DecodeError, match="the decoder hung") as error:
        list(chunks)
    assert error.value.reason == "timeout"
    decoder.wait(10)  # and it is not left there
    monkeypatch.undo()
    assert len(list(pool.read(str(videos[0])))) == 3


def test_a_video_that_is_not_wanted_to_its_end(pool: DecodePool, videos: list[Path]) -> None:
    chunks = begun(pool, videos[1])
    chunks.close()
    assert len(list(pool.read(str(videos[0])))) == 3
    assert not decoders_at(videos[1].stem)


def test_a_decoder_runs_no_further_ahead_than_it_may(pool: DecodePool, videos: list[Path]) -> None:
    chunks = pool.read(str(videos[1]))
    first = next(chunks)
    seen = [first, *chunks]
    assert [chunk.decoded_s for chunk in seen] == [min(20.0, 2.0 * k) for k in range(1, 11)]
    again = pool.read(str(videos[1]))
    next(again)
    (decoder,) = decoders_at(videos[1].stem)
    decoder.cpu_percent()
    assert decoder.cpu_percent(interval=1.0) < 20, "it waits, with the file open, instead of decoding all 20 s"
    assert decoders_at(videos[1].stem)
    assert len(list(again)) == 9


@pytest.mark.slow
def test_decoders_that_never_come_to_a_video(videos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(decode_pool.Decoder):
        def __init__(self, cfg: DecodeConfig, seconds: int) -> None:
            super().__init__(cfg, seconds)
            os._exit(1)

    monkeypatch.setattr(decode_pool, "Decoder", Dead)
    with pytest.raises(NoDecoderError, match="5 decoders died before they opened a video"):
        list(DecodePool(1, CFG, 2).read(str(videos[0])))
