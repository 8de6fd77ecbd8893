"""Videos → frames: one file becomes a stream of whole seconds of RGB frames (the first step of the data's way).

What it adds to the reference extraction's recipe (pictures.py): time starts where the container says, rotation is
honoured, nothing is held but the second in work, and a file that is broken is refused with a reason instead of becoming
features (Miech et al. 2020 and VLM name no policy).
"""

import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import av.error
import numpy as np
from av.container.input import InputContainer
from av.format import Flags
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from feature_store.config import DecodeConfig
from feature_store.pictures import PictureGraph
from vlm_dist.errors import ExtractionError

_HELD_S = 10  # a picture may be held so long behind a stated end, and in AVI, whose frame rate is one for all
_FEW_PER_S = 4  # pictures a second; with more of them, it is the stated end that is wrong
_SLOWEST = 4  # seconds of work for a second of video that are not called slow: a long video may take its time
_LISTS = ("concat", "hls", "dash", "imf")  # formats of files that name other files
_LARGEST_ASPECT = 32  # a wider picture is hostile: scaled to the short side it would need gigabytes
_TS_PACKETS = (188, 192, 204)  # bytes of an MPEG-TS packet: plain, with a time code, with error correction
_DURATION_TAG = re.compile(r"(\d{1,4}):(\d\d):(\d\d(?:\.\d*)?)")


class DecodeError(ExtractionError):
    """A video that gives no features; keeps how much of it was decoded (seconds)."""

    def __init__(self, message: str, reason: str, decoded_s: float = 0.0, claimed_s: float = 0.0) -> None:
        super().__init__(message, reason)
        self.decoded_s = decoded_s
        self.claimed_s = claimed_s

    def __reduce__(self) -> tuple[type, tuple[str, str, float, float]]:
        return type(self), (str(self), self.reason, self.decoded_s, self.claimed_s)


class SecondsReader:
    """Iterate once over a video's seconds: uint8 (fps, size, size, 3), the last one padded with black frames.

    Args:
        path: Video file.
        cfg: Frame rate, size, what is refused.
        place: Gives the array that the next second is written into; without it, each second has its own.

    Attributes:
        claimed_s: Seconds that the file says its video has (0.0 where it does not say), once the first is decoded.
        decoded_s: Seconds decoded so far.

    Raises (while iterating):
        DecodeError: reason missing, empty_file, not_a_video, no_video_stream, zero_seconds, truncated, corrupt,
            timeout, or error for a file that cannot be read. Nothing else, whatever the file holds. `truncated` and
            `corrupt` are known only at the end, so use no second before the iteration is over.
    """

    def __init__(self, path: Path | str, cfg: DecodeConfig, place: Callable[[], np.ndarray] | None = None) -> None:
        self.path = Path(path)
        self.cfg = cfg
        self._place = place or (lambda: np.empty((cfg.fps, cfg.size, cfg.size, 3), np.uint8))
        self.claimed_s = 0.0
        self.decoded_s = 0.0
        self._packets = self._bad_packets = self._shown = 0
        self._stated = _Length()
        self._frame_s = self._reached_s = 0.0
        self._cut = False

    def __iter__(self) -> Iterator[np.ndarray]:
        fps, second = self.cfg.fps, self._place()
        frames = 0
        for picture in self._in_time(self._pictures()):
            second[frames % fps] = picture
            frames += 1
            self.decoded_s = frames / fps
            if frames % fps == 0:
                self._check_holding()
                yield second
                second = self._place()
        self._check_end(frames)
        if frames % fps:
            second[frames % fps :] = 0
            yield second

    def _in_time(self, pictures: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The pictures, until decoding lags by more than `timeout_s`; the caller's own time does not count."""
        spent = 0.0
        while True:
            before = time.monotonic()
            try:
                picture = next(pictures, None)
            except DecodeError:
                raise
            except Exception as error:  # whatever a file makes FFmpeg and PyAV raise: it must not stop the other videos
                raise self._error("corrupt", f"decoding fails ({type(error).__name__}: {error})") from error
            spent += time.monotonic() - before
            if picture is None:
                return
            if spent > self.cfg.timeout_s + _SLOWEST * self.decoded_s:
                how = f"{spent:.4g} s of decoding for {self.decoded_s:.1f} s of video"
                raise self._error("timeout", f"gave up after {how} (extract.decode.timeout_s)")
            yield picture

    def _error(self, reason: str, message: str) -> DecodeError:
        return DecodeError(f"{self.path}: {message}", reason, self.decoded_s, self.claimed_s)

    def _pictures(self) -> Iterator[np.ndarray]:
        """Every resampled, scaled and cropped picture, uint8 (size, size, 3)."""
        start = self._start_of_file()
        try:
            # Files only: a playlist named .mp4 must not make us fetch addresses.
            # Absolute, because FFmpeg takes what stands before a colon for a protocol.
            container = av.open(
                str(self.path.absolute()), options={"protocol_whitelist": "file"}, metadata_errors="replace"
            )
        except (av.error.FFmpegError, OSError) as error:
            if start[4:8] == b"ftyp":
                message = "an MP4 file whose index is missing (a download that broke off?)"
                raise self._error("truncated", message) from error
            raise self._error("not_a_video", f"no known video format ({type(error).__name__})") from error
        with container:
            if container.format.name in _LISTS:
                raise self._error("not_a_video", "a list of other files; name those")
            if start[4:8] == b"ftyp" and not {"video", "audio"} & {stream.type for stream in container.streams}:
                raise self._error("truncated", "an MP4 file whose index is cut off (a download that broke off?)")
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
                raise self._error("no_video_stream", "holds no video stream")
            if stream.codec_context is None or not stream.time_base:  # pyright: ignore[reportUnnecessaryComparison]
                raise self._error("not_a_video", "FFmpeg has no decoder for its codec")
            if container.format.name == "avi" and (rate := stream.average_rate) and rate * _HELD_S < 1:
                raise self._error("corrupt", f"its header says that each picture lasts {float(1 / rate):.0f} s")
            self._stated = _stated_length(container, stream)
            self.claimed_s = self._stated.video_s
            self._frame_s = float(1 / stream.average_rate) if stream.average_rate else 0.0
            graph: PictureGraph | None = None
            for frame in self._frames(container, stream):
                self._shown += 1
                if graph is None:
                    self._check_shape(frame)
                    graph = PictureGraph(stream, frame, self.cfg, _start(container), self._stated.gaps_until_s)
                yield from graph.push(frame)
            if graph is not None:
                yield from graph.push(None)

    def _start_of_file(self) -> bytes:
        try:
            if not self.path.exists():
                raise self._error("missing", "no such file")
            if not self.path.is_file():
                raise self._error("not_a_video", "not a plain file")
            with self.path.open("rb") as file:
                start = file.read(12)
        except OSError as error:
            raise self._error("error", f"cannot be read ({error.strerror})") from error
        if not start:
            raise self._error("empty_file", "the file is empty")
        return start

    def _check_shape(self, frame: VideoFrame) -> None:
        short, long = sorted((frame.width, frame.height))
        if long > _LARGEST_ASPECT * short:
            raise self._error("corrupt", f"{frame.width}x{frame.height} pixels is no picture of a video")

    def _frames(self, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
        """Decoded frames; damaged packets are counted and passed over, a damaged container ends the stream."""
        stream.codec_context.thread_count = 1  # one worker, one core: the parallelism is over videos
        packets = container.demux()  # of all streams: the last of them shows where the file ends
        is_avi, first_dts = container.format.name == "avi", None
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                if _clock_resets(container):  # recordings are cut anywhere: only half a packet of the carrier counts
                    self._cut = container.format.name == "mpegts" and all(container.size % n for n in _TS_PACKETS)
                return
            except av.error.FFmpegError:
                self._bad_packets += 1
                self._cut = True
                return
            if packet.size:
                self._cut = packet.is_corrupt
                if packet.pts is not None and packet.time_base:
                    end_s = float((packet.pts + (packet.duration or 0)) * packet.time_base) - _start(container)
                    self._reached_s = max(self._reached_s, end_s)
            if packet.stream is not stream:
                continue
            self._packets += packet.size > 0
            try:
                for frame in stream.decode(packet):  # pyright: ignore[reportUnknownMemberType]
                    if is_avi:  # it has no times of presentation, and FFmpeg's guess of them is in disorder
                        first_dts = frame.dts if first_dts is None else first_dts
                        frame.pts = None if frame.dts is None or first_dts is None else frame.dts - first_dts
                    yield frame
            except av.error.FFmpegError:
                self._bad_packets += 1

    def _check_holding(self) -> None:
        """Refuse a picture that is held far behind the stated end: one bit of a table of times can make it hours."""
        stated_s = self._stated.promised_s or self._stated.file_s
        if stated_s and self.decoded_s > max(2 * stated_s + _HELD_S, self._shown / _FEW_PER_S):
            raise self._error(
                "corrupt", f"{self._shown} pictures last longer than {self.decoded_s:.0f} s of {stated_s:.1f} s"
            )

    def _check_end(self, frames: int) -> None:
        """Refuse what decoded too little: by packets (damage inside) or by time (the end is gone)."""
        stated, coverage = self._stated, self.cfg.min_coverage
        bad = self._bad_packets - self._cut  # the last packet of a cut file is not damaged, its rest is missing
        if frames == 0:
            cut = self._cut or stated.video_s or stated.file_s
            reason = "corrupt" if bad > 0 else "truncated" if cut else "zero_seconds"
            raise self._error(reason, f"no frame of {self.claimed_s:.1f} s decodes")
        if bad > (1 - coverage) * self._packets:
            raise self._error("corrupt", f"{bad} of {self._packets} packets do not decode")
        slack = 2 / self.cfg.fps + self._frame_s  # rounding of the resampler, and a last frame of unknown length
        if stated.promised_s:
            if self.decoded_s + slack < coverage * stated.promised_s:
                raise self._error("truncated", f"{self.decoded_s:.1f} of {stated.promised_s:.1f} s decode")
        elif self._reached_s + slack < coverage * stated.file_s:
            raise self._error("truncated", f"the file ends after {self._reached_s:.1f} of {stated.file_s:.1f} s")
        elif self._cut:
            raise self._error("truncated", "the file ends within a packet")


class _Length(NamedTuple):
    """What a file says about its length, in seconds from the container's start; 0.0 where it says nothing."""

    video_s: float = 0.0
    """Length of the video."""
    promised_s: float = 0.0
    """The same, unless it is only FFmpeg's sum of what the file still holds (MPEG-TS, fragmented MP4)."""
    file_s: float = 0.0
    """Length of the longest stream (sound may go on after the picture), where the video's is not promised."""
    gaps_until_s: float = math.inf
    """Where time stamps end; those after it are of another clock, or damaged."""


def _stated_length(container: InputContainer, stream: VideoStream) -> _Length:
    assert stream.time_base, "the caller has looked"
    start_s, name, length = _start(container), container.format.name, stream.duration or 0
    if name == "avi":
        length = max(length, stream.frames)  # FFmpeg cuts the duration down to what the file still holds
    if length:
        video_s = max(0.0, float((length + (stream.start_time or 0)) * stream.time_base) - start_s)
        if _clock_resets(container):
            return _Length(video_s, gaps_until_s=0.0)
        fragmented = "mp4" in name and not stream.frames
        return _Length(video_s, 0.0 if fragmented else video_s)
    if tag := _DURATION_TAG.match(stream.metadata.get("DURATION", "")):  # Matroska and WebM: when the video ends
        video_s = max(0.0, int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3]) - start_s)
        return _Length(video_s, video_s, gaps_until_s=video_s or math.inf)
    file_s = (container.duration or 0) / av.time_base  # FLV, Matroska: when the last stream ends
    file_s = file_s - start_s if start_s < file_s else file_s  # a start behind the end is of another clock, or damaged
    return _Length(file_s=file_s, gaps_until_s=file_s or math.inf)


def _start(container: InputContainer) -> float:
    return (container.start_time or 0) / av.time_base


def _clock_resets(container: InputContainer) -> bool:
    """Whether the format's clock may start anew within a file (MPEG-TS, MPEG-PS, Ogg: made to be cut and joined)."""
    return bool(container.format.flags & Flags.ts_discont.value)
