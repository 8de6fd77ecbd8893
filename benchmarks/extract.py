"""How fast videos become features on a CPU, and in how much memory, beside the straightforward way: one table.

    python benchmarks/extract.py [--small] [--json FILE]

The straightforward way is the paper's script's: ffmpeg's pipe, all frames of the video in memory as floats, S3D in
eager PyTorch. Same videos, weights, precision and number of threads (one); every measurement is a process of its own,
in alternating rounds; CPU seconds of all its threads and children count, so that other work on the machine tells less.
Features are compared before anything is said of their speed. The whole run takes a quarter of an hour.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from extract_bench.video import render

from store_bench.table import Row, compare, machine
from store_bench.table import render as table

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("plain", "float32", "bfloat16")
PARITY = 0.1  # share of the distance of neighbouring seconds: two decoders, and float16 rows


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a test run: one round of short videos")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    rounds, short, long = (1, 3, 6) if arguments.small else (5, 16, 120)
    with TemporaryDirectory(prefix="extract-bench-") as name:
        folder = Path(name)
        video = render(folder / "short.mp4", short, 0)
        weights = _weights(video, folder)
        told: dict[str, list[dict]] = {way: [] for way in WAYS}
        for number in range(rounds):
            for way in WAYS:
                print(f"round {number + 1}: {way}", file=sys.stderr)
                told[way].append(_run(way, video, weights, folder))
        errors = {way: _error(folder, way) for way in WAYS[1:]}
        print("a long video", file=sys.stderr)
        video = render(folder / "long.mp4", long, 1)
        memory = {way: _run(way, video, weights, folder) for way in ("plain", "float32")}
    rates = {way: [one["rows"] / one["cpu"] for one in told[way]] for way in WAYS}
    unit = "s of video/core-s"
    rows = [
        compare("speed", "float32", unit, rates["float32"], "straightforward", rates["plain"], 1.5),
        compare("speed", "bfloat16", unit, rates["bfloat16"], "straightforward, float32", rates["plain"], None),
        _memory_row(memory, long),
    ]
    print(table(rows))
    print(f"\ncentred error beside the distance of neighbouring seconds (decoders differ too): {_told(errors)}")
    print(machine())
    if arguments.json:
        arguments.json.write_text(json.dumps({"speed": told, "memory": memory, "errors": errors}))
    if errors["float32"] > PARITY:
        raise SystemExit("the features differ: the speeds say nothing")


def _weights(video: Path, folder: Path) -> Path:
    """Random weights whose features differ from second to second."""
    from feature_store.config import DecodeConfig
    from feature_store.encode import calibration_clips
    from feature_store.weights import random_s3d

    torch.save(random_s3d(0, calibration_clips([video], DecodeConfig())).state_dict(), folder / "s3d.pth")
    return folder / "s3d.pth"


def _run(way: str, video: Path, weights: Path, folder: Path) -> dict:
    paths = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    command = [sys.executable, "-m", "extract_bench.worker", way, video, weights, folder / f"{way}.npy"]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    return json.loads(done.stdout)


def _error(folder: Path, way: str) -> float:
    """Mean error of the centred rows, as a share of the mean distance of neighbouring seconds."""
    ours, theirs = (np.load(folder / f"{name}.npy").astype(np.float32) for name in (way, "plain"))
    error = ours - theirs
    steps = np.linalg.norm(np.diff(theirs, axis=0), axis=1).mean()
    return float(np.linalg.norm(error - error.mean(axis=0), axis=1).mean() / steps)


def _memory_row(memory: dict[str, dict], seconds: int) -> Row:
    ours, theirs = memory["float32"]["peak"], memory["plain"]["peak"]
    what = f"peak of {seconds} s, 224 pixels"
    return Row("memory", what, "MB", ours, "straightforward", theirs, theirs / ours)


def _told(errors: dict[str, float]) -> str:
    return ", ".join(f"{way} {error:.3f}" for way, error in errors.items())


if __name__ == "__main__":
    main()
