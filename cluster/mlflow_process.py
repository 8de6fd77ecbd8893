"""The process of the workspace's MLflow server: makes the database when there is none, then serves it.

MLflow makes a new database by some sixty migrations, and one that was stopped among them can never be opened again. So
it is made under another name and gets its own when it is whole; what a stopped start has left is thrown away.
"""

import os
import sys
from pathlib import Path

from mlflow.cli import cli

DATABASE = "mlflow.db"
_MAKING = f"{DATABASE}.new"


def make_database() -> None:
    """Put a whole, empty database into the current folder, unless there is one."""
    if os.path.lexists(DATABASE):
        return
    for left in Path().glob(f"{_MAKING}*"):  # with its journal, which would be played into the new one
        left.unlink()
    cli(["db", "upgrade", f"sqlite:///{_MAKING}"], standalone_mode=False)
    os.replace(_MAKING, DATABASE)


if __name__ == "__main__":
    make_database()
    # Relative to the state folder: no quoting of odd paths in a URL, and the workspace may be moved.
    cli(["server", "--backend-store-uri", f"sqlite:///{DATABASE}", *sys.argv[1:]])
