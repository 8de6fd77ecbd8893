"""Buckets on a real S3 server, for every test that needs one (a pytest plugin)."""

import itertools
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Address of a real S3 server (see s3_server.py) for all tests that need one."""
    command = [sys.executable, "-m", "tests.feature_store.s3_server"]
    # Where a test before has typed a command, PYTHONSAFEPATH is set, and this package would not be found.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert server.stdout is not None
    yield f"http://127.0.0.1:{int(server.stdout.readline())}"
    server.kill()
    server.wait()


_buckets = itertools.count()


@pytest.fixture
def bucket(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh, empty bucket, as s3://NAME; the environment says how to reach it, also to child processes."""
    variables = {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "FEATURE_STORE_CACHE": str(tmp_path / "node-cache"),
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{next(_buckets)}"
    urllib.request.urlopen(urllib.request.Request(f"{s3_endpoint}/{name}", method="PUT")).close()
    return f"s3://{name}"


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address where a store may be made: a folder, and a prefix of a bucket."""
    return _place(request, tmp_path)


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def long_place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same for tests whose requests to a bucket take seconds: that half of them is among the slow ones."""
    return _place(request, tmp_path)


def _place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "place") if request.param == "folder" else f"{request.getfixturevalue('bucket')}/lab/store"
