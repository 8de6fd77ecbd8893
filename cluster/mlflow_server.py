"""The workspace's own MLflow server, shared by every command that needs it and gone with the last of them.

One server owns the SQLite file (nobody else opens it). It listens on 127.0.0.1, is found again by `server.json`, and is
held by lease files, one for each holder; whoever removes the last lease of a living process stops it. A killed holder
leaves a dead lease, which the next command ignores.
"""

import contextlib
import fcntl
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.config import ClusterConfig
from cluster.processes import boot_id, group_members, interrupts_wait, is_alive, start_mark
from vlm_dist.errors import ConfigError, JobError

START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 10.0
_numbers = itertools.count()


@contextlib.contextmanager
def tracking_server(cluster: ClusterConfig, folder: Path) -> Generator[str]:
    """Hold a tracking server for the block and give its http address.

    Args:
        cluster: With `tracking_uri` set, that server is used as it is.
        folder: The workspace; the own server keeps its state in `.vlm-dist/mlflow` below it.

    Raises:
        ConfigError: `tracking_uri` is no http(s) address, or the workspace cannot be written.
        JobError: The own server does not come up (with the end of its log).
    """
    if cluster.tracking_uri:
        yield check_uri(cluster.tracking_uri)
        return
    _keep_off_proxies()
    server = OwnServer(folder / ".vlm-dist" / "mlflow")
    lease = server.join()
    try:
        yield server.uri
    finally:
        server.leave(lease)


def check_uri(uri: str) -> str:
    """Return `uri` without a trailing slash; only http(s) is taken.

    Raises:
        ConfigError: Another scheme: several processes that open one SQLite file or folder lose runs.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(
            f"cluster.tracking_uri = {uri!r} is not the http(s) address of an MLflow server. Files and databases are "
            "opened by one server only, so that parallel runs cannot damage them: leave it empty for the workspace's "
            "own server, or start one with `mlflow server --backend-store-uri ...` and give its http address."
        )
    return uri.rstrip("/")


class OwnServer:
    """The server of one state folder: join, leave, and what these two need."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.leases = state / "leases"
        self.log = state / "server.log"
        self._record = state / "server.json"
        self.uri = ""

    def join(self) -> Path:
        """Take a lease on a healthy server, started when there is none; sets `uri`."""
        try:
            self.leases.mkdir(parents=True, exist_ok=True)
            (self.state / "lock").touch()
        except OSError as error:
            raise ConfigError(
                f"the runs of this workspace are kept in {self.state}, which cannot be written: {error.strerror}; make "
                "it writable, name another folder with --workspace, or set cluster.tracking_uri"
            ) from error
        with self._lock():
            lease = self.leases / f"{os.getpid()}-{start_mark(os.getpid())}-{next(_numbers)}"
            lease.touch()
            try:
                if not self._find():
                    self._end()
                    self._start()
            except BaseException:
                self._release(lease)
                raise
            return lease

    def leave(self, lease: Path) -> None:
        """Give a lease back; the last living holder stops the server."""
        with self._lock():
            self._release(lease)

    def _release(self, lease: Path) -> None:
        with interrupts_wait():  # a second Ctrl-C would leave the server behind
            lease.unlink(missing_ok=True)
            if not self._living_leases():
                self._end()
                self._record.unlink(missing_ok=True)

    def _living_leases(self) -> list[Path]:
        """Leases whose process lives; the others are removed."""
        living: list[Path] = []
        for lease in self.leases.iterdir():
            pid, mark, _ = lease.name.split("-")
            if is_alive(int(pid), mark):
                living.append(lease)
            else:
                lease.unlink(missing_ok=True)
        return living

    def _find(self) -> bool:
        record = self._read()
        if record is None or not is_alive(record["pid"], record["mark"]) or not _healthy(record["port"], timeout=10):
            return False
        self.uri = f"http://127.0.0.1:{record['port']}"
        return True

    def _read(self) -> dict[str, Any] | None:
        """The server's record, or None when there is none of this boot."""
        try:
            record = json.loads(self._record.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return record if record["boot"] == boot_id() else None

    def _start(self) -> None:
        port = _free_port(int((self._read() or {}).get("port", 0)))
        command = [sys.executable, "-P", "-m", "cluster.mlflow_process", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", "1", "--artifacts-destination", "./artifacts"]
        with self.log.open("w") as log:
            process = subprocess.Popen(
                command,
                cwd=self.state,
                env=_server_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        mark = start_mark(process.pid)
        record = {"pid": process.pid, "mark": mark, "port": port, "boot": boot_id()}
        temporary = self._record.with_suffix(".tmp")
        temporary.write_text(json.dumps(record))
        temporary.replace(self._record)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _healthy(port, timeout=2):
            if process.poll() is not None or time.monotonic() > deadline:
                how = "ended at once" if process.poll() is not None else f"gave no answer in {START_TIMEOUT_S:.0f} s"
                tail = " | ".join(self.log.read_text(errors="replace").strip().splitlines()[-3:])
                raise JobError(f"the workspace's MLflow server {how}; its log {self.log} ends with: {tail}")
            time.sleep(0.1)
        self.uri = f"http://127.0.0.1:{port}"

    def _end(self) -> None:
        """End the recorded server's process group, if it is still the recorded one."""
        record = self._read()
        if record is not None:
            group = int(record["pid"])
            # The leader may be gone and its child alive; a group number is not reused while the group has members.
            leader = start_mark(group)
            if leader in ("", record["mark"]):
                _end_group(group)

    @contextlib.contextmanager
    def _lock(self) -> Generator[None]:
        with (self.state / "lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def _end_group(group: int) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while group_members(group):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(group, os.WNOHANG)
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        else:
            return


def _healthy(port: int | str, timeout: float) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=timeout)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_port(wanted: int) -> int:
    """`wanted` when it is free (those who knew the last server find the new one), else any."""
    for port in (wanted, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise JobError("no free port on 127.0.0.1 for the workspace's MLflow server")


def _server_environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return environment | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes more, for a feature that is not used
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "PYTHONSAFEPATH": "1",
    }


def _keep_off_proxies() -> None:
    """A proxy of the environment must not be asked for a loopback address."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        if "127.0.0.1" not in hosts:
            os.environ[name] = ",".join([*hosts, "127.0.0.1"])
