"""What runs: tracked runs in MLflow, their list, their comparison with the paper."""
