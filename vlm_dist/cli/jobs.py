"""`vlm-dist jobs`: the runs of a workspace."""

from typing import Annotated

import typer

from vlm_dist.cli.options import HERE, Json, Overrides, Workspace

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _jobs() -> None:
    """List the runs of this workspace."""


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option("--limit", min=1, help="The newest so many runs.")] = 50,
    workspace: Workspace = HERE,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """List runs, newest first: state, age, duration, last metric, why they ended, where the checkpoint is.

    A run whose process has died on this machine is first marked FAILED (lost).

    \b
    Examples:
      vlm-dist jobs list
      vlm-dist jobs list --limit 5 --json
    """
    from cluster.mlflow_server import tracking_server
    from jobs.runs import list_runs, reconcile
    from vlm_dist.cli.output import duration, print_json, print_table, print_warning
    from vlm_dist.config import load_settings

    resolved = load_settings(workspace, overrides)
    with tracking_server(resolved.settings.cluster, resolved.folder) as uri:
        for name in reconcile(uri):
            print_warning(f"{name} said RUNNING but its process is gone; it is now FAILED (lost)")
        rows = list_runs(uri, limit)
    if json:
        print_json([row.as_json() for row in rows])
        return
    if not rows:
        print("No runs yet. `vlm-dist extract` or `vlm-dist pretrain` makes the first.")
        return
    columns = ("run", "id", "state", "age", "took", "last metric", "end", "checkpoint")
    print_table(
        columns,
        [
            (
                row.name,
                row.id[:8],
                row.status,
                duration(row.age_s),
                duration(row.duration_s),
                f"{row.metric} {row.value:.4g}" + (f" @ {row.step}" if row.step else "")
                if row.value is not None
                else "",
                row.end_reason + (f": {row.error[:80]}" if row.error else ""),
                row.checkpoint,
            )
            for row in rows
        ],
        right=("age", "took"),
    )
