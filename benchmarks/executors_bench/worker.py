"""One process that runs one executor over one job, on a Ray of its own, and says what that took.

    python -m executors_bench.worker EXECUTOR JOB.json FOLDER_OF_RAY

Prints a line `{"wall", "cpu", "store", "memory", "largest", "error", "left"}`: seconds, CPU seconds of all processes,
bytes, how it failed if it did, and which of Ray's processes outlived it.
"""

import contextlib
import importlib
import json
import os
import sys
import time
from pathlib import Path

import psutil
import ray

from executors_bench.job import Job
from executors_bench.watch import Watch

# What cosmos-xenna sets when it starts Ray by itself; without them its look at the actors is refused.
_XENNA = {"RAY_MAX_LIMIT_FROM_API_SERVER": "40000", "RAY_MAX_LIMIT_FROM_DATA_SOURCE": "40000"}


def main() -> None:
    """Start Ray, run, and tell."""
    name, job = sys.argv[1], Job(**json.loads(Path(sys.argv[2]).read_text()))
    run = importlib.import_module(f"executors_bench.{name}").run
    os.environ.update(_XENNA)
    # cosmos-xenna ends with an error where there is no dashboard to ask for the actors.
    folder = sys.argv[3]
    ray.init(
        num_cpus=2, include_dashboard=name == "xenna", log_to_driver=False, _temp_dir=folder, object_store_memory=2**31
    )
    if name == "xenna":  # it asks for the actors by an address that Ray finds, and stops where a machine has two Rays
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    error, watch, began = "", Watch(), time.perf_counter()
    with watch:
        try:
            run(job)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
    wall = time.perf_counter() - began
    processes = psutil.Process().children(recursive=True)
    ray.shutdown()
    left = _end(processes)
    told = {"wall": wall, "store": watch.store, "memory": watch.memory, "largest": watch.largest, "error": error}
    told |= {"cpu": sum(watch.cpu.values()), "left": left}
    print(json.dumps(told))


def _end(processes: list[psutil.Process]) -> list[str]:
    """Kill what is left of Ray's processes ten seconds after its end, and name it (a stopped one counts too)."""
    _, left = psutil.wait_procs(processes, timeout=10)
    names: list[str] = []
    for process in left:
        with contextlib.suppress(psutil.Error):
            names.append(" ".join(process.cmdline()).strip()[:60])
            process.kill()
    return names


if __name__ == "__main__":
    main()
