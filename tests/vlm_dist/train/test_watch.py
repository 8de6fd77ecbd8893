"""A rank that hangs ends itself with its stacks on disk; one that is slow, or pauses, does not."""

import multiprocessing as mp
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_dist.train.watch import EXIT_CODE, Watch


def _waits_for_nothing() -> None:
    time.sleep(60)


def _hangs(watch: Watch) -> None:
    for _ in range(6):
        watch.beat()
    _waits_for_nothing()


def _slow_from_the_start(watch: Watch) -> None:
    """The first may take ten times the limit, later ones ten times these."""
    for _ in range(5):
        time.sleep(0.6)
        watch.beat()
    time.sleep(1)


def _pauses(watch: Watch) -> None:
    for _ in range(6):
        watch.beat()
    with watch.paused():
        time.sleep(1.5)
    watch.beat()


def _watched(what: Callable[[Watch], None], folder: Path, said: Any) -> None:
    with Watch(folder, 3, 0.4, said.put) as watch:
        what(watch)


def _run(what: Callable[[Watch], None], folder: Path) -> tuple[int | None, Any]:
    """Exit code of a process of its own (a hang would end this one), and what it said."""
    context = mp.get_context("fork")
    said = context.SimpleQueue()
    process = context.Process(target=_watched, args=(what, folder, said))
    process.start()
    process.join(30)
    return process.exitcode, said


def test_a_hang_ends_with_stacks(tmp_path: Path) -> None:
    code, said = _run(_hangs, tmp_path / "stacks")
    assert code == EXIT_CODE
    (file,) = (tmp_path / "stacks").iterdir()
    assert "rank 3 made no progress" in file.read_text()
    assert "_waits_for_nothing" in file.read_text()
    assert str(file) in said.get()


@pytest.mark.parametrize("what", [_slow_from_the_start, _pauses])
def test_what_is_slow_or_pauses_is_no_hang(tmp_path: Path, what: Callable[[Watch], None]) -> None:
    assert _run(what, tmp_path)[0] == 0
    assert not list(tmp_path.iterdir())
