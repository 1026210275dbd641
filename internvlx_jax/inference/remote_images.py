"""Reads the images that clients of a server name, as far as the server allows (serving.md 2)."""

from __future__ import annotations

import dataclasses
import http.client
import ipaddress
import socket
import ssl
import time
import urllib.parse
from pathlib import Path

from internvlx_jax.core.errors import SampleError
from internvlx_jax.data.images import ImageBytes, embedded_image
from internvlx_jax.inference.server_requests import RequestError

MOST_REDIRECTS = 3
CHUNK = 1 << 16
CODE = "invalid_image"


@dataclasses.dataclass(frozen=True)
class ImageRules:
    """Says which images a server reads.

    Attributes:
        allow_http: whether http(s) URLs are fetched, from public addresses only.
        media_root: folder below which file:// URLs are read; None: none are.
        max_bytes: most bytes of an image file.
        seconds: longest time for one image.
    """

    allow_http: bool = False
    media_root: Path | None = None
    max_bytes: int = 32 * 2**20
    seconds: float = 10.0

    def read(self, url: str, field: str) -> ImageBytes:
        """Returns the image file behind a URL.

        Raises:
            RequestError: it is not allowed, or cannot be read.
        """
        scheme = url[:8].partition(":")[0].strip().lower()
        if scheme == "data":
            return self._embedded(url, field)
        if scheme in ("http", "https") and self.allow_http:
            return self._fetched(url, field)
        if scheme == "file" and self.media_root is not None:
            return self._file(url, field)
        allowed = ["data:"] + ["http(s)"] * self.allow_http
        allowed += ["file:// below the media folder"] * (self.media_root is not None)
        raise RequestError(
            f"this server reads images from {', '.join(allowed)} URLs only", field, code=CODE
        )

    def _embedded(self, url: str, field: str) -> ImageBytes:
        try:
            data = embedded_image(url)
        except SampleError as error:
            raise RequestError(f"the image cannot be read: {error}", field, code=CODE) from None
        if data is None:
            raise RequestError("the URL holds no image", field, code=CODE)
        return self._limited(data, field)

    def _limited(self, data: bytes, field: str) -> ImageBytes:
        if len(data) > self.max_bytes:
            raise RequestError(
                f"the image has more than {self.max_bytes} bytes", field, status=413, code=CODE
            )
        return ImageBytes(field, data)

    def _file(self, url: str, field: str) -> ImageBytes:
        assert self.media_root is not None
        parts = urllib.parse.urlsplit(url)
        refused = RequestError("the file is not below the media folder", field, code=CODE)
        try:
            root = self.media_root.resolve(strict=True)
            path = Path(urllib.parse.unquote(parts.path)).resolve(strict=True)
            if parts.netloc not in ("", "localhost") or not path.is_relative_to(root):
                raise refused
            if not path.is_file():
                raise refused
            with path.open("rb") as file:
                return self._limited(file.read(self.max_bytes + 1), field)
        except (OSError, ValueError):  # also where it does not exist: nothing is told of it
            raise refused from None

    def _fetched(self, url: str, field: str) -> ImageBytes:
        until = time.monotonic() + self.seconds
        try:
            for _ in range(MOST_REDIRECTS + 1):
                found = self._get(url, until, field)
                if isinstance(found, bytes):
                    return self._limited(found, field)
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
