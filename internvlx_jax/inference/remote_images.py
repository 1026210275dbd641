"""Reads the images and videos that clients of a server name (design: serving.md 2)."""

from __future__ import annotations

import dataclasses
import http.client
import ipaddress
import socket
import ssl
import time
import urllib.parse
from pathlib import Path
from typing import NamedTuple

from internvlx_jax.core.errors import SampleError
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.images import ImageBytes, embedded_image
from internvlx_jax.data.video_files import VideoFrame, VideoLimits
from internvlx_jax.inference.server_requests import RequestError
from internvlx_jax.inference.serving_buckets import MAX_PIXELS
from internvlx_jax.inference.videos import video_frames

MOST_REDIRECTS = 3
CHUNK = 1 << 16
CODE = "invalid_image"


class _Kind(NamedTuple):
    """What is read: its name and code in errors, and the field of `ImageRules` that bounds it."""

    name: str
    code: str
    limit: str


IMAGE = _Kind("image", CODE, "max_bytes")
VIDEO = _Kind("video", "invalid_video", "max_video_bytes")


@dataclasses.dataclass(frozen=True)
class ImageRules:
    """Says which images a server reads.

    Attributes:
        allow_http: whether http(s) URLs are fetched, from public addresses only.
        media_root: folder below which file:// URLs are read; None: none are.
        max_bytes: most bytes of an image file.
        seconds: longest time for one image.
        max_video_bytes: most bytes of a video file.
        video_seconds: longest time for the decoding of one video.
    """

    allow_http: bool = False
    media_root: Path | None = None
    max_bytes: int = 32 * 2**20
    seconds: float = 10.0
    max_video_bytes: int = 64 * 2**20
    video_seconds: float = 20.0

    def read(self, url: str, field: str) -> ImageBytes:
        """Returns the image file behind a URL.

        Raises:
            RequestError: it is not allowed, or cannot be read.
        """
        scheme = url[:8].partition(":")[0].strip().lower()
        if scheme == "data":
            return self._embedded(url, field, IMAGE)
        if scheme in ("http", "https") and self.allow_http:
            return self._fetched(url, field)
        if scheme == "file" and self.media_root is not None:
            return self._file(url, field, IMAGE)
        allowed = ["data:"] + ["http(s)"] * self.allow_http
        allowed += ["file:// below the media folder"] * (self.media_root is not None)
        raise RequestError(
            f"this server reads images from {', '.join(allowed)} URLs only", field, code=CODE
        )

    def read_video(
        self, url: str, field: str, frames: int, tiles: TileConfig
    ) -> tuple[VideoFrame, ...]:
        """Returns frames of the video file behind a URL, which is never fetched.

        Raises:
            RequestError: it is not allowed, or cannot be read.
        """
        scheme = url[:8].partition(":")[0].strip().lower()
        if scheme == "data":
            data = self._embedded(url, field, VIDEO).data
        elif scheme == "file" and self.media_root is not None:
            data = self._file(url, field, VIDEO).data
        else:
            allowed = "data:" + " and file:// below the media folder" * bool(self.media_root)
            raise RequestError(
                f"this server reads videos from {allowed} URLs only", field, code=VIDEO.code
            )
        limits = VideoLimits(MAX_PIXELS, self.video_seconds)
        try:
            return video_frames(data, frames, tiles, name=field, limits=limits)
        except SampleError as error:
            raise RequestError(str(error), field, code=VIDEO.code) from None

    def _embedded(self, url: str, field: str, kind: _Kind) -> ImageBytes:
        try:
            data = embedded_image(url)
        except SampleError as error:
            raise RequestError(
                f"the {kind.name} cannot be read: {error}", field, code=kind.code
            ) from None
        if data is None:
            raise RequestError(f"the URL holds no {kind.name}", field, code=kind.code)
        return self._limited(data, field, kind)

    def _limited(self, data: bytes, field: str, kind: _Kind) -> ImageBytes:
        most = getattr(self, kind.limit)
        if len(data) > most:
            raise RequestError(
                f"the {kind.name} has more than {most} bytes", field, status=413, code=kind.code
            )
        return ImageBytes(field, data)

    def _file(self, url: str, field: str, kind: _Kind) -> ImageBytes:
        assert self.media_root is not None
        parts = urllib.parse.urlsplit(url)
        refused = RequestError("the file is not below the media folder", field, code=kind.code)
        try:
            root = self.media_root.resolve(strict=True)
            path = Path(urllib.parse.unquote(parts.path)).resolve(strict=True)
            if parts.netloc not in ("", "localhost") or not path.is_relative_to(root):
                raise refused
            if not path.is_file():
                raise refused
            with path.open("rb") as file:
                return self._limited(file.read(getattr(self, kind.limit) + 1), field, kind)
        except (OSError, ValueError):  # also where it does not exist: nothing is told of it
            raise refused from None

    def _fetched(self, url: str, field: str) -> ImageBytes:
        until = time.monotonic() + self.seconds
        try:
            for _ in range(MOST_REDIRECTS + 1):
                found = self._get(url, until, field)
                if isinstance(found, bytes):
                    return self._limited(found, field, IMAGE)
                url = found
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = f"{type(error).__name__}"
            raise RequestError(
                f"the image cannot be fetched ({reason})", field, code=CODE
            ) from None
        raise RequestError(f"more than {MOST_REDIRECTS} redirects", field, code=CODE)

    def _get(self, url: str, until: float, field: str) -> bytes | str:
        """Returns the body of a URL, or the URL that it redirects to."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RequestError(
                "the URL, or one that it redirects to, is not http(s)", field, code=CODE
            )
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        address = public_address(parts.hostname, port, field)
        connection = _Connection(parts.hostname, port, address, secure, until)
        try:
            target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            connection.request("GET", target, headers={"User-Agent": "internvlx-jax"})
            reply = connection.getresponse()
            if reply.status in (301, 302, 303, 307, 308):
                return urllib.parse.urljoin(url, reply.headers.get("Location", ""))
            if reply.status != 200:
                raise RequestError(
                    f"the image cannot be fetched (status {reply.status})", field, code=CODE
                )
            return self._body(reply, until, field)
        finally:
            connection.close()

    def _body(self, reply: http.client.HTTPResponse, until: float, field: str) -> bytes:
        data = bytearray()
        while chunk := reply.read1(CHUNK):
            data += chunk
            if len(data) > self.max_bytes:
                break
            if time.monotonic() > until:
                raise RequestError(f"the image took over {self.seconds:g} s", field, code=CODE)
        return bytes(data)


def public_address(host: str, port: int, field: str) -> str:
    """Returns the address to connect to, which is then not looked up again.

    Raises:
        RequestError: the name has no address, or one that is not public.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise RequestError("the host of the image is unknown", field, code=CODE) from None
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    if not addresses or not all(_is_public(address) for address in addresses):
        raise RequestError("the host of the image is not a public one", field, code=CODE)
    return addresses[0]


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None) or ip
    return ip.is_global and inner.is_global and not (ip.is_multicast or inner.is_multicast)


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was checked, under the name that was asked for."""

    def __init__(self, host: str, port: int, address: str, secure: bool, until: float):
        super().__init__(host, port, timeout=max(0.1, until - time.monotonic()))
        self.address, self.secure = address, secure

    def connect(self) -> None:
        self.sock = socket.create_connection((self.address, self.port), self.timeout)
        if self.secure:
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=self.host)
