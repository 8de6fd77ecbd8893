"""Runs listed, found, and put right when their process is gone; the commands that show them."""

import json
import subprocess
import sys

import pytest

from jobs.client import connect
from jobs.runs import extract_run, find_run, list_runs, lookup_run, newest_checkpoint, reconcile
from jobs.tracking import tracked_run
from vlm_dist.cli.app import main
from vlm_dist.errors import JobError

DIE = """
import os, sys, time
from jobs.tracking import tracked_run
with tracked_run(sys.argv[1], kind="pretrain", params={}) as run:
    time.sleep(3)
    print(run.run_id, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_run_whose_process_died_is_marked_lost(uri: str) -> None:
    died = subprocess.run([sys.executable, "-c", DIE, uri], capture_output=True, text=True, check=False)
    run_id = died.stdout.strip()
    client = connect(uri)
    assert client.get_run(run_id).info.status == "RUNNING"
    with tracked_run(uri, kind="extract", params={}) as alive:  # every tracked command reconciles first
        assert client.get_run(run_id).info.status == "FAILED"
        assert client.get_run(run_id).data.tags["vlm_dist.end_reason"] == "lost"
        assert reconcile(uri) == []
        assert client.get_run(alive.run_id).info.status == "RUNNING"


def test_runs_of_other_machines_and_boots(uri: str) -> None:
    client = connect(uri)
    with tracked_run(uri, kind="extract", params={}) as mine:
        pass
    elsewhere = {"vlm_dist.host": "another-machine"}
    with tracked_run(uri, kind="extract", params={}, tags=elsewhere) as other:
        pass
    for run in (mine, other):
        client.set_tag(run.run_id, "vlm_dist.boot", "an earlier boot")
        client.update_run(run.run_id, status="RUNNING")
    assert reconcile(uri) == [mine.name]
    assert client.get_run(other.run_id).info.status == "RUNNING"
    client.set_terminated(other.run_id, "FINISHED")


def test_lists_and_finds(uri: str) -> None:
    with tracked_run(uri, kind="pretrain", params={}, tags={"vlm_dist.checkpoint": "/runs/a"}) as first:
        first.metrics({"train/loss": 2.5, "other": 1.0}, 40)
    with tracked_run(uri, kind="finetune", task="coin", params={}, tags={"vlm_dist.checkpoint": "/runs/b"}) as second:
        second.metrics({"coin/frame_accuracy": 0.5, "train/loss": 1.0}, 3)
    with tracked_run(uri, kind="pretrain", params={}) as without:
        pass
    rows = list_runs(uri, limit=3)
    assert [row.id for row in rows] == [without.run_id, second.run_id, first.run_id]
    assert (rows[1].metric, rows[1].value, rows[1].step) == ("coin/frame_accuracy", 0.5, 3)
    assert (rows[2].metric, rows[2].value, rows[2].step) == ("train/loss", 2.5, 40)
    assert rows[2].checkpoint == "/runs/a"
    assert rows[2].status == "FINISHED"
    assert 0 <= rows[2].duration_s <= rows[2].age_s < 120
    newest = newest_checkpoint(uri, "pretrain")
    assert newest is not None
    assert newest.id == first.run_id, "the newest that has a checkpoint"
    coin = newest_checkpoint(uri, "finetune", "coin")
    assert coin is not None
    assert coin.checkpoint == "/runs/b"
    assert newest_checkpoint(uri, "finetune", "msrvtt") is None
    assert find_run(uri, first.run_id[:12]).info.run_id == first.run_id
    assert find_run(uri, second.name).info.run_id == second.run_id
    with pytest.raises(JobError, match="jobs list"):
        find_run(uri, "no-such-run")
    assert lookup_run(uri, "no-such-run") is None
    with pytest.raises(JobError, match="cannot be used"):
        lookup_run("http://127.0.0.1:9", "no-such-run")


def test_the_extraction_behind_a_store_is_found_by_its_fingerprint(uri: str) -> None:
    for fingerprint in ("f1", "f2", "f1"):
        with tracked_run(uri, kind="extract", params={}, tags={"vlm_dist.store_fingerprint": fingerprint}) as run:
            pass
    assert extract_run(uri, "f1") == run.run_id
    assert extract_run(uri, "f3") == ""


def test_jobs_list_prints_a_table_or_json(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    with tracked_run(uri, kind="evaluate", task="coin", params={}) as run:
        run.metrics({"coin/frame_accuracy": 0.25}, 0)
    server = ["--set", f"cluster.tracking_uri={uri}"]
    assert main(["jobs", "list", "--limit", "1", "--json", *server]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["id"], row["status"], row["value"]) == (run.run_id, "FINISHED", 0.25)
    assert main(["jobs", "list", "--limit", "1", *server]) == 0
    table = capsys.readouterr().out
    assert run.name in table
    assert "coin/frame_accuracy 0.25" in table
    assert main(["jobs", "list", "--set", "cluster.tracking_uri=http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
