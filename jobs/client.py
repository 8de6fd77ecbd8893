"""The way to the tracking server: a client over http, and the experiment that a run belongs to."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
import os
from typing import Any

from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from cluster.mlflow_server import check_uri
from vlm_dist.errors import JobError

EXPERIMENTS = "vlm-dist/"
_ENVIRONMENT = {
    # MLflow's own patience (seven tries, two minutes each) is for callers without a queue of their own.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

# MLflow's pages open such an experiment in their view for model training, not in the one for chat applications.
_KIND: dict[str, Any] = {"mlflow.experimentKind": "custom_model_development"}


def connect(uri: str) -> MlflowClient:
    """A client of the server at `uri` (http or https; another scheme is a ConfigError)."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # each retry would be a line on the terminal
    return MlflowClient(check_uri(uri))


def experiment_name(kind: str, task: str = "") -> str:
    """One experiment per question that a person compares: extract, pretrain, and one for each task."""
    return EXPERIMENTS + (task or kind)


def experiments(client: MlflowClient) -> list[str]:
    """Ids of all of this product's experiments.

    Raises:
        JobError: The server cannot be reached.
    """
    try:
        found: list[Experiment] = client.search_experiments(filter_string=f"name LIKE '{EXPERIMENTS}%'")
    except MlflowException as error:
        raise unreachable(client, error) from error
    return [experiment.experiment_id for experiment in found]


def experiment_id(client: MlflowClient, name: str) -> str:
    """Id of the experiment `name`: made when it is new, brought back when it was deleted.

    Raises:
        JobError: The server cannot be reached.
    """
    try:
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return client.create_experiment(name, tags=_KIND)
            except MlflowException as error:
                experiment = client.get_experiment_by_name(name)  # another process was first
                if experiment is None:
                    raise error
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        return experiment.experiment_id
    except MlflowException as error:
        raise unreachable(client, error) from error


def unreachable(client: MlflowClient, error: MlflowException) -> JobError:
    """The error for a server that does not answer, or does not answer well."""
    why = str(error).strip().partition("\n")[0][:300]
    return JobError(f"the tracking server {client.tracking_uri} cannot be used: {why}")
