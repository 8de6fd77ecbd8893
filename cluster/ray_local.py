"""Ray for one command: a local one that ends with it, or the cluster at a given address."""

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Generator
from typing import Any
from urllib.parse import urlsplit

from cluster.config import ClusterConfig
from cluster.resources import NodeResources
from vlm_dist.errors import ConfigError, JobError

_OBJECT_STORE_BYTES = 8 << 30
"""At most: frames on their way from decoders to networks, a few tens of MB for each core; taken only as it is used."""

_PASSED = ("AWS_", "FEATURE_STORE_")


@contextlib.contextmanager
def ray_session(cluster: ClusterConfig) -> Generator[list[NodeResources]]:
    """Connect this process to Ray for the block; give the nodes.

    An own Ray is started (without dashboard) and ended, unless `ray_address` is set. Inside another session the block
    uses that one.

    Raises:
        ConfigError: There is no cluster at `ray_address`, or `ray` was imported before with another `ray_auth`.
        JobError: The local Ray does not start.
    """
    # Ray decides about token checks when it is imported: a token file or an inherited variable would decide for it,
    # and its daemons, which read the variable later, would decide otherwise.
    os.environ["RAY_AUTH_MODE"] = cluster.ray_auth
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Today's behaviour of Ray, named, so that it does not warn about a change to come.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield ray_nodes()
        return
    _check_auth(cluster)
    # Ray puts the current folder first on its workers' import path. A user's folder may hold a `jobs.py` or a store
    # called `feature_store`, so Ray is started from an empty one (the workers' paths are absolute).
    with tempfile.TemporaryDirectory(prefix="vlm-dist-ray-") as empty:
        with contextlib.chdir(empty), _own_signals():
            _connect(cluster)
        try:
            yield ray_nodes()
        finally:
            ray.shutdown()


def _check_auth(cluster: ClusterConfig) -> None:
    """Refuse a Ray that was imported, before this module could say how, with other token checks than configured."""
    from ray import _raylet

    raylet: Any = _raylet  # the only place where Ray tells; a compiled module without types

    mode = "token" if raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN else "disabled"
    if mode != cluster.ray_auth:
        raise ConfigError(
            f"ray was imported before the session, with RAY_AUTH_MODE={mode}, and cluster.ray_auth is "
            f"{cluster.ray_auth}; import ray inside the session, or set cluster.ray_auth={mode}"
        )


@contextlib.contextmanager
def _own_signals() -> Generator[None]:
    """Keep this process's answer to SIGTERM: Ray puts one of its own that aborts with a stack of addresses."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGTERM, handler)


def ray_nodes() -> list[NodeResources]:
    """The living nodes of the cluster that this process is connected to."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [NodeResources(float(have.get("CPU", 0)), float(have.get("GPU", 0))) for have in alive]


def _connect(cluster: ClusterConfig) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "vlm-dist"}
    if cluster.ray_address:
        try:
            _knock(cluster.ray_address)
            # A local Ray inherits the environment; workers of a cluster need what leads to a store in a bucket.
            passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED)}
            ray.init(cluster.ray_address, runtime_env={"env_vars": passed} if passed else None, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            why = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"no Ray cluster answers at cluster.ray_address = {cluster.ray_address!r} ({why}); start one with "
                "`ray start --head`, or leave the setting empty for a local one"
            ) from error
        return
    try:
        ray.init(
            address="local",
            num_cpus=cluster.num_cpus or None,
            include_dashboard=False,
            object_store_memory=_object_store_bytes(),
            **quiet,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise JobError(f"Ray does not start on this machine: {error}; `vlm-dist doctor` may know why") from error


def _knock(address: str) -> None:
    """Fail at once where nobody listens (Ray itself would try for minutes); `auto` is left to Ray."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), timeout=10).close()


def _object_store_bytes() -> int:
    """At most half of what shared memory has free (containers often have 64 MiB), at least Ray's own minimum."""
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else _OBJECT_STORE_BYTES
    return max(80 << 20, min(_OBJECT_STORE_BYTES, free // 2))
