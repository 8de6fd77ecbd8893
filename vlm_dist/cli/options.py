"""Options that several commands share, written once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Workspace = Annotated[
    Path,
    typer.Option(
        "--workspace", metavar="DIR", show_default=False, help="Folder with vlm-dist.toml and the runs (default: here)."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, like `--set train.seed=1`; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Open pickles, which can hold programs, restricted to plain data.")
]

TaskName = Annotated[str, typer.Argument(metavar="TASK", help="End task: retrieval, coin, segmentation.")]
Source = Annotated[
    str | None,
    typer.Option("--from", metavar="MODEL", help="Run, folder, BERT name, reference checkpoint, or scratch."),
]
Annotations = Annotated[
    Path | None, typer.Option("--data", help="Annotations (default: data.TASK.data of the settings).")
]
TaskStore = Annotated[Path | None, typer.Option("--store", help="Feature store of the annotated videos.")]
Nodes = Annotated[int, typer.Option("--nodes", min=1, help="Machines of the Ray cluster.")]
Gpus = Annotated[
    int | None, typer.Option("--gpus", min=0, help="GPUs of each machine; 0 trains on CPUs (default: all).")
]
CpuWorkers = Annotated[int, typer.Option("--workers", min=1, help="CPU workers when there are no GPUs.")]
Resume = Annotated[
    Literal["auto", "must", "never"],
    typer.Option(
        "--resume",
        help="This very run exists: go on with it, begin only where there is none; or refuse to begin; or "
        "leave it and train again.",
    ),
]

HERE = Path()
"""Default of `Workspace`."""
