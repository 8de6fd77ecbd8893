"""A process that reads one format when it is told to: the same for every format, in whichever environment it lives.

    python -m store_bench.worker FORMAT DATA CORPUS

It writes the format if nothing is there, reads every video once and compares it bit for bit with the corpus (so that
all is warm), and says `{PACKAGE: VERSION}`. Then for each line `{"start", "seconds", "seed"}` it waits for the moment
`start`, reads random videos for so many seconds, and says `{"videos", "bytes", "wall", "cpu"}`.
"""

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from store_bench.corpus import Corpus
from store_bench.formats import FORMATS


def main() -> None:
    """Serve windows until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    name, folder, corpus = sys.argv[1], Path(sys.argv[2]), Corpus.open(Path(sys.argv[3]))
    form = FORMATS[name]
    if not folder.exists():
        form.write(folder, corpus)
    reader = form(folder)
    for video, rows in enumerate(corpus):
        read = reader.read(video)
        if read.dtype != np.float16 or read.shape != rows.shape or read.tobytes() != rows.tobytes():
            raise SystemExit(f"{name} returns other bytes of video {video} than were written")
    print(json.dumps({form.package: importlib.metadata.version(form.package)}), file=answers)
    for line in sys.stdin:
        print(json.dumps(window(reader.read, len(corpus), **json.loads(line))), file=answers)


def window(read, videos: int, start: float, seconds: float, seed: int) -> dict[str, float]:
    """Random whole videos for so long; bytes are counted, so that none is optimised away."""
    order = np.random.default_rng(seed).integers(videos, size=20_000).tolist()
    while time.time() < start:
        pass
    done = size = 0
    cpu, began = time.process_time(), time.perf_counter()
    while (now := time.perf_counter()) < began + seconds:
        size += read(order[done % len(order)]).nbytes
        done += 1
    return {"videos": done, "bytes": size, "wall": now - began, "cpu": time.process_time() - cpu}


if __name__ == "__main__":
    main()
