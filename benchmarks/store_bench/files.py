"""Files of the benchmark: written durably, dropped from the page cache, and asked whether they are in it."""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def write_synced(path: Path, blocks: Iterable[np.ndarray]) -> None:
    """Write and fsync a file: only clean pages can be dropped."""
    with path.open("wb") as file:
        for block in blocks:
            file.write(block.data)
        file.flush()
        os.fsync(file.fileno())


def drop_from_cache(files: Iterable[Path]) -> None:
    """Ask the kernel to forget files; what is mapped or dirty stays."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def resident_share(files: Iterable[Path]) -> float:
    """Share of the files' pages that the page cache holds (mincore)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    resident = total = 0
    for path in files:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            pages = np.zeros(-(-len(view) // mmap.PAGESIZE), np.uint8)
            if libc.mincore(view.ctypes.data, len(view), pages.ctypes.data):
                raise OSError(ctypes.get_errno(), "mincore failed")
            resident, total = resident + int((pages & 1).sum()), total + len(pages)
            del view
    return resident / max(1, total)


def sync(folder: Path) -> None:
    """Fsync every file of a folder, so that no writeback goes on beside a measurement."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


def read_through(folder: Path) -> None:
    """Bring every file of a folder into the page cache."""
    buffer = bytearray(1 << 22)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
