"""The `vlm-dist` program: its commands, its one error handler, its exit codes.

To add a command, write `vlm_dist/cli/NAME.py` with one function (Typer reads its signature and docstring) or one
`typer.Typer`, and add a line to `COMMANDS`. A module is imported when its command is called: `--help` stays quick.
"""

import contextlib
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Generator
from types import FrameType
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from vlm_dist import __version__
from vlm_dist.cli.output import outlive_readers, print_error, print_interrupted, print_warning
from vlm_dist.cli.packages import check_packages
from vlm_dist.errors import VlmDistError


class Entry(NamedTuple):
    """Where a command lives, its line in the overview, and the group that it stands in."""

    target: str
    help: str
    panel: str


_START, _DATA, _MODEL, _RUNS = "Start", "Videos to features", "Features to results", "Runs"

COMMANDS = {
    "init": Entry("vlm_dist.cli.init:init", "Make a workspace: a commented vlm-dist.toml.", _START),
    "demo": Entry("vlm_dist.cli.demo:demo", "The whole way in minutes, on a corpus that it renders.", _START),
    "doctor": Entry("vlm_dist.cli.doctor:doctor", "Check this machine and this workspace.", _START),
    "config": Entry("vlm_dist.cli.config:app", "Show the settings and where each comes from.", _START),
    "extract": Entry("vlm_dist.cli.extract:extract", "Videos and captions -> a feature store.", _DATA),
    "captions": Entry("vlm_dist.cli.captions:captions", "Captions -> a feature store, or tokenised again.", _DATA),
    "store": Entry("vlm_dist.cli.store:app", "A feature store: info, verify, failures, import, export.", _DATA),
    "pretrain": Entry("vlm_dist.cli.pretrain:pretrain", "A feature store -> a pre-trained model.", _MODEL),
    "finetune": Entry("vlm_dist.cli.finetune:finetune", "A pre-trained model -> an end task.", _MODEL),
    "checkpoint": Entry("vlm_dist.cli.checkpoint:app", "A run's checkpoints: list, verify, export, prune.", _MODEL),
    "evaluate": Entry("vlm_dist.cli.evaluate:evaluate", "A model -> metrics on an end task.", _MODEL),
    "jobs": Entry("vlm_dist.cli.jobs:app", "List the runs of this workspace.", _RUNS),
    "compare": Entry("vlm_dist.cli.compare:compare", "Put runs beside the paper's numbers.", _RUNS),
    "ui": Entry("vlm_dist.cli.ui:ui", "Open MLflow's pages on this workspace's runs.", _RUNS),
}


def load_command(name: str) -> Any:
    """Import the module of a command and build the command from it."""
    module, _, attribute = COMMANDS[name].target.partition(":")
    target = getattr(importlib.import_module(module), attribute)
    if not isinstance(target, typer.Typer):
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(name)(target)
        target = single
    return typer.main.get_command(target)


class _LazyCommand(TyperCommand):
    """A name and a help line until it is called; then the command of its module."""

    def __init__(self, name: str, entry: Entry) -> None:
        super().__init__(name=name, help=entry.help, rich_help_panel=entry.panel)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return load_command(self.name or "").make_context(info_name, args, parent=parent, **extra)


class _Commands(TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {name: _LazyCommand(name, entry) for name, entry in COMMANDS.items()}

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _interruptible():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _interruptible():
            return super().invoke(ctx)


@contextlib.contextmanager
def _interruptible() -> Generator[None]:
    """Our line and exit code at Ctrl-C: Typer would end without a word."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(print_interrupted()) from None


app = typer.Typer(cls=_Commands, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vlm-dist {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error (stands anywhere in the line)."),
) -> None:
    """Pre-train, fine-tune and compare the video-language model VLM.

    Videos become features in a store, features and captions become a model,
    the model is measured on end tasks, and MLflow keeps every run.
    Start with `vlm-dist init`.
    """


# Typer may carry its own copy of Click; this is the base of usage errors in either case.
_UsageError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")


def main(argv: list[str] | None = None) -> int:
    """Run one command line; the exit code is 0 done, 1 failed, 2 wrong usage or config, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    _prepare_process()
    try:
        check_packages()
        code = app(arguments, prog_name="vlm-dist", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return print_interrupted()
    except typer.Abort:
        print_error("aborted")
    except _UsageError as error:
        return _wrong_usage(error)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, VlmDistError):
            print_error(str(error))
            return error.exit_code
        if isinstance(error, OSError) and error.filename and error.strerror:
            print_error(f"{os.fsdecode(error.filename)}: {error.strerror}")
            return 1
        hint = "" if debug else " (run with --debug for the traceback)"
        print_error(f"unexpected {type(error).__name__}: {str(error).strip() or 'no message'}{hint}")
    return 1


def _wrong_usage(error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":  # a bare group: its help is the answer
        print(error.message, file=sys.stderr, end="\n" * bool(error.message))
        return error.exit_code
    where = error.ctx.command_path if error.ctx else "vlm-dist"
    print_error(f"{error.format_message()} (`{where} --help` shows what there is)")
    return error.exit_code


class _Warnings(logging.Handler):
    """What the packages log as a warning (a tracking server out of reach), as our yellow line."""

    def emit(self, record: logging.LogRecord) -> None:
        print_warning(record.getMessage())


def _prepare_process() -> None:
    # A stray jobs.py or cluster.py in the user's folder must not be imported instead of ours, by children either.
    os.environ.setdefault("PYTHONSAFEPATH", "1")

    def terminate(number: int, frame: FrameType | None) -> None:
        # As Ctrl-C does: context managers run, the run is marked killed.
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    outlive_readers()
    logging.getLogger("vlm_dist").handlers = [_Warnings(logging.WARNING)]
