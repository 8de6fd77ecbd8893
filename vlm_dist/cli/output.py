"""What commands print: results on stdout (tables or JSON), errors and progress on stderr."""

import io
import json
import os
import sys
import time
import unicodedata
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

_PLAIN_EVERY_S = 5.0
_CONTROL = ("Cc", "Zl", "Zp")  # Unicode's control characters, and what ends a line or paragraph


def print_error(message: str) -> None:
    """One red line on stderr."""
    _styled(f"error: {message}", "bold red")


def print_interrupted() -> int:
    """What ends a command at Ctrl-C; returns its exit code."""
    print_error("interrupted; what was finished is kept, and the same command goes on from there")
    return 130


def print_warning(message: str) -> None:
    """One yellow line on stderr."""
    _styled(f"warning: {message}", "yellow")


def print_status(message: str) -> None:
    """One plain line on stderr before something that takes long and shows no progress."""
    _styled(message, "")


def outlive_readers() -> None:
    """Let stdout and stderr go nowhere from the moment that their reader leaves: `| head` must not fail a run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Not where a caller has put something else in its place, which belongs to nobody's pipe.
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            raw = _Pipe(stream.fileno(), "w", closefd=False)
            text = io.TextIOWrapper(
                io.BufferedWriter(raw),
                stream.encoding,
                stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, text)


class _Pipe(io.FileIO):
    """A descriptor that becomes /dev/null when nobody reads it any more (for the libraries below Python too)."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


def print_json(value: Any) -> None:
    """A result for machines, on stdout; not-a-number becomes null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str))


@contextmanager
def prose_on_stderr(wanted: bool) -> Generator[None]:
    """Send what the block prints to stderr, so that stdout holds nothing but the JSON that follows."""
    with redirect_stdout(sys.stderr) if wanted else nullcontext():
        yield


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "", right: Iterable[str] = ()
) -> None:
    """A table on stdout; columns named in `right` are right-aligned; texts are never read as markup,
    and their control characters are shown escaped."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in set(right) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(visible(str(cell))) for cell in row))
    # A pipe or a file has no width: rows must not be folded to 80 columns there.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def visible(text: str) -> str:
    r"""A text of others with its control characters escaped (`\n`, `\x1b`): one line, and no command to a terminal."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _CONTROL else c for c in text)


def counted(count: int, noun: str) -> str:
    """A number with its noun: `1 video`, `2 videos`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def duration(seconds: float) -> str:
    """Seconds as people read them: `45 s`, `12 min 05 s`, `3 h 20 min`, `4 d 02 h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


class Progress:
    """Progress of one long piece of work; see `progress`."""

    def __init__(self, title: str, total: float | None, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0.0
        self.note = ""
        self.started = time.monotonic()

    def update(self, done: float, note: str = "", total: float | None = None) -> None:
        """Say how far the work is; `note` stands at the end of the line (`1.2 videos/s`)."""
        self.done, self.note = done, note
        self.total = self.total if total is None else total
        self.show()

    def show(self) -> None:
        """Draw the state; the two forms below say how."""

    def text(self) -> str:
        """The state as one plain line."""
        elapsed = time.monotonic() - self.started
        of = f"/{self.total:g} {self.unit}" if self.total else f" {self.unit}"
        share = f" ({100 * self.done / self.total:.0f} %)" if self.total else ""
        left = f", {duration(elapsed / self.done * (self.total - self.done))} left" if self.total and self.done else ""
        note = f", {self.note}" if self.note else ""
        return f"{self.title}: {self.done:g}{of}{share} after {duration(elapsed)}{left}{note}"


class _PlainProgress(Progress):
    """A line every few seconds, for logs and pipes."""

    _shown = 0.0

    def show(self) -> None:
        now = time.monotonic()
        if now - self._shown >= _PLAIN_EVERY_S:
            self._shown = now
            print(self.text(), file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: float | None = None, unit: str = "") -> Generator[Progress]:
    """Show the progress of the block on stderr: a bar on a terminal, plain lines every few seconds elsewhere.

    with progress("extract", total=80, unit="videos") as bar:
        bar.update(3, "1.2 videos/s")
    """
    if not sys.stderr.isatty():
        plain = _PlainProgress(title, total, unit)
        yield plain
        print(plain.text(), file=sys.stderr, flush=True)
        return
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=30),
        rich_progress.TextColumn("{task.completed:g}" + ("/{task.total:g} " if total else " ") + unit),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[note]}"),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True, highlight=False)) as bar:
        task = bar.add_task(title, total=total, note="")

        class _Bar(Progress):
            def show(self) -> None:
                bar.update(task, completed=self.done, total=self.total, note=self.note)

        yield _Bar(title, total, unit)


def _styled(line: str, style: str) -> None:
    from rich.console import Console
    from rich.text import Text

    parts = [part.strip() for part in line.splitlines() if part.strip()]
    ends = ["" if part.endswith((":", ";", ",", ".")) else ";" for part in parts[:-1]]
    one_line = " ".join(part + end for part, end in zip(parts, [*ends, ""], strict=True))
    Console(stderr=True, highlight=False).print(Text(one_line, style=style), soft_wrap=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return None
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value
