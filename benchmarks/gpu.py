"""What this project does on a GPU: S3D against the card's ceilings, and the extraction around it. One table.

    python benchmarks/gpu.py [--videos DIR] [--no-compile] [--extract] [--json FILE]

Needs no network, and Ray only for `--extract` (whole extractions on this machine: of uncompressed videos, whose
decoding is nearly free, in both precisions, and of the videos as they are). Without `--videos`, two are rendered. Five
minutes.
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from extract_bench.video import render as rendered
from gpu_bench.s3d import CLIP_FLOP, Form, measure
from gpu_bench.timing import copy_bytes, product_flops

from store_bench.table import Row, bound, compare, machine
from store_bench.table import render as table

BATCHES = (8, 64)
WAITING = 0.05


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=Path, help="folder of videos")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile makes")
    parser.add_argument("--extract", action="store_true", help="a whole extraction, too; needs Ray")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU on this machine")
    with TemporaryDirectory(prefix="gpu-bench-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = Path(name)
        videos = sorted(arguments.videos.iterdir()) if arguments.videos else _two(folder)
        flops, copied = product_flops(torch.float16), copy_bytes()
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
        print(f"ceilings: float16 products {flops / 1e12:.0f} TFLOP/s, copies {copied / 1e12:.2f} TB/s", flush=True)
        forms: list[Form] = []
        for form in measure(videos, BATCHES, not arguments.no_compile):
            forms.append(form)
            print(_told(form, flops), flush=True)
        rows = _rows(forms)
        figures: dict[str, object] = {"flops": flops, "copied": copied, "forms": [asdict(form) for form in forms]}
        if arguments.extract:
            rows += _extraction(folder, videos, figures)
        print(table(rows))
        print(f"{torch.cuda.get_device_name()}; {machine()}")
        if arguments.json:
            arguments.json.write_text(json.dumps(figures))


def _two(folder: Path) -> list[Path]:
    (folder / "videos").mkdir()
    return [rendered(folder / "videos" / f"{seed}.mp4", 24, seed) for seed in range(2)]


def _told(form: Form, flops: float) -> str:
    rates = ", ".join(
        f"{rate:,.0f} clips/s at {size} ({100 * rate * CLIP_FLOP / flops:.0f} %)"
        for size, rate in form.clips_per_s.items()
    )
    return f"{form.name}: {rates}; centred error {form.error:.5f}, largest {form.largest_error:.1e}"


def _rows(forms: list[Form]) -> list[Row]:
    """Ours against the network as the reference writes it, in the same precision."""
    rows: list[Row] = []
    for form in forms:
        if form.name.startswith("plain"):
            continue
        plain = next(p for p in forms if p.name.startswith("plain") and ("16" in p.name) == ("16" in form.name))
        for size, rate in form.clips_per_s.items():
            what = f"{form.name}, batch of {size}"
            rows.append(compare("S3D", what, "clips/s", [rate], plain.name, [plain.clips_per_s[size]], None))
    return rows


def _extraction(folder: Path, videos: list[Path], figures: dict[str, object]) -> list[Row]:
    os.environ["FEATURE_STORE_CACHE"] = str(folder / "cache")
    from gpu_bench.extraction import extract, save_weights, start_ray, uncompressed

    weights = save_weights(videos, folder / "s3d.pth")
    start_ray(8)
    rows: list[Row] = []
    plain = [uncompressed(videos[0], folder / "plain.nut", 60)]
    for what, paths, count, precision in (
        ("uncompressed videos, float16", plain, 600, "float16"),
        ("uncompressed videos, float32", plain, 200, "float32"),  # slow enough for the decoders of a small machine
        ("the videos as they are, float16", videos, 500, "float16"),
    ):
        done = extract(folder, paths, count, weights, precision=precision)
        figures[what] = asdict(done)
        print(f"{what}: {done}", flush=True)
        rows.append(bound("extract", f"{what}, GPU waits", "", [done.waiting], WAITING, most=True))
        rows.append(Row("extract", what, "s of video/s", done.seconds_per_s, "", None, None))
    return rows


if __name__ == "__main__":
    main()
