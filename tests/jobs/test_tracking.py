"""A run's page: what is on it, how it ends, and that nothing is lost when the server is away."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from jobs.client import connect, experiment_name
from jobs.runs import reconcile
from jobs.tracking import Tracker, root_cause, tracked_run
from vlm_dist.config import Settings
from vlm_dist.errors import JobError, TrainingError


def test_a_run_keeps_config_metrics_files_and_facts(uri: str, tmp_path: Path) -> None:
    (tmp_path / "plot.txt").write_text("loss")
    tags = {"vlm_dist.store_fingerprint": "f00d", "vlm_dist.checkpoint": "/ckpt"}
    with tracked_run(uri, kind="pretrain", params=Settings().flat(), tags=tags) as run:
        for step in range(2500):
            run.metrics({"train/loss": 1 / (step + 1), "train/lr": float("nan")}, step)
        run.artifact(tmp_path / "plot.txt", "plots")
        run.artifact(tmp_path, "all")
        run.text("{}", "reports/metrics.json")
        run.text("x = 1", "config.toml")
        run.dataset("store", "ab" * 30)
        run.note("# What this is")
        assert run.url.startswith(f"{uri}/#/experiments/")
    client = connect(uri)
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == run.name
    experiment = client.get_experiment(stored.info.experiment_id)
    assert experiment.name == experiment_name("pretrain") == "vlm-dist/pretrain"
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert stored.data.params["train.optim.lr"] == "5e-05"
    history = client.get_metric_history(run.run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(2500))
    assert history[-1].value == pytest.approx(1 / 2500)
    files = {
        file.path for folder in ("", "plots", "all", "reports") for file in client.list_artifacts(run.run_id, folder)
    }
    assert {"plots/plot.txt", "all/plot.txt", "reports/metrics.json", "config.toml"} <= files
    found = stored.data.tags
    assert found["vlm_dist.end_reason"] == "finished"
    assert found["vlm_dist.store_fingerprint"] == "f00d"
    assert found["mlflow.note.content"] == "# What this is"
    for name in ("kind", "task", "git_commit", "git_dirty", "versions", "hardware", "pid", "host", "boot", "command"):
        assert f"vlm_dist.{name}" in found
    assert "torch 2" in found["vlm_dist.versions"]
    data = stored.inputs.dataset_inputs[0].dataset
    assert (data.name, data.digest) == ("store", ("ab" * 30)[:36])


def test_a_failure_keeps_its_root_cause(uri: str) -> None:
    def fail() -> None:
        try:
            raise MemoryError("rank 1 ran out")
        except MemoryError as error:
            raise TrainingError("training stopped") from error

    with pytest.raises(TrainingError), tracked_run(uri, kind="finetune", task="coin", params={}) as run:
        fail()
    client = connect(uri)
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FAILED"
    assert stored.data.tags["vlm_dist.end_reason"] == "failed"
    assert stored.data.tags["vlm_dist.error"] == "MemoryError: rank 1 ran out"
    text = Path(client.download_artifacts(run.run_id, "error.txt")).read_text()
    assert text.startswith("MemoryError: rank 1 ran out\n")
    assert "TrainingError: training stopped" in text


def test_an_interrupt_ends_as_killed_and_the_run_can_go_on(uri: str) -> None:
    def stop(run: Tracker) -> None:
        run.metrics({"train/loss": 3.0}, 1)
        raise KeyboardInterrupt

    params = {"train.seed": 1, "train.max_steps": 5}
    with pytest.raises(KeyboardInterrupt), tracked_run(uri, kind="pretrain", params=params) as first:
        stop(first)
    client = connect(uri)
    assert client.get_run(first.run_id).info.status == "KILLED"
    changed = {"train.seed": 1, "train.max_steps": 9, "train.epochs": 2.0}
    with tracked_run(uri, kind="pretrain", params=changed, resume=first.run_id) as second:
        second.metrics({"train/loss": 2.0}, 2)
    assert (second.run_id, second.name) == (first.run_id, first.name)
    stored = client.get_run(first.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"train.seed": "1", "train.max_steps": "5", "train.epochs": "2.0"}
    assert stored.data.tags["vlm_dist.resume_1.train.max_steps"] == "9"
    assert [metric.step for metric in client.get_metric_history(first.run_id, "train/loss")] == [1, 2]


def test_a_run_names_its_process_from_its_first_moment(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is queued may never leave: a run that says RUNNING without a process would say so for ever."""
    client = connect(uri)
    monkeypatch.setattr("jobs.writer._FLUSH_EVERY_S", 600.0)
    with tracked_run(uri, kind="pretrain", params={}) as run:
        tags = client.get_run(run.run_id).data.tags
        assert tags["vlm_dist.pid"] == str(os.getpid())
        assert {"vlm_dist.host", "vlm_dist.boot", "vlm_dist.pid_start", "vlm_dist.kind"} <= tags.keys()
        client.set_tag(run.run_id, "vlm_dist.pid_start", "a process that is gone")
    with tracked_run(uri, kind="pretrain", params={}, resume=run.run_id) as again:
        assert again.run_id == run.run_id
        assert reconcile(uri) == [], "a living run is not lost"
        assert client.get_run(run.run_id).info.status == "RUNNING"
        assert "vlm_dist.end_reason" not in client.get_run(run.run_id).data.tags
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_nothing_is_lost_while_the_server_is_away(
    uri: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.writer._FLUSH_EVERY_S", 0.5)
    with _door(uri) as door:
        with tracked_run(door.uri, kind="extract", params={"a": 1}) as run:
            run.metrics({"x": 0.0}, 0)
            time.sleep(1)
            door.open = False
            start = time.perf_counter()
            for step in range(1, 2000):
                run.metrics({"x": float(step)}, step)
            run.text("kept", "kept.txt")
            assert time.perf_counter() - start < 1.0, "the run never waits for the server"
            until = time.monotonic() + 30
            while "out of reach" not in caplog.text and time.monotonic() < until:
                time.sleep(0.1)
            door.open = True
        history = connect(uri).get_metric_history(run.run_id, "x")
    assert [metric.step for metric in history] == list(range(2000))
    assert [file.path for file in connect(uri).list_artifacts(run.run_id)] == ["kept.txt"]
    assert connect(uri).get_run(run.run_id).info.status == "FINISHED"
    assert "out of reach" in caplog.text
    assert "not everything" not in caplog.text


def test_what_does_not_arrive_is_reported(
    uri: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.tracking._FLUSH_TIMEOUT_S", 1.0)
    monkeypatch.setattr("jobs.writer._FLUSH_EVERY_S", 0.5)
    with _door(uri) as door, tracked_run(door.uri, kind="extract", params={}) as run:
        time.sleep(1)
        door.open = False
        run.metrics({"x": 1.0}, 0)
    assert "not everything reached the tracking server" in caplog.text
    connect(uri).set_terminated(run.run_id, "FAILED")


def test_what_the_server_refuses_is_dropped_and_the_rest_arrives(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    with tracked_run(uri, kind="extract", params={"a": 1}) as run:
        run.params({"a": 2})
        run.artifact(Path("absent.txt"))
        run.metrics({"x": 1.0}, 0)
    stored = connect(uri).get_run(run.run_id)
    assert stored.data.params == {"a": "1"}
    assert stored.data.metrics == {"x": 1.0}
    assert stored.info.status == "FINISHED"
    assert "absent.txt" in caplog.text


def test_no_server_at_the_start_is_an_error() -> None:
    with pytest.raises(JobError, match=r"127\.0\.0\.1:9"), tracked_run("http://127.0.0.1:9", kind="extract", params={}):
        pass


def test_the_root_cause_of_a_chain() -> None:
    inner, outer = ValueError("first"), RuntimeError("wrapped")
    outer.__cause__ = inner
    assert root_cause(outer) is inner
    rays = RuntimeError("from a worker")
    rays.cause = outer  # type: ignore[attr-defined]
    assert root_cause(rays) is inner
    alone = RuntimeError("alone")
    alone.__context__, alone.__suppress_context__ = inner, True
    assert root_cause(alone) is alone
    inner.__context__ = outer
    assert root_cause(outer) is inner, "a circle ends"


class _Door:
    """A relay in front of a server that drops every connection while it is closed."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname, parts.port)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.open = True
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while (data := source.recv(65536)) and self.open:
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()


@contextmanager
def _door(uri: str) -> Iterator[_Door]:
    door = _Door(uri)
    try:
        yield door
    finally:
        door.listener.close()
