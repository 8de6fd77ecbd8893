"""The workspace's own server: shared, found again, and gone with its last holder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.mlflow_server import OwnServer, check_uri, tracking_server
from cluster.processes import group_members, is_alive, start_mark
from vlm_dist.errors import ConfigError, JobError

HOLD = """
import sys, time
from pathlib import Path
from cluster.config import ClusterConfig
from cluster.mlflow_server import tracking_server
with tracking_server(ClusterConfig(), Path(sys.argv[1])) as uri:
    print(uri, flush=True)
    sys.stdin.read()
"""


def _holders(workspace: Path, count: int) -> tuple[list[subprocess.Popen[str]], set[str]]:
    """Processes, started at once, that hold the server until their input ends; and the addresses that they got."""
    command = [sys.executable, "-c", HOLD, str(workspace)]
    holders = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    return holders, {holder.stdout.readline().strip() for holder in holders if holder.stdout}


def _record(workspace: Path) -> dict[str, int]:
    return json.loads((workspace / ".vlm-dist" / "mlflow" / "server.json").read_text())


def test_two_commands_share_a_server_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    workspace = tmp_path / "a folder with spaces, % and ?"
    workspace.mkdir()
    first, (uri,) = _holders(workspace, 2)
    server = _record(workspace)["pid"]
    assert len(group_members(server)) >= 2
    for holder in first:
        holder.kill()
        holder.wait()
    assert group_members(server), "kill -9 of the holders leaves the server to the next command"
    with tracking_server(ClusterConfig(), workspace) as mine:
        assert mine == uri
        assert _record(workspace)["pid"] == server
        with tracking_server(ClusterConfig(), workspace) as inner:
            assert inner == uri
        (second,), theirs = _holders(workspace, 1)
        assert theirs == {uri}
        second.communicate("")
        assert second.returncode == 0
        assert group_members(server), "somebody still holds it"
    assert group_members(server) == []
    state = workspace / ".vlm-dist" / "mlflow"
    assert sorted(path.name for path in state.iterdir()) == ["leases", "lock", "mlflow.db", "server.log"]
    assert list((state / "leases").iterdir()) == []


@pytest.mark.parametrize(("hits", "code"), [(1, 0), pytest.param(2, 130, marks=pytest.mark.slow)])
def test_the_ui_command_ends_its_server(tmp_path: Path, hits: int, code: int) -> None:
    command = [sys.executable, "-P", "-m", "vlm_dist", "ui", "--workspace", str(tmp_path)]
    ui = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell lets its jobs ignore it
    )
    assert ui.stdout is not None
    assert ui.stdout.readline().startswith("MLflow: http://127.0.0.1:")
    assert ui.stdout.readline() == "Ctrl-C ends it.\n"
    server = _record(tmp_path)["pid"]
    time.sleep(0.2)  # a signal that hits the writing of the line makes it come twice
    if hits == 2:
        os.killpg(server, signal.SIGSTOP)  # it does not end before it is let go: the second hit comes in between
    ui.terminate()
    if hits == 2:  # an impatient user
        assert ui.stdout.readline() == "Stopped.\n"
        time.sleep(0.5)
        ui.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert ui.poll() is None, "the server is still to be stopped"
        os.killpg(server, signal.SIGCONT)
    ui.communicate()
    assert ui.returncode == code
    assert group_members(server) == []


@pytest.mark.slow
def test_a_dead_server_is_replaced_where_its_clients_look_for_it(tmp_path: Path) -> None:
    with tracking_server(ClusterConfig(), tmp_path) as uri:
        old = _record(tmp_path)["pid"]
        os.kill(old, signal.SIGKILL)  # the leader only: its child must not be left over
        while start_mark(old):
            os.waitpid(old, os.WNOHANG)
            time.sleep(0.05)
        with tracking_server(ClusterConfig(), tmp_path) as again:
            assert again == uri
            assert _record(tmp_path)["pid"] != old
            assert group_members(old) == []
        new = _record(tmp_path)["pid"]
    assert group_members(new) == []


def test_a_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / ".vlm-dist" / "mlflow"
    (state / "mlflow.db").mkdir(parents=True)
    monkeypatch.setattr("cluster.mlflow_server.START_TIMEOUT_S", 1.0)
    with pytest.raises(JobError, match=r"no answer in 1 s.*server\.log"), tracking_server(ClusterConfig(), tmp_path):
        pass
    assert list((state / "leases").iterdir()) == []
    assert not (state / "server.json").exists()


@pytest.mark.parametrize(  # bytes of the database when the lights go out
    "size", [1, *(pytest.param(size, marks=pytest.mark.slow) for size in (300_000, 700_000))]
)
def test_a_first_start_that_is_killed_spoils_nothing(tmp_path: Path, size: int) -> None:
    state = tmp_path / ".vlm-dist" / "mlflow"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE)
    made = [state / "mlflow.db.new", state / "mlflow.db"]
    while not any(path.exists() and path.stat().st_size >= size for path in made):
        time.sleep(0.001)
    server = _record(tmp_path)["pid"]
    holder.kill()
    holder.wait()
    os.killpg(server, signal.SIGKILL)
    with tracking_server(ClusterConfig(), tmp_path) as uri:
        assert uri.startswith("http://127.0.0.1:")
    assert [path.name for path in state.glob("mlflow.db*")] == ["mlflow.db"]


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "file:///tmp/x", "./mlruns", "localhost:5000", "http://"])
def test_only_http_is_taken(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="http"), tracking_server(ClusterConfig(tracking_uri=uri), tmp_path):
        pass


def test_a_given_server_is_used_as_it_is(tmp_path: Path) -> None:
    with tracking_server(ClusterConfig(tracking_uri="https://mlflow.example.org/team/"), tmp_path) as uri:
        assert uri == "https://mlflow.example.org/team"
    assert check_uri("http://127.0.0.1:5000") == "http://127.0.0.1:5000"
    assert list(tmp_path.iterdir()) == []


def test_processes_are_known_by_number_and_start() -> None:
    sleeper = subprocess.Popen(["sleep", "60"])
    mark = start_mark(sleeper.pid)
    assert is_alive(sleeper.pid, mark)
    assert not is_alive(sleeper.pid, "1")
    assert not is_alive(sleeper.pid, "")
    sleeper.kill()
    while start_mark(sleeper.pid):  # a zombie counts as gone
        time.sleep(0.01)
    assert not is_alive(sleeper.pid, mark)
    sleeper.wait()


def test_a_lease_of_a_dead_process_is_swept(tmp_path: Path) -> None:
    server = OwnServer(tmp_path)
    server.leases.mkdir()
    mine = server.leases / f"{os.getpid()}-{start_mark(os.getpid())}-0"
    mine.touch()
    (server.leases / f"{os.getpid()}-1-0").touch()
    assert server._living_leases() == [mine]
    assert list(server.leases.iterdir()) == [mine]
