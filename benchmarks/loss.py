"""The loss alone beside all scores at once: time and memory of a forward and backward pass, one table.

    python benchmarks/loss.py [--rows 4600] [--negatives 20000] [--rounds 3] [--small] [--json FILE]

Masked rows against 30,522 words and a pool of negatives, 768 wide, float32, gradients of rows, words and pool; all rows
are words, so that PyTorch's own `linear_cross_entropy` can take part. Each measurement is a process; rounds alternate;
where the losses or the gradients of the rows differ, the run fails. Five minutes on two cores.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from store_bench.table import Row, compare, machine
from store_bench.table import render as table
from vlm_dist.losses.nce import CHUNK, chunked_lse

WORDS, WIDTH, STEPS = 30_522, 768, 2
_CHUNK = CHUNK["cpu"]


def _ours(rows: Tensor, words: Tensor, pool: Tensor, labels: Tensor) -> Tensor:
    scores = chunked_lse(rows, words, labels, _CHUNK)
    return (torch.logaddexp(scores.lse, chunked_lse(rows, pool, None, _CHUNK).lse) - scores.target).mean()


def _materialised(rows: Tensor, words: Tensor, pool: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(torch.cat([rows @ words.T, rows @ pool.T], 1), labels)


def _linear(rows: Tensor, words: Tensor, pool: Tensor, labels: Tensor) -> Tensor:
    found: Any = torch.nn.functional.linear_cross_entropy(rows, torch.cat([words, pool]), labels)
    return found


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "ours": _ours,
    "all scores at once": _materialised,
    "torch linear_cross_entropy": _linear,
}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4600, help="masked tokens")
    parser.add_argument("--negatives", type=int, default=20_000, help="video tokens of the pool")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each way, of two timed passes each")
    parser.add_argument("--small", action="store_true", help="a test run: 64 rows, 500 negatives, one round")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    told = parser.parse_args()
    rows, negatives, rounds = (64, 500, 1) if told.small else (told.rows, told.negatives, told.rounds)
    if told.way:
        print(json.dumps(_measure(told.way, rows, negatives)))
        return
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS:
            print(f"round {number + 1}: {way}", file=sys.stderr)
            command = [sys.executable, __file__, "--way", way, f"--rows={rows}", f"--negatives={negatives}"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
            found[way].append(json.loads(done.stdout))
    print(table([row for way in WAYS if way != "ours" for row in _rows(found, way)]))
    print(f"\n{rows} rows x ({WORDS} words + {negatives} negatives), {torch.get_num_threads()} threads; {machine()}")
    print("Liger and Cut Cross Entropy need CUDA and Triton, and are not measured here.")
    if told.json:
        told.json.write_text(json.dumps(found))
    for figures in found.values():
        for name, least in (("loss", 1e-5), ("gradient", 1e-4)):
            mine, theirs = found["ours"][0][name], figures[0][name]
            if abs(mine - theirs) > least * abs(mine):
                raise SystemExit(f"{name} differs ({mine} and {theirs}): the speeds say nothing")


def _measure(way: str, rows: int, negatives: int) -> dict[str, Any]:
    torch.manual_seed(0)
    queries = torch.randn(rows, WIDTH, requires_grad=True)
    words = (torch.randn(WORDS, WIDTH) * 0.02).requires_grad_()
    pool = (torch.randn(negatives, WIDTH) * 0.05).requires_grad_()
    labels = torch.randint(WORDS, (rows,))
    small = [tensor[:4].detach().clone().requires_grad_() for tensor in (queries, words, pool)]
    WAYS[way](*small, labels[:4] % 4).backward()  # libraries load what they load
    held, seconds, losses = psutil.Process().memory_info().rss / 2**20, list[float](), list[float]()
    gradient = 0.0
    for _ in range(STEPS):
        began = time.perf_counter()
        loss = WAYS[way](queries, words, pool, labels)
        loss.backward()
        seconds.append(time.perf_counter() - began)
        losses.append(float(loss.detach()))
        assert queries.grad is not None
        gradient = float(queries.grad.norm())
        queries.grad = words.grad = pool.grad = None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - held
    return {"seconds": seconds, "loss": losses[0], "gradient": gradient, "peak": peak}


def _rows(found: dict[str, list[dict[str, Any]]], way: str) -> list[Row]:
    ours, theirs = ([1 / s for one in found[name] for s in one["seconds"]] for name in ("ours", way))
    memory = [max(one["peak"] for one in found[name]) for name in ("ours", way)]
    share = memory[0] / memory[1]
    promised = way == "all scores at once"
    return [
        compare("loss", "forward and backward", "passes/s", ours, way, theirs, 1.0 if promised else None),
        Row("loss", "peak memory", "MB", memory[0], way, memory[1], share, "<= 0.125 x" if promised else "",
            share <= 0.125 if promised else None),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
