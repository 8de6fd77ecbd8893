"""Videos to measure with: those of a folder under many ids, or a few that are rendered; two files are broken."""

from pathlib import Path

import numpy as np

from vlm_dist.demo.render import write_video
from vlm_dist.demo.scene import Scene, Shot
from vlm_dist.demo.world import render_world

SUFFIXES = {".mp4", ".avi", ".mkv", ".webm", ".mov"}
_RENDERED = 10


def corpus(given: Path | None, folder: Path, videos: int) -> tuple[list[list[str]], list[Path]]:
    """Pairs of id and path, two broken ones among them, and the whole files that they are made of."""
    if given is None:
        render_world(folder, videos=_RENDERED, seed=0)
        given = folder / "videos"
        whole = sorted(given.glob("cooking_*.mp4"))
    else:
        whole = sorted(path for path in given.iterdir() if path.suffix in SUFFIXES)
    pairs = [[f"v{k:03d}", str(whole[k % len(whole)])] for k in range(videos - 2)]
    data = whole[0].read_bytes()
    cut, text = folder / "cut.mp4", folder / "text.mp4"
    cut.write_bytes(data[: len(data) // 2])
    text.write_text("not a video\n" * 100)
    return [["cut", str(cut)], *pairs[: len(pairs) // 2], ["text", str(text)], *pairs[len(pairs) // 2 :]], whole


def with_fault(pairs: list[list[str]], whole: Path, kind: str, folder: Path) -> list[list[str]]:
    """The same with a video after the first third that takes its decoder down (job.py says how)."""
    path = folder / f"{kind}.mp4"
    path.unlink(missing_ok=True)
    path.with_suffix(".met").unlink(missing_ok=True)
    path.symlink_to(whole)
    at = len(pairs) // 3
    return [*pairs[:at], [kind, str(path)], *pairs[at:]]


def long_video(path: Path, seconds: int) -> Path:
    """One rendered video, to see what of it is held in memory."""
    rng = np.random.default_rng(0)
    write_video(path, Scene([Shot(0.0, float(seconds), "stir", "carrot")], "blue cloth", float(seconds), rng))
    return path
