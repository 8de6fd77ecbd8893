"""Facts about a run that nobody can find out later: code version, library versions, machine, process."""

import getpass
import os
import shlex
import socket
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import vlm_dist
from cluster.processes import boot_id, start_mark
from cluster.resources import this_machine

PREFIX = "vlm_dist."
_LIBRARIES = ("torch", "transformers", "ray", "deepspeed", "zarr", "mlflow")


def run_facts() -> dict[str, str]:
    """Tags that every run carries (commit, versions, hardware, process)."""
    commit, dirty = git_state()
    facts = {
        "git_commit": commit or "unknown",
        "git_dirty": str(dirty).lower() if commit else "unknown",
        "versions": library_versions(),
        "hardware": str(this_machine()),
        "host": socket.gethostname(),
        "boot": boot_id(),
        "pid": str(os.getpid()),
        "pid_start": start_mark(os.getpid()),
        "command": command_line(),
    }
    tags = {f"{PREFIX}{name}": value for name, value in facts.items()}
    tags |= {"mlflow.source.name": command_line(), "mlflow.source.type": "LOCAL", "mlflow.user": _user()}
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def command_line() -> str:
    """The command as a person would type it."""
    program = "vlm-dist" if Path(sys.argv[0]).name in ("vlm-dist", "__main__.py") else sys.argv[0]
    return shlex.join([program, *sys.argv[1:]])


@cache
def git_state() -> tuple[str, bool]:
    """Commit of this code and whether it was changed since; ("", False) when it runs from no checkout of its own."""
    package = Path(vlm_dist.__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=package, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # an environment inside another project's checkout is not it
        commit = git("rev-parse", "HEAD")
        return commit, bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return "", False


@cache
def library_versions() -> str:
    """Versions of this package and of the libraries that decide results."""
    found = [f"vlm-dist {vlm_dist.__version__}", f"python {sys.version.split()[0]}"]
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
