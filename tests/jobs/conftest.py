"""One real tracking server for all tests of this folder."""

from collections.abc import Iterator

import pytest

from cluster.config import ClusterConfig
from cluster.mlflow_server import tracking_server


@pytest.fixture(scope="session")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its http address."""
    with tracking_server(ClusterConfig(), tmp_path_factory.mktemp("tracking")) as address:
        yield address
