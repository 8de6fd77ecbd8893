"""`vlm-dist ui`: MLflow's pages."""

from vlm_dist.cli.options import HERE, Overrides, Workspace


def ui(workspace: Workspace = HERE, overrides: Overrides = None) -> None:
    """Open the tracking server of this workspace and hold it until Ctrl-C.

    It listens on this machine only. Commands that run at the same time use the same server. From another machine:
    `ssh -L PORT:127.0.0.1:PORT HOST`, then open the printed address.

    \b
    Examples:
      vlm-dist ui
      vlm-dist ui --workspace my-project
    """
    import time

    from cluster.mlflow_server import tracking_server
    from jobs.runs import reconcile
    from vlm_dist.config import load_settings

    resolved = load_settings(workspace, overrides)
    with tracking_server(resolved.settings.cluster, resolved.folder) as uri:
        reconcile(uri)
        print(f"MLflow: {uri}", flush=True)
        if resolved.settings.cluster.tracking_uri:
            return
        try:
            print("Ctrl-C ends it.", flush=True)
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print("Stopped.", flush=True)
