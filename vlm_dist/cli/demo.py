"""`vlm-dist demo`: the whole way in a few minutes."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vlm_dist.cli.options import Json
from vlm_dist.cli.output import print_error, print_json, prose_on_stderr


def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Workspace of the demo.")] = Path("demo-workspace"),
    seed: Annotated[int, typer.Option(min=0, help="Decides the videos and the training.")] = 0,
    as_json: Json = False,
) -> None:
    """Render a small corpus, extract, pre-train, fine-tune and evaluate: under 6 minutes on 2 CPU cores, offline.

    An interrupted demo goes on where it was; a finished one shows its table again.

    \b
    Examples:
      vlm-dist demo
      vlm-dist demo /tmp/demo --seed 1
    """
    from vlm_dist.demo.run import run_demo

    with prose_on_stderr(as_json):
        result = run_demo(folder.absolute(), seed)
    if as_json:
        print_json({**asdict(result), "learned": result.learned})
    if not result.learned:
        print_error("the model did not learn what it should have: please report this with the table above")
        raise typer.Exit(1)
