"""Decoded frames → pictures of one size and rate, on one unbroken time line (the inner half of decode.py).

The recipe is the reference extraction's: resample to `fps`, scale the short side to `size` (bicubic), cut the centre.
"""

from collections.abc import Iterator

import numpy as np
from av.filter import Graph
from av.filter.context import FilterContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from feature_store.config import DecodeConfig

_BACK_S = 1.0  # frames come in order; a clock that goes back further has started anew
_AHEAD_S = 10.0  # ffmpeg's own limit (-dts_delta_threshold)
_ROTATIONS: dict[int, tuple[tuple[str, str | None], ...]] = {
    0: (),
    1: (("transpose", "cclock"),),
    2: (("hflip", None), ("vflip", None)),
    3: (("transpose", "clock"),),
}


class PictureGraph:
    """The filter graph source → rotation → fps → scale → crop → rgb24, fed frame by frame.

    Where the clock goes back by more than a second (files that were joined), the frame follows the one before, and so
    it does where the clock goes on by more than ten seconds and arrives after `gaps_until_s`. Any other gap is a
    picture that is held (slides, screen recordings) and stays.

    Args:
        stream: The video; its `time_base` is known.
        frame: The first of it.
        cfg: Rate, size, rotation.
        start_s: Time of the container's start, from which time is counted here.
        gaps_until_s: 0 where clocks may start anew and every long gap is a join (ffmpeg's rule, too); infinity where
            time stamps are all that is known of the length.
    """

    def __init__(
        self, stream: VideoStream, frame: VideoFrame, cfg: DecodeConfig, start_s: float, gaps_until_s: float
    ) -> None:
        assert stream.time_base, "the caller has looked"
        self.time_base = stream.time_base
        self.gaps_until_s = gaps_until_s
        self.offset = round(start_s / self.time_base)
        self.width, self.height, self.format = frame.width, frame.height, frame.format.name
        self.last: int | None = None  # place of the frame before
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
        """Give the frame the graph's size and a place on the time line."""
        pts = self._place(frame.pts)
        if (frame.width, frame.height, frame.format.name) != (self.width, self.height, self.format):
            frame = frame.reformat(self.width, self.height, self.format)
        frame.pts = pts
        frame.time_base = self.time_base
        self.last = pts
        return frame

    def _place(self, pts: int | None) -> int:
        """A frame's time from the start, in units of the time base; made up where it has none."""
        following = 0 if self.last is None else self.last + self.step
        if pts is None:
            return following
        placed = pts - self.offset
        back = self.last is not None and (self.last - placed) * self.time_base > _BACK_S
        ahead = (placed - following) * self.time_base > _AHEAD_S
        if back or (ahead and placed * self.time_base > self.gaps_until_s):
            self.offset = pts - following
            return following
        return placed
