"""One process that extracts one video in one way, and says what that took.

    python -m extract_bench.worker plain|float32|bfloat16|float16 VIDEO WEIGHTS OUT.npy

Prints `{"rows", "cpu", "wall", "peak"}`: seconds of video, CPU seconds of this process and its children, wall-clock
seconds, and the highest resident memory of this process (MB) beyond what it held before.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch


def main() -> None:
    """Extract once for warmth of caches and libraries on a second of black, then the video."""
    way, video, weights, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    from extract_bench import plain
    from feature_store.config import ExtractConfig
    from feature_store.encode import clip_encoder, features_from_file
    from feature_store.s3d import S3D

    model = S3D()
    model.load_state_dict(torch.load(weights, weights_only=True))
    if way == "plain":
        with torch.inference_mode():
            model(torch.zeros(1, 3, 30, 224, 224))
        run = lambda: plain.features(video, model)  # noqa: E731
    else:
        cfg = ExtractConfig(precision=way)
        encoder = clip_encoder(model, cfg)
        encoder(torch.zeros(1, 30, 224, 224, 3, dtype=torch.uint8))
        run = lambda: features_from_file(video, encoder, cfg).features  # noqa: E731
    held = _peak()
    before, began = _cpu(), time.perf_counter()
    rows = run()
    cpu, wall = _cpu() - before, time.perf_counter() - began
    np.save(out, rows)
    print(json.dumps({"rows": len(rows), "cpu": cpu, "wall": wall, "peak": _peak() - held}))


def _cpu() -> float:
    mine, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return mine.ru_utime + mine.ru_stime + children.ru_utime + children.ru_stime


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
