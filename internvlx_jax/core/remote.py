"""Object stores behind URLs: clients, errors in one line, conditional writes, what they cost.

(design: platform.md 8)

fsspec has the clients, gcsfs for gs:// and s3fs for s3://. They retry requests that failed with
429, 500, 503, a cut body or a lost connection, with jitter. Listings are never cached: other hosts
write to the same folders.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import logging
import os
from collections.abc import Coroutine, Iterator
from typing import Any

import fsspec
import fsspec.asyn
import fsspec.config

from internvlx_jax.core.errors import ConfigError, did_you_mean
from internvlx_jax.core.extras import require

# One kind of client everywhere, whether TensorFlow is installed or not.
os.environ.setdefault("EPATH_USE_TF", "false")
# They log tracebacks of what is raised and explained below anyway.
for name in ("fsspec", "gcsfs", "google.auth._default"):
    logging.getLogger(name).setLevel(logging.CRITICAL)

SILENT_SECONDS = 60  # after which a request is sent again
PROBE_SECONDS = 20  # until a store that does not answer is an error
RETRIED = (408, 429, 500, 502, 503, 504)


class StorageError(OSError):
    """An object store refused or failed; the message is one line that names the path."""


@dataclasses.dataclass
class Traffic:
    """Counts the requests of this process to object stores, those of checkpoint arrays excluded.

    Attributes:
        requests: Requests sent, those that were sent again included.
        failed: Responses with an error that is tried again, and connections that broke.
        received, sent: Bytes of the bodies.
        last_error: The last response with an error, such as "401 Unauthorized"; empty without one.
    """

    requests: int = 0
    failed: int = 0
    received: int = 0
    sent: int = 0
    last_error: str = ""


TRAFFIC = Traffic()


def is_url(path: str | os.PathLike) -> bool:
    """Returns whether a path names a protocol."""
    return "://" in os.fspath(path)


def protocol_of(path: str | os.PathLike) -> str:
    """Returns the protocol of a URL, "gs" for both names of Google's; empty for a local path."""
    head, found, _ = os.fspath(path).partition("://")
    return ("gs" if head == "gcs" else head) if found else ""


def filesystem(path: str | os.PathLike) -> Any:
    """Returns fsspec's client (an AbstractFileSystem) for a URL.

    Raises:
        ConfigError: Nothing can read this protocol, or its package is not installed.
    """
    protocol = protocol_of(path)
    if protocol == "gs":
        require("gcsfs", extra="gcs", purpose=f"reading {path}")
        _configure("gcs", "gs", session_kwargs={"trace_configs": [_trace()]})
        _register_gcs()
    elif protocol == "s3":
        require("s3fs", extra="s3", purpose=f"reading {path}")
        _configure("s3", session=_counting_session())
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:  # fsspec knows the protocol, its package is not installed
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        known = ("gs", "s3", *fsspec.available_protocols())
        raise ConfigError(
            f"{path}: unknown protocol {protocol}://.{did_you_mean(protocol, known)} "
            f"({_first_line(error)})"
        ) from error


def _configure(*protocols: str, **options: Any) -> None:
    """Sets what every client of these protocols gets, also those that orbax makes."""
    for protocol in protocols:
        settings = fsspec.config.conf.setdefault(protocol, {})
        if "use_listings_cache" not in settings:
            settings |= {"use_listings_cache": False, **options}
            if protocol in ("gcs", "gs"):
                settings.setdefault("requests_timeout", _patience())


@functools.cache
def _register_gcs() -> None:
    """Gives orbax, too, a client that does not fail where the store has.

    A removal whose answer gets lost is sent again, and finds nothing. gcsfs raises
    FileNotFoundError if that holds for all objects, which up to 100 share one request for.

    An upload that is sent again leaves an error that refers to a view of the file's buffer. Python
    3.12 can crash when it collects both (CPython's issues 111049 and 111331).
    """
    from gcsfs import GCSFileSystem
    from gcsfs.core import GCSFile

    class Buffer(io.BytesIO):
        def getbuffer(self) -> memoryview:
            return memoryview(self.getvalue())  # of a copy

    class File(GCSFile):
        @property
        def buffer(self) -> Buffer:
            return self._buffer

        @buffer.setter
        def buffer(self, content: io.BytesIO) -> None:
            self._buffer = Buffer(content.getvalue())

    class Client(GCSFileSystem):
        def _open(
            self,
            path: Any,
            mode: str = "rb",
            block_size: int | None = None,
            consistency: Any = None,
            **options: Any,
        ) -> Any:
            kind = GCSFile if "r" in mode else File
            size, check = block_size or self.default_block_size, consistency or self.consistency
            return kind(self, path, mode, size, consistency=check, **options)

        async def _rm(self, path: Any, recursive: bool = False, **options: Any) -> Any:
            found = recursive and isinstance(path, str) and await self._exists(path)
            try:
                return await super()._rm(path, recursive=recursive, **options)
            except FileNotFoundError:
                if not found:
                    raise
                return []

        rm = fsspec.asyn.sync_wrapper(_rm)

    for protocol in ("gcs", "gs"):
        fsspec.register_implementation(protocol, Client, clobber=True)


def _patience() -> Any:
    """Returns time limits whose errors gcsfs tries again, unlike that of a whole request."""
    import aiohttp

    return aiohttp.ClientTimeout(total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)


def _trace() -> Any:
    """Returns what counts the requests of an aiohttp session."""
    import aiohttp

    async def answered(session: Any, context: Any, params: Any) -> None:
        TRAFFIC.requests += 1
        if params.response.status >= 400:
            TRAFFIC.last_error = f"{params.response.status} {params.response.reason}"
        if params.response.status in RETRIED:
            TRAFFIC.failed += 1

    async def broke(session: Any, context: Any, params: Any) -> None:
        TRAFFIC.requests += 1
        TRAFFIC.failed += 1
        TRAFFIC.last_error = _first_line(params.exception)

    async def received(session: Any, context: Any, params: Any) -> None:
        TRAFFIC.received += len(params.chunk)

    async def sent(session: Any, context: Any, params: Any) -> None:
        TRAFFIC.sent += len(params.chunk)

    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(answered)
    trace.on_request_exception.append(broke)
    trace.on_response_chunk_received.append(received)
    trace.on_request_chunk_sent.append(sent)
    return trace


@functools.cache
def _counting_session() -> Any:
    """Returns the session of all clients of s3://, which counts their requests."""
    from aiobotocore.session import get_session

    def sending(request: Any, **_: Any) -> None:
        TRAFFIC.requests += 1
        TRAFFIC.sent += int(request.headers.get("Content-Length") or 0)

    def answered(response_dict: Any, exception: Any, event_name: str, **_: Any) -> None:
        if exception is not None:  # the connection broke
            TRAFFIC.failed += 1
            TRAFFIC.last_error = _first_line(exception)
            return
        if ".Head" not in event_name:  # it states the length of what it does not send
            TRAFFIC.received += int(response_dict["headers"].get("Content-Length") or 0)
        if (status := response_dict["status_code"]) >= 400:
            TRAFFIC.last_error = str(status)
        TRAFFIC.failed += status in RETRIED

    session = get_session()
    session.register("before-send.s3", sending)
    session.register("response-received.s3", answered)
    return session


# --- errors ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def explained(path: str | os.PathLike, action: str = "read") -> Iterator[None]:
    """Turns what a client raises about a URL into errors of one line; local paths are left alone.

    Args:
        path: What is accessed.
        action: What failed, as a participle.

    Raises:
        FileNotFoundError: There is no such object.
        StorageError: Anything else, with its reason and remedy.
    """
    try:
        yield
    except (StorageError, ConfigError):
        raise
    except Exception as error:
        if not is_url(path) or not (reason := reason_of(error, path)):
            raise
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{path} does not exist") from error
        raise StorageError(f"{path} cannot be {action}: {reason}") from error


def reason_of(error: BaseException, path: str | os.PathLike) -> str:
    """Returns why an object store cannot be used, in one line; empty if the error is another kind.

    Clients have no errors in common, so their texts are looked at.
    """
    text, name = _first_line(error), type(error).__name__
    bucket = bucket_of(path)
    lower = f"{name} {text} {getattr(error, 'code', '')}".lower()
    module = type(error).__module__.partition(".")[0]
    if module not in (
        "gcsfs",
        "s3fs",
        "botocore",
        "aiobotocore",
        "google",
        "aiohttp",
        "fsspec",
    ) and (not isinstance(error, OSError | TimeoutError) and not _is_of_tensorstore(text)):
        return ""
    if any(word in lower for word in ("invalid credentials", "unauthenticated", "401", "refresh")):
        return (
            f"the credentials are not valid or have expired ({text}); log in again, e.g. "
            "`gcloud auth application-default login`, or renew the token"
        )
    if "credentials" in lower or "expiredtoken" in lower:
        return f"no valid credentials were found ({text}); log in, or set those of this host"
    if isinstance(error, PermissionError) or any(
        word in lower for word in ("forbidden", "permission_denied", "403", "access denied")
    ):
        return (
            f"permission denied ({text}); grant this account reading and writing of the bucket "
            f"{bucket}"
        )
    if "bucket" in lower and any(word in lower for word in ("not exist", "not found", "nosuch")):
        return f"there is no bucket {bucket} ({text}); correct the name, or make the bucket"
    return f"{text or name}; tried again without success"


def _is_of_tensorstore(text: str) -> bool:
    codes = ("PERMISSION_DENIED", "UNAUTHENTICATED", "NOT_FOUND", "UNAVAILABLE", "DATA_LOSS")
    codes += ("DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "FAILED_PRECONDITION")
    return any(code in text for code in codes)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__


def bucket_of(path: str | os.PathLike) -> str:
    """Returns "gs://bucket" of a URL."""
    text = os.fspath(path)
    head, _, rest = text.partition("://")
    return f"{head}://{rest.partition('/')[0]}"


def check_access(path: str | os.PathLike) -> None:
    """Asks once for a folder of an object store, so that a wrong one is an error at once.

    Raises:
        ConfigError: Its protocol cannot be used.
        StorageError: The bucket does not exist, may not be read, or does not answer.
    """
    client, text = filesystem(path), os.fspath(path)
    bucket, _, prefix = text.partition("://")[2].partition("/")
    protocol = protocol_of(path)
    if protocol == "gs":
        call = client._call("GET", "b/{}/o", bucket, prefix=prefix, maxResults=1)
    elif protocol == "s3":
        call = client._call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
    else:
        return
    try:
        _answer(path, client, call)
    except FileNotFoundError as error:
        raise StorageError(
            f"{path} cannot be used: there is no bucket {bucket_of(path)}; correct the name, or "
            "make the bucket"
        ) from error


def kind_of(path: str | os.PathLike) -> str:
    """Returns "file" or "directory"; nothing if a URL names neither.

    Raises:
        ConfigError: Its protocol cannot be used.
        StorageError: It may not be read, or the store does not answer.
    """
    client, text = filesystem(path), os.fspath(path)
    try:
        if isinstance(client, fsspec.asyn.AsyncFileSystem):
            return _answer(path, client, client._info(text))["type"]
        with explained(path):
            return client.info(text)["type"]
    except FileNotFoundError:
        return ""


def _answer(path: str | os.PathLike, client: Any, call: Coroutine[Any, Any, Any]) -> Any:
    """Awaits a client's answer, for at most PROBE_SECONDS; clients alone try for a minute."""
    TRAFFIC.last_error = ""
    try:
        with explained(path):
            return fsspec.asyn.sync(client.loop, lambda: call, timeout=PROBE_SECONDS)
    except StorageError as error:
        if "imeout" not in str(error):
            raise
        said = f", last answer {TRAFFIC.last_error}" if TRAFFIC.last_error else ""
        hint = (
            "the credentials are not valid or have expired; log in again, e.g. `gcloud auth "
            "application-default login`"
            if TRAFFIC.last_error.startswith("401")
            else "look at the network of this host and at the address of the store"
        )
        raise StorageError(
            f"{path} cannot be used: no answer within {PROBE_SECONDS} s{said}; {hint}"
        ) from error


# --- conditional writes ---------------------------------------------------------------------------


def read_version(path: str | os.PathLike) -> tuple[bytes, str] | None:
    """Reads an object and its version (generation or ETag); None without one."""
    client, text = filesystem(path), os.fspath(path)
    for _ in range(5):
        try:
            with explained(path):
                version = _version(client.info(text))
                content = client.cat_file(text)
                if _version(client.info(text)) == version:
                    return content, version
        except FileNotFoundError:
            return None
    raise StorageError(f"{path} changes faster than it can be read")


def write_version(path: str | os.PathLike, content: bytes, seen: str | None) -> str | None:
    """Writes an object if it has the version that was `seen`, or does not exist where None was.

    Returns:
        Its new version; None if it has another version by now.
    """
    client, text = filesystem(path), os.fspath(path)
    bucket, _, key = text.partition("://")[2].partition("/")
    with explained(path, "written"):
        try:
            if protocol_of(path) == "gs":
                _, answer = client.call(
                    "POST",
                    client.base.replace("/storage/v1/", "/upload/storage/v1/") + "b/{}/o",
                    bucket,
                    uploadType="media",
                    name=key,
                    ifGenerationMatch=seen or "0",
                    data=content,
                    headers={"Content-Type": "application/octet-stream"},
                )
                return str(json.loads(answer)["generation"])
            condition = {"IfMatch": seen} if seen else {"IfNoneMatch": "*"}
            answer = client.call_s3("put_object", Bucket=bucket, Key=key, Body=content, **condition)
            return str(answer["ETag"])
        except FileExistsError:
            return None
        except Exception as error:
            # s3fs says "pre-conditions", and what it comes from "PreconditionFailed" or
            # "ConditionalRequestConflict".
            said = f"{error} {error.__cause__}".lower().replace("-", "")
            if any(word in said for word in ("precondition", "conditionalrequest", "412")):
                return None
            raise


def remove_version(path: str | os.PathLike, seen: str) -> None:
    """Removes an object if it still has the version that was `seen`."""
    client, text = filesystem(path), os.fspath(path)
    bucket, _, key = text.partition("://")[2].partition("/")
    with explained(path, "removed"), contextlib.suppress(FileNotFoundError, FileExistsError):
        if protocol_of(path) == "gs":
            client.call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=seen)
        elif _version(client.info(text)) == seen:  # S3 has no conditional removal everywhere
            client.rm_file(text)


def _version(info: dict[str, Any]) -> str:
    return str(info.get("generation") or info.get("ETag"))
