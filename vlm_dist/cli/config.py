"""`vlm-dist config show`: the settings that a command would run with."""

import typer

from vlm_dist.cli.options import HERE, Json, Overrides, Workspace

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _config() -> None:
    """Show the settings and where each comes from."""


@app.command()
def show(workspace: Workspace = HERE, overrides: Overrides = None, json: Json = False) -> None:
    """Print every setting as a command would see it, with where its value comes from.

    A flag goes before --set, that before the environment (VLM_DIST_TRAIN__OPTIM__LR=1e-4), that before vlm-dist.toml,
    that before the default.

    \b
    Examples:
      vlm-dist config show
      vlm-dist config show --set train.optim.lr=1e-4 --json
    """
    from vlm_dist.cli.output import print_json, print_table
    from vlm_dist.config import load_settings

    resolved = load_settings(workspace, overrides)
    if json:
        print_json(
            {key: {"value": v, "origin": resolved.origins[key]} for key, v in resolved.settings.items() if v != {}}
        )
        return
    rows = [(key, value, resolved.origins[key]) for key, value in resolved.settings.flat().items()]
    print_table(("setting", "value", "from"), rows)
