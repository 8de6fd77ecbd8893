"""`vlm-dist compare`: our results in the paper's tables."""

from typing import TYPE_CHECKING, Annotated

import typer

from vlm_dist.cli.options import HERE, Json, Overrides, Workspace

if TYPE_CHECKING:
    from jobs.compare import Row, TaskTable


def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN", help="Run names or ids (default: the newest result of every task)."),
    ] = None,
    workspace: Workspace = HERE,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Put runs beside the paper's numbers and its baselines.

    Runs that differ only in their seed become one row with mean ± spread over n runs. Percent as in the paper; with
    --json shares between 0 and 1.

    \b
    Examples:
      vlm-dist compare
      vlm-dist compare finetune-coin-20260105-101500 3f2a9c1b
      vlm-dist compare --json
    """
    from cluster.mlflow_server import tracking_server
    from jobs.compare import compare as tables_of
    from vlm_dist.cli.output import print_json
    from vlm_dist.config import load_settings

    resolved = load_settings(workspace, overrides)
    with tracking_server(resolved.settings.cluster, resolved.folder) as uri:
        tables = tables_of(uri, runs or ())
    if json:
        print_json([table.as_json() for table in tables])
        return
    if not tables:
        print("No results yet. `vlm-dist finetune TASK` or `vlm-dist evaluate TASK` makes some.")
    for table in tables:
        _print(table)


def _print(table: "TaskTable") -> None:
    from rich.text import Text

    from jobs.compare import METRICS
    from jobs.paper import VLM
    from vlm_dist.cli.output import print_table

    def cell(row: "Row", metric: str) -> str:
        value = row.values.get(metric)
        if value is None:
            return "-"
        _, factor, digits = METRICS[metric]
        spread = "" if value.spread is None else f" ± {value.spread * factor:.{digits}f}"
        return f"{value.mean * factor:.{digits}f}{spread}"

    def line(row: "Row") -> list[Text]:
        own = row.source == "paper" and row.label.startswith(VLM)
        label = f"paper: {row.label}" if row.source == "paper" else row.label
        style = "bold green" if row.source == "ours" else "bold" if own else "dim"
        return [Text(text, style=style) for text in (label, *(cell(row, m) for m in table.metrics), str(row.n or ""))]

    columns = ("", *(METRICS[metric][0] for metric in table.metrics), "n")
    print_table(columns, [line(row) for row in table.rows], title=table.title, right=columns[1:])
