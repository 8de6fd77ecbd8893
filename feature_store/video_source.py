"""Where a video's bytes are: in a local file, or at s3://bucket/key, of which the node takes a copy (before decoding).

Decoding seeks, and FFmpeg has no S3: an object is copied, a piece in memory at a time, to the node's scratch, and the
copy goes when the video is through. Credentials and endpoint are those of a store in a bucket (s3_storage.py).
"""

import os
import stat
from collections.abc import Collection, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from feature_store.decode import DecodeError
from feature_store.node_files import usable
from feature_store.node_scratch import temporary_folder
from vlm_dist.errors import ConfigError, ExtractionError, StoreUnreachableError

if TYPE_CHECKING:
    from feature_store.s3_storage import S3Storage

_AT_ONCE = 16  # objects that are asked for
_LONGEST_SUFFIX = 16


def s3_address(path: Path | str) -> str | None:
    """s3://bucket/key of what a user typed, also of a Path, which leaves one slash of two; None for a local path.

    Raises:
        ConfigError: no bucket.
    """
    if not str(path).startswith("s3:/"):
        return None
    address = str(path).removeprefix("s3:").strip("/")
    if not address:
        raise ConfigError(f"{path}: an address in a bucket is s3://bucket/name")
    return f"s3://{address}"


def in_bucket(address: str) -> tuple["S3Storage", str]:
    """The bucket of an s3://bucket/key, and the key ("" for the whole bucket)."""
    bucket, _, key = address.removeprefix("s3://").partition("/")
    return _bucket(bucket), key


@lru_cache  # a client keeps its connections, and asks once for the credentials of a role
def _bucket(bucket: str) -> "S3Storage":
    from feature_store.s3_storage import S3Storage  # its client takes a while to import

    return S3Storage(f"s3://{bucket}")


@contextmanager
def local_video(path: str) -> Generator[Path]:
    """A video as a local file for the block: the file itself, or a copy of the object, which goes away.

    An ExtractionError of the block that names the copy is made to name the video. Of a local file nothing is checked
    here: `SecondsReader` says what is wrong with it.

    Args:
        path: A local path or s3://bucket/key, as a `PlannedVideo` has it.

    Raises:
        DecodeError: reason missing (no such object), or error (no such bucket, no access, no answer).
        StoreUnreachableError: this node's disk is full or not writable: says nothing of the video.
    """
    address = s3_address(path)
    if address is None:
        yield Path(path)
        return
    with temporary_folder() as folder:
        # The object's own name may be too long for a file, and only its ending tells FFmpeg anything.
        suffix = PurePosixPath(address).suffix
        copy = folder / f"video{suffix if len(suffix) <= _LONGEST_SUFFIX else ''}"
        with usable(copy), _as_decode_errors(address):
            storage, key = in_bucket(address)
            storage.download(key, copy)
        try:
            yield copy
        except ExtractionError as error:
            error.args = (str(error).replace(str(copy), address), *error.args[1:])
            raise


def video_identity(path: str) -> str:
    """A text that changes with the video: a file's size and mtime in ns, an object's ETag and size; "" without one.

    Raises:
        DecodeError: reason error: the bucket does not answer or gives no access.
    """
    address = s3_address(path)
    if address is not None:
        with _as_decode_errors(address):
            storage, key = in_bucket(address)
            return storage.tag(key) or ""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null in the path
        return ""
    return f"{status.st_size} {status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else ""


def existing(paths: Collection[str]) -> set[str]:
    """Those of several videos that are there; objects are asked for at once.

    Raises:
        DecodeError: as `video_identity`.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return {path for path, identity in zip(paths, pool.map(video_identity, paths), strict=True) if identity}


@contextmanager
def _as_decode_errors(address: str) -> Generator[None]:
    try:
        yield
    except FileNotFoundError as error:
        if error.filename is not None:
            raise  # of this node's disk
        if "NoSuchBucket" in str(error):
            raise DecodeError(
                f"{address}: there is no such bucket; is its name right, and AWS_ENDPOINT_URL?", "error"
            ) from error
        raise DecodeError(f"{address}: no such object", "missing") from error
    except (ConfigError, StoreUnreachableError) as error:  # a name that S3 can have and its client cannot; no access
        raise DecodeError(str(error), "error") from error
