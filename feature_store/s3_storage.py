"""A feature store in a bucket: conditional PUT where a folder has hard links, server-side copy where it has rename.

Credentials, region and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, …) or from
the machine's role, as obstore reads them. The place must have conditional PUT (If-None-Match, If-Match), as Amazon S3,
Cloudflare R2, MinIO and Ceph have.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import json
import os
import re
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import S3Store

from feature_store.files import crc32c, file_crc32c
from feature_store.node_cache import keep_tree
from feature_store.node_files import usable
from feature_store.node_scratch import node_folder, temporary_folder
from feature_store.published import Location, Tree, in_order
from vlm_dist.errors import ConfigError, StoreError, StoreUnreachableError, VlmDistError

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta  # there for type checkers only

_AT_ONCE = 16  # requests in flight, and objects read ahead
_PART_BYTES = 16 << 20

_NO_BUCKET = "Make the bucket first, which no command here does; or mend the address"
_ENVIRONMENT = (
    "The environment says how: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, and AWS_ENDPOINT_URL (with "
    "AWS_ALLOW_HTTP=true for http)"
)

_used_by: int | None = None  # the process whose client threads are alive


class S3Storage:
    """A `Storage` at s3://bucket/prefix."""

    def __init__(self, address: str) -> None:
        bucket, _, prefix = address.removeprefix("s3:").strip("/").partition("/")
        if not bucket:
            raise ConfigError(f"{address}: an S3 store is s3://bucket/prefix")
        self._address = f"s3://{bucket}/{prefix}".rstrip("/")
        with self._errors():
            self._client = S3Store(bucket, prefix=prefix or None)

    @property
    def address(self) -> str:
        """s3://bucket/prefix."""
        return self._address

    def read(self, key: str) -> bytes:
        with self._errors(key):
            return obstore.get(self._client, key).bytes().to_bytes()

    def read_many(self, keys: Sequence[str]) -> Iterator[bytes]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for start in range(0, len(keys), _AT_ONCE):
                yield from pool.map(self.read, keys[start : start + _AT_ONCE])

    def size(self, key: str) -> int | None:
        try:
            with self._errors(key):
                return int(obstore.head(self._client, key)["size"])
        except FileNotFoundError:
            return None

    def tag(self, key: str) -> str | None:
        """A text that another content of the object would not have; None where there is no object."""
        try:
            with self._errors(key):
                found = obstore.head(self._client, key)
        except FileNotFoundError:
            return None
        return f"{found['e_tag']} {found['size']}"

    def sizes(self, folder: str) -> dict[str, int]:
        return {found["path"]: found["size"] for found in self._listed(folder)}

    def changed(self, key: str) -> float:
        with self._errors(key):
            try:
                found = [obstore.head(self._client, key)]
            except FileNotFoundError:
                found = self._listed(f"{key}/")
        return max((item["last_modified"].timestamp() for item in found), default=time.time())

    def _listed(self, folder: str) -> "Iterator[ObjectMeta]":
        with self._errors(folder):
            for batch in obstore.list(self._client, prefix=folder or None):
                yield from batch

    def names(self, folder: str) -> list[str]:
        with self._errors(folder):
            listed = obstore.list_with_delimiter(self._client, prefix=folder or None)
        paths = [*listed["common_prefixes"], *(found["path"] for found in listed["objects"])]
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def create(self, key: str, data: bytes, guard: str = "") -> bool:
        if guard and self.size(guard) is None:
            raise FileNotFoundError(guard)
        try:
            with self._errors(key):
                self._put(key, data, "create")
        except (AlreadyExistsError, PreconditionError):
            # The answer to a request that did it may be lost; the client asks again and is told that it is too late.
            return self.read(key) == data
        return True

    def replace(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self._put(key, data, "overwrite")

    def swap(self, key: str, before: bytes | None, data: bytes) -> bool:
        if before is None:
            return self.create(key, data)
        try:
            with self._errors(key):
                found = obstore.get(self._client, key)
                etag = found.meta["e_tag"]
                if found.bytes().to_bytes() != before:
                    return False
                self._put(key, data, {"e_tag": str(etag)})
        except (FileNotFoundError, PreconditionError):
            return False
        return True

    def move(self, key: str, target: str) -> bool:
        if self._move([key], key, target):
            return True
        return self._move(in_order(found["path"] for found in self._listed(f"{key}/")), key, target)

    def _move(self, sources: Sequence[str], key: str, target: str) -> bool:
        """Copies all, then removes all: a kill leaves a folder that is still seen there, and moved again."""
        try:
            with self._errors(key):
                for source in sources:
                    obstore.copy(self._client, source, target + source.removeprefix(key))
                for source in sources:
                    obstore.delete(self._client, source)
        except FileNotFoundError:  # somebody else has moved it
            return False
        return bool(sources)

    def sync(self, folder: str) -> None:
        pass  # what a bucket has answered for is durable

    def remove(self, key: str) -> None:
        with self._errors(key):
            keys = [key, *self.sizes(key + "/")]
            obstore.delete(self._client, keys)

    def prepare(self, folders: Sequence[str]) -> None:
        pass  # a bucket has no folders

    def scratch(self, name: str) -> Path:
        return node_folder(name)

    def upload(self, path: Path, key: str) -> None:
        with self._errors(key):
            obstore.put(self._client, key, path, chunk_size=_PART_BYTES, mode="overwrite")
        path.unlink()

    def publish(self, folder: Path, key: str) -> bool:
        place = f"{key}.{uuid.uuid4().hex}"
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        told = {name: (path.stat().st_size, file_crc32c(path)) for name, path in files.items()}
        for name, path in files.items():
            self.upload(path, f"{place}/{name}")
        if self.create(Location.key(key), Location(place, told).sealed()):
            return True
        self.remove(place)
        return False

    def tree(self, key: str) -> Tree:
        name, fetch = self._published(key)
        return keep_tree(self._address, name, fetch)

    @contextmanager
    def copied(self, key: str) -> Generator[Path]:
        fetch = self._published(key)[1]
        with temporary_folder() as folder:
            with usable(folder):
                fetch(folder / "copy")
            yield folder / "copy"

    def _published(self, key: str) -> tuple[str, Callable[[Path], None]]:
        """A name for a published folder and what is in it, and what fetches it as a local one."""
        if location := Location.of(self, key):  # its folder's name is never used again
            return location.folder, lambda folder: self._fetch(location.folder, location.files, folder)
        found = sorted(self._listed(f"{key}/"), key=lambda item: item["path"])
        if not found:
            raise FileNotFoundError(key)
        # A copy that is at work may be completed later: another listing has another name.
        files = {item["path"].removeprefix(f"{key}/"): (item["size"], None) for item in found}
        content = json.dumps([[*files.items()], [item["e_tag"] for item in found]])
        return f"{key}.{crc32c(content.encode()):08x}", lambda folder: self._fetch(key, files, folder)

    def _fetch(self, place: str, files: Mapping[str, tuple[int, int | None]], folder: Path) -> None:
        folder.mkdir()
        for name, (size, crc) in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                got = self.download(f"{place}/{name}", folder / name)
                wrong = "" if got[0] == size and crc in (None, got[1]) else "is damaged (crc32c differs)"
            except FileNotFoundError:
                wrong = "is missing"
            if wrong:
                mend = "run `vlm-dist store verify --repair` on the store"
                raise StoreError(f"{self._address}/{place}/{name} {wrong}; {mend}")

    def download(self, key: str, path: Path) -> tuple[int, int]:
        """An object as a file, a piece in memory at a time (captions and videos are gigabytes); its bytes and crc32c.

        Raises:
            FileNotFoundError: no such object (or bucket).
            StoreUnreachableError: no access, no answer, or another content halfway through.
        """
        size = crc = 0
        with path.open("wb") as file:
            for data in self._pieces(key):
                file.write(data)
                size, crc = size + len(data), crc32c(data, crc)
        return size, crc

    def _pieces(self, key: str) -> Iterator[bytes]:
        with self._errors(key):
            found = obstore.get(self._client, key)
            size, etag = int(found.meta["size"]), found.meta["e_tag"]
            if size <= _PART_BYTES:
                yield found.bytes().to_bytes()
                return
            del found  # its body is not read
        # A request each: the client's time limits (30 s, with retries 180 s) count for a request, not for the object.
        for start in range(0, size, _PART_BYTES):
            options: GetOptions = {"range": (start, min(start + _PART_BYTES, size)), "if_match": etag}
            try:
                with self._errors(key):
                    yield obstore.get(self._client, key, options=options).bytes().to_bytes()
            except PreconditionError as error:
                raise StoreUnreachableError(
                    f"{self._address}/{key} was replaced while it was read; try again"
                ) from error

    def local(self, key: str) -> Path | None:
        return None

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Iterator[bytes]:
        if len(ranges) == 1:
            yield self._range(*ranges[0])
        elif ranges:
            with ThreadPoolExecutor(min(_AT_ONCE, len(ranges))) as pool:
                yield from pool.map(self._range, *zip(*ranges, strict=True))

    def _range(self, key: str, start: int, length: int) -> bytes:
        with self._errors(key):
            return obstore.get_range(self._client, key, start=start, length=length).to_bytes()

    def read_end(self, key: str, length: int) -> tuple[bytes, int, str]:
        with self._errors(key):
            found = obstore.get(self._client, key, options={"range": {"suffix": length}})
            return found.bytes().to_bytes(), int(found.meta["size"]), str(found.meta["e_tag"])

    def _put(self, key: str, data: bytes, mode: Literal["create", "overwrite"] | dict[str, str]) -> None:
        obstore.put(self._client, key, data, mode=mode, use_multipart=False)  # pyright: ignore[reportArgumentType]

    @contextmanager
    def _errors(self, key: str = "") -> Generator[None]:
        """One process's client in one process; its errors as ours."""
        global _used_by
        if _used_by not in (None, os.getpid()):
            raise StoreError(
                f"{self._address}: a process that was forked from one that uses S3 cannot use it (the client's threads "
                "are not in it); start such processes with spawn or forkserver"
            )
        _used_by = os.getpid()
        try:
            yield
        except (AlreadyExistsError, PreconditionError):
            raise
        except BaseError as error:
            reason = _reason(str(error))
            if "invalid path" in reason:
                raise ConfigError(f"{self._address}/{key} cannot be listed: {reason}; rename that object") from error
            advice = _NO_BUCKET if "NoSuchBucket" in reason else _ENVIRONMENT
            raise StoreUnreachableError(f"{self._address}/{key} cannot be reached: {reason}. {advice}") from error
        except VlmDistError:
            raise
        except ValueError as error:  # an empty part of a path, `..`, a line break: names that the client does not send
            raise ConfigError(
                f"{self._address}/{key}: the S3 client takes no such name ({error}); rename it"
            ) from error


def _reason(error: str) -> str:
    """What a service answered, or the client's own words without its inner workings."""
    if answer := re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", error, re.DOTALL):
        return f"{answer[1]}, {answer[2]}"
    return " ".join(error.partition("Debug source")[0].split())[:300].rstrip(". ")
