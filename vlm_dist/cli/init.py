"""`vlm-dist init`: a workspace."""

from pathlib import Path
from typing import Annotated

import typer


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The workspace; made when it is not there.")] = Path(),
) -> None:
    """Make a workspace: a folder with a vlm-dist.toml that names every setting, its meaning and its default.

    Nothing is overwritten. Commands work in a folder without that file too, with the defaults.

    \b
    Examples:
      vlm-dist init
      vlm-dist init my-project && cd my-project
    """
    from vlm_dist.config import FILE
    from vlm_dist.config_file import template
    from vlm_dist.errors import ConfigError

    path = folder / FILE
    if path.exists():
        raise ConfigError(f"{path} is there already and was left as it is; edit it, or give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(template(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"no workspace can be made at {folder}: {error.strerror}; give another folder") from None
    print(f"Wrote {path}. Put your videos, captions and S3D weights into it, or give them as flags.")
    print("Next: `vlm-dist doctor`, then `vlm-dist extract VIDEOS --captions captions.json`.")
