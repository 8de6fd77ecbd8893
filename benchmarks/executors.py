"""Three ways to run "decode on CPUs → S3D → features of each video" on Ray, and one actor for both: one table.

    python benchmarks/executors.py [VIDEOS] [--xenna-python PYTHON] [--size 64] [--videos 40] [--json FILE]

VIDEOS is a folder; without it a small corpus is rendered. Each run is a process of its own with a Ray of its own and
two cores: one decoder and one encoder with one thread (the last: two actors that do both). Random S3D weights. Two
of the videos are broken and must be named. Then the same again with a video that takes its decoding process down once,
always, or stops it, and with one long video. cosmos-xenna lives in an environment of its own, because what it needs
clashes with constraints.txt:

    python -m venv DIR && DIR/bin/pip install -c constraints.txt torch av numpy pydantic psutil
    DIR/bin/pip install "cosmos-xenna==0.3.0" tqdm

The whole run takes a quarter of an hour.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from executors_bench.corpus import corpus, long_video, with_fault
from executors_bench.size import code_lines

from store_bench.table import machine

ROOT = Path(__file__).resolve().parents[1]
EXECUTORS = ("fused", "ray_data", "xenna", "actors")
FAULTS = ("kill_once", "kill_always", "hang")
LONG_S = 600
LIMIT_S = 90.0  # of a run with a fault; without it the runs take less than half of that


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("given", nargs="?", type=Path, metavar="VIDEOS", help="a folder of videos; none: render some")
    parser.add_argument("--xenna-python", type=Path, default=Path(sys.executable), help="where cosmos-xenna is")
    parser.add_argument("--size", type=int, default=64, help="side of the decoded pictures")
    parser.add_argument("--videos", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decoders", type=int, default=1)
    parser.add_argument("--encoders", type=int, default=1)
    parser.add_argument("--balanced", action="store_true", help="let executors move processes between the stages")
    parser.add_argument("--only", choices=EXECUTORS, action="append", help="this executor (may be given again)")
    parser.add_argument("--speed-only", action="store_true", help="no faults, and no long video")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    names = arguments.only or EXECUTORS
    pythons = {name: arguments.xenna_python if name == "xenna" else Path(sys.executable) for name in names}
    absent = {name: why for name in names if (why := _absent(name, pythons[name]))}
    told: dict[str, Any] = {name: {"speed": []} for name in names}
    with TemporaryDirectory(prefix="executors-") as temporary:
        folder = Path(temporary)
        pairs, whole = corpus(arguments.given, folder, arguments.videos)
        job = {
            "weights": str(_weights(whole, folder, arguments.size)),
            "size": arguments.size,
            "decoders": arguments.decoders,
            "encoders": arguments.encoders,
            "balanced": arguments.balanced,
        }
        runs = [name for name in names if name not in absent]
        for _ in range(arguments.rounds):
            for name in runs:
                told[name]["speed"].append(_run(name, pythons[name], {**job, "videos": pairs}, folder))
        for name in [] if arguments.speed_only else runs:
            long = [["long", str(long_video(folder / "long.mp4", LONG_S))]]
            told[name]["long"] = _run(name, pythons[name], {**job, "videos": long}, folder)
            for fault in FAULTS:
                videos = with_fault(pairs, whole[0], fault, folder)
                told[name][fault] = _run(name, pythons[name], {**job, "videos": videos}, folder, LIMIT_S)
    for name, why in absent.items():
        told[name]["absent"] = why
    print(_table(told))
    print(f"\n{len(pairs)} videos, {arguments.size} pixels; {machine()}")
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=1))


def _absent(name: str, python: Path) -> str:
    if name != "xenna":
        return ""
    command = [python, "-c", "import cosmos_xenna.pipelines.v1"]
    asked = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    return asked.stderr.strip().splitlines()[-1] if asked.returncode else ""


def _weights(whole: list[Path], folder: Path, size: int) -> Path:
    """Random weights whose features differ from second to second."""
    from feature_store.config import DecodeConfig
    from feature_store.encode import calibration_clips
    from feature_store.weights import random_s3d

    clips = calibration_clips(whole, DecodeConfig(fps=16, size=size))
    torch.save(random_s3d(0, clips).state_dict(), folder / "s3d.pth")
    return folder / "s3d.pth"


def _run(name: str, python: Path, job: dict[str, Any], folder: Path, limit_s: float = 3600.0) -> dict[str, Any]:
    """Run one executor in a process of its own; after the limit its whole group is killed."""
    print(f"{name}: {len(job['videos'])} videos", file=sys.stderr)
    with (
        TemporaryDirectory(dir=folder) as out,
        # Not below the folder: paths of sockets have to be short. A killed Ray may still be writing there.
        TemporaryDirectory(prefix="rayx-", ignore_cleanup_errors=True) as ray_folder,
    ):
        file = folder / "job.json"
        file.write_text(json.dumps({**job, "out": out}))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])}
        command = [str(python), "-m", "executors_bench.worker", name, str(file), ray_folder]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True,
        )  # fmt: skip
        began = time.monotonic()
        try:
            stdout, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            _end(process)
            stdout = json.dumps({"error": f"no end within {limit_s:g} s", "wall": time.monotonic() - began})
        lines = [line for line in (stdout or "").splitlines() if line.startswith("{")]
        told = json.loads(lines[-1]) if lines else {"error": f"the driver ended with {process.returncode}"}
        return told | _results(Path(out), job)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a driver with its Ray and all its workers, stopped ones too."""
    import psutil

    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.communicate()


def _results(out: Path, job: dict[str, Any]) -> dict[str, Any]:
    """What lies in the folder afterwards: videos with features, reasons, and the rate between first and last."""
    files = sorted(out.glob("*.npy"), key=lambda path: path.stat().st_mtime_ns)
    rows = {path.stem: np.load(path) for path in files}
    reasons = {path.stem: path.read_text() for path in sorted(out.glob("*.reason"))}
    between = (files[-1].stat().st_mtime_ns - files[0].stat().st_mtime_ns) / 1e9 if len(files) > 1 else 0.0
    seconds = sum(len(rows[path.stem]) for path in files[1:])
    told: dict[str, Any] = {"videos": len(files), "seconds": sum(map(len, rows.values())), "reasons": reasons}
    told["rate"] = seconds / between if between else 0.0
    told["missing"] = len(job["videos"]) - len(files) - len(reasons)
    told["sums"] = {video: float(np.abs(part.astype(np.float64)).sum()) for video, part in rows.items()}
    return told


def _table(told: dict[str, Any]) -> str:
    """The table as text: a column for each executor."""
    columns = [_column(name, one) for name, one in told.items()]
    names = list(dict.fromkeys(key for column in columns for key in column))
    lines = [["", *told], ["---"] * (1 + len(told))]
    lines += [[key, *(column.get(key, "") for column in columns)] for key in names]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _column(name: str, one: dict[str, Any]) -> dict[str, str]:
    """What is told of one executor: medians over the rounds, then one long video, then the faults."""
    told = {"lines of code": str(code_lines(ROOT / "benchmarks" / "executors_bench" / f"{name}.py"))}
    if "absent" in one:
        return {**told, "wall clock, s": f"not here: {one['absent']}"}
    rounds = one["speed"]
    wall, rate, cpu, store, memory = (_median(rounds, key) for key in ("wall", "rate", "cpu", "store", "memory"))
    told["wall clock, s"] = f"{wall:.1f}"
    told["videos/s"] = f"{rounds[-1]['videos'] / wall:.2f}"
    told["s of video/s after the first video"] = f"{rate:.1f}"
    told["s of video/core-s, Ray and imports included"] = f"{rounds[-1]['seconds'] / max(cpu, 1e-9):.2f}"
    told["object store, peak MB"] = f"{store / 1e6:.0f}"
    told["all processes, peak MB"] = f"{memory / 1e6:,.0f}"
    told["missing"] = str(rounds[-1]["missing"])
    told["named"] = ", ".join(f"{video} {reason}" for video, reason in rounds[-1]["reasons"].items())
    told["error"] = "; ".join(sorted({one["error"].splitlines()[0][:80] for one in rounds if one["error"]}))
    told["outlives Ray"] = ", ".join(sorted({process for one in rounds for process in one.get("left", [])}))
    if "long" in one:
        told[f"{LONG_S} s of video: object store, peak MB"] = f"{one['long'].get('store', 0) / 1e6:,.0f}"
        told[f"{LONG_S} s of video: largest process, peak MB"] = f"{one['long'].get('largest', 0) / 1e6:,.0f}"
        told |= {fault: _fault(one[fault], fault) for fault in FAULTS}
    return told


def _median(rounds: list[dict[str, Any]], key: str) -> float:
    return float(np.median([one.get(key, 0.0) for one in rounds]))


def _fault(one: dict[str, Any], fault: str) -> str:
    verdict = one["reasons"].get(fault) or ("features" if fault in one["sums"] else "nothing")
    end = one["error"].splitlines()[0][:80] if one.get("error") else "ends"
    return f"{end} after {one.get('wall', 0):.0f} s, {one['missing']} missing, its video: {verdict}"


if __name__ == "__main__":
    main()
