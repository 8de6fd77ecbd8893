"""Where work runs: Ray, machine resources, the workspace's MLflow server, the doctor."""
