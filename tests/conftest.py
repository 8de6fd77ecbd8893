"""What every test may use: the read-only reference material, where it is present."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray Train looks at its workers every two seconds, and a small training is over sooner.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

# The tests ask for a hundred thousand fsyncs, minutes on a disk: their folders lie in memory where there is room.
_MEMORY = Path("/dev/shm")
if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 8 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))

# What extraction keeps on a node for its next attempt: not in the home of whoever runs the tests.
_CACHE = tempfile.TemporaryDirectory(prefix="vlm-dist-tests-")
os.environ.setdefault("FEATURE_STORE_CACHE", _CACHE.name)

pytest_plugins = ["tests.feature_store.video_files", "tests.feature_store.buckets"]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden numbers and real inputs that stands beside the checkout in development and CI."""
    folder = Path(os.environ.get("SHARED_REFERENCE", ROOT.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"needs the reference material, and {folder} is not there")
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One real local Ray for all tests that need one."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The http address of one real tracking server, for all tests that need no workspace's own: a start takes long."""
    from cluster.config import ClusterConfig
    from cluster.mlflow_server import tracking_server

    with tracking_server(ClusterConfig(), tmp_path_factory.mktemp("tracking")) as address:
        yield address


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=False)
