"""`vlm-dist doctor`: is everything there?"""

from typing import TYPE_CHECKING

import typer

from vlm_dist.cli.options import HERE, Json, Overrides, Workspace

if TYPE_CHECKING:
    from cluster.doctor import Check
    from vlm_dist.config import Resolved


def doctor(workspace: Workspace = HERE, overrides: Overrides = None, json: Json = False) -> None:
    """Check this machine and this workspace; exit code 1 when something needed is missing.

    Each line says what was found and, where it matters, what to do.

    \b
    Examples:
      vlm-dist doctor
      vlm-dist doctor --json
    """
    from rich.text import Text

    from cluster.doctor import check_machine
    from vlm_dist.cli.output import print_error, print_json, print_table
    from vlm_dist.config import load_settings

    resolved = load_settings(workspace, overrides)
    checks = [*check_machine(resolved.folder), _packages(), *_settings(resolved)]
    missing = [check.name for check in checks if check.state == "missing"]
    if json:
        print_json([check.as_json() for check in checks])
    else:
        styles = {"ok": "green", "warning": "yellow", "missing": "bold red"}
        rows = [(c.name, Text(c.state, style=styles[c.state]), c.found, c.advice) for c in checks]
        print_table(("what", "state", "found", "what to do"), rows)
    if missing:
        print_error(f"needed and not there: {', '.join(missing)}")
        raise typer.Exit(1)
    if not json:
        print("Everything needed is there.")


def _packages() -> "Check":
    from cluster.doctor import Check
    from vlm_dist.cli.packages import check_owners, check_packages
    from vlm_dist.errors import ConfigError

    try:
        check_owners()
        return Check("our packages", "ok", str(check_packages()))
    except ConfigError as error:
        return Check("our packages", "missing", str(error), "use an environment of its own")


def _settings(resolved: "Resolved") -> "list[Check]":
    """Files that the settings name; a default that is not there yet is no fault."""
    from pathlib import Path

    from cluster.doctor import Check
    from cluster.mlflow_server import check_uri
    from vlm_dist.errors import ConfigError

    settings = resolved.settings
    files = {
        "store": (settings.store, "`vlm-dist extract VIDEOS` makes it"),
        "captions_file": (settings.captions_file, "set it to the caption file of your videos"),
        "extract.weights": (settings.extract.weights, "S3D weights: s3d_howto100m.pth, or `--random-weights SEED`"),
        **{
            f"data.{task}.data": (data.data, "set it to the task's annotations") for task, data in settings.data.items()
        },
        **{
            f"split.exclude #{n}": (path, "set it to lists of video ids")
            for n, path in enumerate(settings.split.exclude)
        },
    }
    checks: list[Check] = []
    for key, (path, advice) in files.items():
        set_here = resolved.origins.get(key.partition(" ")[0], "default") != "default"
        if path and Path(path).exists():
            checks.append(Check(key, "ok", path))
        elif path:
            checks.append(
                Check(key, "missing" if set_here and key != "store" else "warning", f"{path} is not there", advice)
            )
        elif key == "extract.weights":
            checks.append(Check(key, "warning", "not set", advice))
    if settings.cluster.tracking_uri:
        try:
            checks.append(Check("cluster.tracking_uri", "ok", check_uri(settings.cluster.tracking_uri)))
        except ConfigError as error:
            checks.append(Check("cluster.tracking_uri", "missing", str(error), "give an http address, or none"))
    return checks
