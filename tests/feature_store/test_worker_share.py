"""feature_store.worker_share: what a cluster is shared out into, on clusters that are not at hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.config import DecodeConfig, ExtractConfig
from feature_store.decode_pool import AHEAD
from feature_store.worker_share import Node, WorkerShare, second_bytes, worker_share, workers_on
from vlm_dist.errors import ConfigError

GIB = float(1 << 30)
CPU_NODE: Node = {"CPU": 64.0, "object_store_memory": 64 * GIB}
GPU_NODE: Node = {"CPU": 128.0, "GPU": 8.0, "object_store_memory": 200 * GIB}
HEAD: Node = {"CPU": 4.0, "object_store_memory": 2 * GIB}


def share(nodes: list[Node], **changes: object) -> WorkerShare:
    return worker_share(ExtractConfig(**changes), nodes)  # type: ignore[arg-type]


def test_a_machine_is_shared_by_its_workers() -> None:
    assert share([CPU_NODE]) == WorkerShare(workers=64, cpus=1, threads=1, decoders=2, chunk_seconds=8)
    assert share([CPU_NODE], workers=16) == WorkerShare(16, cpus=4, threads=4, decoders=2, chunk_seconds=8)
    assert share([CPU_NODE, HEAD], workers=16).cpus == 1, "a worker of one core fits everywhere"


def test_decoders_are_a_gpus_share_of_the_cores() -> None:
    assert share([GPU_NODE, HEAD], gpus_per_worker=1) == WorkerShare(
        8, cpus=16, threads=1, decoders=15, chunk_seconds=16
    )
    half = share([GPU_NODE, GPU_NODE], gpus_per_worker=0.5)
    assert (half.workers, half.cpus, half.decoders) == (32, 8, 7)
    assert share([GPU_NODE], gpus_per_worker=1, decoders=3).decoders == 3


def test_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"65 extraction workers of 1 CPU each do not fit: .* use --workers 64"):
        share([CPU_NODE], workers=65)
    with pytest.raises(ConfigError, match=r"Ray has 64 CPUs and 0 GPUs; extract on CPUs"):
        share([CPU_NODE], gpus_per_worker=1)
    assert share([CPU_NODE], workers=65, wait_for_nodes=True).workers == 65
    assert share([HEAD], workers=8, gpus_per_worker=1, wait_for_nodes=True).workers == 8


def test_equal_bits_want_one_thread_and_whole_chunks() -> None:
    tight: Node = {"CPU": 64.0, "object_store_memory": GIB}
    assert share([tight]).chunk_seconds == 1
    assert share([tight], workers=8, deterministic=True) == WorkerShare(8, 8, threads=1, decoders=2, chunk_seconds=8)


@given(
    nodes=st.lists(
        st.tuples(st.integers(0, 256), st.integers(0, 16), st.floats(0.08, 500)).map(
            lambda n: {"CPU": float(n[0]), "GPU": float(n[1]), "object_store_memory": n[2] * GIB}
        ),
        min_size=1,
        max_size=5,
    ),
    gpus=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]),
    batch=st.integers(1, 64),
    size=st.sampled_from([64, 224]),
)
def test_nothing_is_given_twice(nodes: list[Node], gpus: float, batch: int, size: int) -> None:
    cfg = ExtractConfig(gpus_per_worker=gpus, batch_seconds=batch, decode=DecodeConfig(size=size), wait_for_nodes=True)
    got = worker_share(cfg, nodes)
    assert got.workers >= 1
    assert got.decoders >= 1
    assert 1 <= got.chunk_seconds <= batch
    for node in nodes:
        here = min(got.workers, workers_on(node, cfg))
        assert here * got.cpus <= node["CPU"] or len(nodes) == 1, "the cores of all workers fit their node"
        assert here * gpus <= node["GPU"] or not here
        on_their_way = here * got.decoders * (AHEAD + 1) * got.chunk_seconds * second_bytes(cfg.decode)
        assert on_their_way <= node["object_store_memory"] / 2 or got.chunk_seconds == 1
