"""What the store's files share (under the storage): checksums, sealed JSON, fsync, full disks."""

import errno
import json
import os
import resource
import shutil
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import numpy as np

from vlm_dist.errors import StoreError, StoreUnreachableError

SCRATCH, VOIDED = "_staging", "_voided"  # the store's folders of unfinished things, and of what repairs took out
OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
Parsed = TypeVar("Parsed")
_SEAL = b'{"crc32c":"%08x","body":'
_SEAL_LENGTH = len(_SEAL % 0)


def crc32c(data: bytes | np.ndarray, start: int = 0) -> int:
    """CRC-32C (Castagnoli) of bytes or of a C-contiguous array, continued from the checksum `start`; no copy."""
    return google_crc32c.extend(start, data)  # type: ignore[arg-type]


def no_plain_file(path: Path) -> str:
    """Why there is no file to be read at a path; empty where there is one. Opening a pipe would wait for its writer."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "is not there"
    if stat.S_ISREG(mode):
        return ""
    return "is a folder" if stat.S_ISDIR(mode) else "is no plain file, but a pipe, a socket or a device"


def read_file(path: Path) -> bytes:
    """A file's bytes. A folder in its place has none, so that it counts as a damaged file, and is mended as one."""
    try:
        return path.read_bytes()
    except IsADirectoryError:
        return b""


def file_crc32c(path: Path) -> int:
    """CRC-32C of a file, a block in memory at a time."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = crc32c(block, crc)
    return crc


def fsync_dir(folder: Path) -> None:
    """Makes the names in a folder durable (POSIX: renames and links live in the folder, not in the file)."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durable(path: Path, data: bytes) -> None:
    """Writes and fsyncs one file; for files in scratch folders that nobody reads yet."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def seal(body: dict[str, Any]) -> bytes:
    """JSON that carries the crc32c of its own body, so that one flipped bit in it cannot pass."""
    raw = json.dumps(body, separators=(",", ":"), sort_keys=True).encode()
    return _SEAL % crc32c(raw) + raw + b"}\n"


def unseal(data: bytes, where: Path | str) -> dict[str, Any]:
    """What `seal` was given, from what it made; StoreError that names `where` if a byte of it differs."""
    body = data[_SEAL_LENGTH:-2]
    if data[:_SEAL_LENGTH] != _SEAL % crc32c(body) or data[-2:] != b"}\n":
        why = "crc32c differs" if data else "it is empty, or a folder"
        raise StoreError(f"{where} is damaged ({why}); run `vlm-dist store verify --repair` on the store")
    return json.loads(body)


def unseal_as(what: str, data: bytes, where: Path | str, parse: Callable[[dict[str, Any]], Parsed]) -> Parsed:
    """What `parse` makes of a sealed body. A seal does not say what it seals: any sealed file may lie in any place.

    Raises:
        StoreError: names `where`; a byte differs, or it is something else than `what`.
    """
    try:
        return parse(unseal(data, where))
    except StoreError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"{where} is damaged: it is not {what} (another file was put in its place, or another version wrote it); "
            "run `vlm-dist store verify --repair` on the store"
        ) from error


@contextmanager
def disk_guard(path: Path, needed: int) -> Generator[None]:
    """Turns a full disk, a quota or a limit of file sizes into a StoreError that says which path and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise StoreError(
                f"{path} would be larger than files may be here: raise the limit (`ulimit -f`, or the file system's) "
                "and run the same command again: what was committed is kept"
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder = next(folder for folder in path.parents if folder.exists())
        free = shutil.disk_usage(folder).free
        raise StoreError(
            f"the disk of {path} is full: {needed:,} bytes are needed there and {free:,} are free. "
            "Free some space and run the same command again: what was committed is kept"
        ) from error


@contextmanager
def descriptor_guard(where: Path | str) -> Generator[None]:
    """Turns exhausted file descriptors into a StoreError that says which limit to raise."""
    try:
        yield
    except OSError as error:
        if error.errno not in OUT_OF_DESCRIPTORS:
            raise
        limit = f"this process may have {resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,}: raise it with `ulimit -n`"
        if error.errno == errno.ENFILE:
            limit = "no process of the machine gets more: raise `sysctl fs.file-max`, or lower others' `ulimit -n`"
        raise StoreUnreachableError(f"{where} cannot be opened, as too many files are open; {limit}") from error
