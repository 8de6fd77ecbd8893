"""Run a function on several gloo ranks of this machine, each a process of its own."""

import multiprocessing as mp
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from typing import Any


def _main(rank: int, world: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], results: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    try:
        results.put((rank, "ok", function(*args)))
    except Exception:
        results.put((rank, "error", traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def _start_server() -> None:
    """Where a test before has started Ray, PYTHONSAFEPATH is set: the server would not find this package, silently."""
    safe = os.environ.pop("PYTHONSAFEPATH", None)
    forkserver.ensure_running()
    if safe is not None:
        os.environ["PYTHONSAFEPATH"] = safe


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returned on each rank, in order of rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A server that has imported the heavy libraries once forks the ranks: a rank starts in a second instead of ten.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.vlm_dist.train.preload"])
    _start_server()
    results = context.Queue()
    processes = [context.Process(target=_main, args=(r, world, port, function, args, results)) for r in range(world)]
    for process in processes:
        process.start()
    answers = sorted(results.get(timeout=180) for _ in processes)
    for process in processes:
        process.join(timeout=30)
    for rank, status, value in answers:
        assert status == "ok", f"rank {rank} failed:\n{value}"
    return [value for _, _, value in answers]
