"""Videos → frames: one file becomes a stream of whole seconds of RGB frames (the first step of the data's way).

The recipe is the reference extraction's: resample to `fps`, scale the short side to `size` (bicubic), cut the centre.
What it adds: time starts where the container says, rotation is honoured, nothing is held but the second in work, and a
file that is broken is refused with a reason instead of becoming features (Miech et al. 2020 and VLM name no policy).
"""

import time
from collections.abc import Iterator
from pathlib import Path

import av
import av.error
import numpy as np
from av.container.input import InputContainer
from av.filter import Graph
from av.filter.context import FilterContext
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from feature_store.config import DecodeConfig
from vlm_dist.errors import ExtractionError

_LARGEST_ASPECT = 32  # a wider picture is hostile: scaled to the short side it would need gigabytes


class DecodeError(ExtractionError):
    """A video that gives no features; keeps how much of it was decoded (seconds)."""

    def __init__(self, message: str, reason: str, decoded_s: float = 0.0, claimed_s: float = 0.0) -> None:
        super().__init__(message, reason)
        self.decoded_s = decoded_s
        self.claimed_s = claimed_s


class SecondsReader:
    """Iterate once over a video's seconds: uint8 (fps, size, size, 3), the last one padded with black frames.

    Attributes:
        claimed_s: Seconds that the container says the video has (0.0 where it does not say).
        decoded_s: Seconds decoded so far.

    Raises (while iterating):
        DecodeError: reason missing, empty_file, not_a_video, no_video_stream, zero_seconds, truncated, corrupt or
            timeout. `truncated` and `corrupt` are known only at the end, so use no second before the iteration is over.
    """

    def __init__(self, path: Path | str, cfg: DecodeConfig) -> None:
        self.path = Path(path)
        self.cfg = cfg
        self.claimed_s = 0.0
        self.decoded_s = 0.0
        self._packets = self._bad_packets = 0
        self._frame_s = 0.0

    def __iter__(self) -> Iterator[np.ndarray]:
        self._check_file()
        fps, size = self.cfg.fps, self.cfg.size
        second = np.zeros((fps, size, size, 3), np.uint8)
        frames = 0
        for picture in self._in_time(self._pictures()):
            second[frames % fps] = picture
            frames += 1
            self.decoded_s = frames / fps
            if frames % fps == 0:
                yield second
                second = np.zeros_like(second)
        self._check_end(frames)
        if frames % fps:
            yield second

    def _in_time(self, pictures: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The pictures, while decoding them takes no longer than `timeout_s`; the caller's own time does not count."""
        spent = 0.0
        while True:
            before = time.monotonic()
            picture = next(pictures, None)
            spent += time.monotonic() - before
            if picture is None:
                return
            if spent > self.cfg.timeout_s:
                raise self._error("timeout", f"gave up after {self.cfg.timeout_s:g} s of decoding")
            yield picture

    def _error(self, reason: str, message: str) -> DecodeError:
        return DecodeError(f"{self.path}: {message}", reason, self.decoded_s, self.claimed_s)

    def _check_file(self) -> None:
        if not self.path.exists():
            raise self._error("missing", "no such file")
        if not self.path.is_file():
            raise self._error("not_a_video", "not a plain file")
        if self.path.stat().st_size == 0:
            raise self._error("empty_file", "the file is empty")

    def _check_end(self, frames: int) -> None:
        """Refuse what decoded too little: by packets (damage inside) or by time (the end is gone)."""
        if frames == 0:
            reason = "corrupt" if self._bad_packets else "truncated" if self.claimed_s else "zero_seconds"
            raise self._error(reason, f"no frame of {self.claimed_s:.1f} s decodes")
        if self._bad_packets > (1 - self.cfg.min_coverage) * self._packets:
            raise self._error("corrupt", f"{self._bad_packets} of {self._packets} packets do not decode")
        slack = 2 / self.cfg.fps + self._frame_s  # rounding of the resampler, and a last frame of unknown length
        if self.decoded_s + slack < self.cfg.min_coverage * self.claimed_s:
            raise self._error("truncated", f"{self.decoded_s:.1f} of {self.claimed_s:.1f} s decode")

    def _pictures(self) -> Iterator[np.ndarray]:
        """Every resampled, scaled and cropped picture, uint8 (size, size, 3)."""
        try:
            # Files only: a playlist named .mp4 must not make us fetch addresses.
            container = av.open(str(self.path), options={"protocol_whitelist": "file"}, metadata_errors="replace")
        except (av.error.FFmpegError, OSError) as error:
            raise self._open_error(error) from error
        with container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
                raise self._error("no_video_stream", "holds no video stream")
            self.claimed_s = _claimed_seconds(container, stream)
            self._frame_s = float(1 / stream.average_rate) if stream.average_rate else 0.0
            graph: _PictureGraph | None = None
            start = (container.start_time or 0) / av.time_base
            try:
                for frame in self._frames(container, stream):
                    if graph is None:
                        self._check_shape(frame)
                        graph = _PictureGraph(stream, frame, self.cfg, start)
                    yield from graph.push(frame)
                if graph is not None:
                    yield from graph.push(None)
            except av.error.FFmpegError as error:
                raise self._error("corrupt", f"its pictures cannot be scaled: {error}") from error

    def _check_shape(self, frame: VideoFrame) -> None:
        short, long = sorted((frame.width, frame.height))
        if long > _LARGEST_ASPECT * short:
            raise self._error("corrupt", f"{frame.width}x{frame.height} pixels is no picture of a video")

    def _open_error(self, error: Exception) -> DecodeError:
        with self.path.open("rb") as file:
            is_mp4 = file.read(12)[4:8] == b"ftyp"
        if is_mp4:
            return self._error("truncated", "an MP4 file whose index is missing (a download that broke off?)")
        return self._error("not_a_video", f"no known video format ({type(error).__name__})")

    def _frames(self, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
        """Decoded frames; damaged packets are counted and passed over, a damaged container ends the stream."""
        stream.codec_context.thread_count = 1  # one worker, one core: the parallelism is over videos
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.error.FFmpegError:
                self._bad_packets += 1
                return
            self._packets += packet.size > 0
            try:
                yield from packet.decode()
            except av.error.FFmpegError:
                self._bad_packets += 1


class _PictureGraph:
    """The filter graph source → rotation → fps → scale → crop → rgb24, fed frame by frame."""

    def __init__(self, stream: VideoStream, frame: VideoFrame, cfg: DecodeConfig, start_s: float) -> None:
        assert stream.time_base is not None
        self.time_base = stream.time_base
        self.offset = round(start_s / self.time_base)
        self.width, self.height, self.format = frame.width, frame.height, frame.format.name
        self.next_pts = 0
        self.step = max(1, round(1 / (stream.average_rate or cfg.fps) / self.time_base))
        quarter_turns = round(frame.rotation / 90) % 4 if cfg.rotate else 0  # counter-clockwise
        width, height = (self.width, self.height) if quarter_turns % 2 == 0 else (self.height, self.width)
        size = cfg.size
        wide = int(width * size / height) if width >= height else size
        high = int(height * size / width) if height > width else size
        graph = Graph()
        chain = [graph.add_buffer(template=stream, width=self.width, height=self.height, format=frame.format)]
        for name, arguments in (
            *_ROTATIONS[quarter_turns],
            ("fps", f"fps={cfg.fps}:start_time=0"),
            ("scale", f"{wide}:{high}:flags=bicubic"),
            ("crop", f"{size}:{size}:{(wide - size) // 2}:{(high - size) // 2}"),
            ("format", "rgb24"),
            ("buffersink", None),
        ):
            chain.append(graph.add(name, arguments))
            chain[-2].link_to(chain[-1])
        graph.configure()
        self.graph = graph
        self.source: FilterContext = chain[0]
        self.sink: FilterContext = chain[-1]

    def push(self, frame: VideoFrame | None) -> Iterator[np.ndarray]:
        """Feed one frame (None ends the stream) and give the pictures that are ready, uint8 (size, size, 3)."""
        if frame is not None:
            frame = self._aligned(frame)
        self.source.push(frame)
        while True:
            try:
                picture = self.sink.pull()
            except (BlockingIOError, EOFError):
                return
            assert isinstance(picture, VideoFrame)
            yield picture.to_ndarray()

    def _aligned(self, frame: VideoFrame) -> VideoFrame:
        """Give the frame the graph's size and a time counted from the container's start (made up where it has none)."""
        pts = self.next_pts if frame.pts is None else frame.pts - self.offset
        if (frame.width, frame.height, frame.format.name) != (self.width, self.height, self.format):
            frame = frame.reformat(self.width, self.height, self.format)
        frame.pts = pts
        frame.time_base = self.time_base
        self.next_pts = pts + self.step
        return frame


_ROTATIONS: dict[int, tuple[tuple[str, str | None], ...]] = {
    0: (),
    1: (("transpose", "cclock"),),
    2: (("hflip", None), ("vflip", None)),
    3: (("transpose", "clock"),),
}


def _claimed_seconds(container: InputContainer, stream: VideoStream) -> float:
    """Length of the video stream as the file states it, in seconds; 0.0 where it states none."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    tag = stream.metadata.get("DURATION", "")  # Matroska and WebM state it per stream only here
    if tag.count(":") == 2:
        hours, minutes, seconds = tag.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    return (container.duration or 0) / av.time_base
