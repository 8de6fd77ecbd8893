"""Processes told apart for good (a number is reused, a number with its start time is not), and their signals."""

import contextlib
import os
import signal
import threading
from collections.abc import Generator
from pathlib import Path

import psutil

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def interrupts_wait() -> Generator[None]:
    """Hold SIGINT and SIGTERM back until the end of the block, for cleaning up that must not stop half-way."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever interrupted
        return
    held: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: held.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if held:
        signal.raise_signal(held[0])


def start_mark(pid: int) -> str:
    """Start time of a living process as an opaque text; empty when there is none (a zombie counts as none)."""
    try:
        # Linux counts ticks since boot, which no later change of the clock can move.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return ""
    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.0f}"
    except psutil.NoSuchProcess:
        return ""


def is_alive(pid: int, mark: str) -> bool:
    """Whether the very process that had this number and start mark still runs on this machine."""
    return bool(mark) and start_mark(pid) == mark


def boot_id() -> str:
    """What changes with every boot of the machine, and with nothing else."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else f"{psutil.boot_time():.0f}"


def group_members(group: int) -> list[int]:
    """Living processes of a process group."""
    members: list[int] = []
    for pid in psutil.pids():
        try:
            if os.getpgid(pid) == group and start_mark(pid):
                members.append(pid)
        except ProcessLookupError:
            continue
    return members
