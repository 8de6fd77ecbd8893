"""Ray for one command, and requests that can never fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.ray_local import ray_session
from cluster.resources import NodeResources, check_request, this_machine
from vlm_dist.errors import ConfigError

SESSION = """
from cluster.config import ClusterConfig
from cluster.ray_local import ray_session

def origins():
    import cluster.config, feature_store.config, vlm_dist.errors
    return [module.__file__ for module in (cluster.config, feature_store.config, vlm_dist.errors)]

with ray_session(ClusterConfig(num_cpus=2)) as nodes:
    import ray
    assert [node.cpus for node in nodes] == [2.0], nodes
    assert not ray.get_runtime_context().gcs_address.startswith("0.0.0.0")
    with ray_session(ClusterConfig(num_cpus=9)) as inner:
        assert inner == nodes
    print(*ray.get(ray.remote(origins).remote()), sep="\\n")
assert not ray.is_initialized()
"""


def test_a_session_ends_and_its_workers_import_our_packages(tmp_path: Path) -> None:
    for name in ("cluster", "feature_store", "vlm_dist"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('a folder of the user was imported')")
    (tmp_path / "session.txt").write_text(SESSION)
    done = subprocess.run(
        [sys.executable, "-P", "-c", "exec(open('session.txt').read())"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {
            "PYTHONSAFEPATH": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "RAY_AUTH_MODE": "token",  # of some other Ray: the session's own config decides
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not any(line.startswith(str(tmp_path)) for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) == 3
    assert done.stderr.strip() == "", "a local Ray starts and ends without a word"


def test_a_ray_that_was_imported_with_other_token_checks_is_refused() -> None:
    code = (
        "import ray; from cluster.config import ClusterConfig; from cluster.ray_local import ray_session\n"
        "with ray_session(ClusterConfig()): pass"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"RAY_AUTH_MODE": "token"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "RAY_AUTH_MODE=token" in done.stderr.splitlines()[-1]
    assert "import ray inside the session" in done.stderr.splitlines()[-1]


def test_an_address_where_nobody_listens_fails_at_once() -> None:
    with pytest.raises(ConfigError, match=r"no Ray cluster answers.*127\.0\.0\.1:1"):
        subprocess_free_session("127.0.0.1:1")


def subprocess_free_session(address: str) -> None:
    """Try the address in a process of its own session state."""
    import ray

    if ray.is_initialized():
        pytest.skip("this process is connected to another test's Ray already")
    with ray_session(ClusterConfig(ray_address=address)):
        pass


@pytest.mark.parametrize(
    ("nodes", "request_", "advice"),
    [
        ([NodeResources(2, 0)], (1, 8, 0), "this machine has 0 GPUs and 2 CPUs; type `--gpus 0 --workers 2`"),
        ([NodeResources(2, 0)], (1, 0, 4), "type `--workers 2`"),
        (
            [NodeResources(8, 0)],
            (4, 0, 2),
            "4 nodes, and this machine has 0 GPUs and 8 CPUs; type `--nodes 1 --gpus 0 --w",
        ),
        ([NodeResources(64, 4)], (1, 8, 0), "type `--nodes 1 --gpus 4`"),
        ([NodeResources(8, 4), NodeResources(8, 8)], (2, 8, 0), "type `--nodes 1 --gpus 8`"),
        ([NodeResources(8, 4)] * 2, (3, 2, 0), "type `--nodes 2 --gpus 2`"),
        ([NodeResources(8, 4)], (0, 1, 0), "at least one node"),
    ],
)
def test_what_can_never_fit_is_refused_with_what_to_type(
    nodes: list[NodeResources], request_: tuple[int, int, int], advice: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_request(nodes, *request_)
    assert advice in str(refusal.value)


def test_what_fits_passes() -> None:
    assert check_request([NodeResources(2, 0)], 1, 0, 2) is None
    assert check_request([NodeResources(8, 4)] * 2, 2, 4, 0) is None


def test_this_machine_in_words() -> None:
    machine = this_machine()
    assert machine.cpus >= 1
    assert f"{machine.cpus} CPUs" in str(machine)
