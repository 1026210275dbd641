"""Images inside a text field: data: URLs and plain base64 (design: data.md 2)."""

from __future__ import annotations

import base64
import binascii
import re
import urllib.parse

from internvlx_jax.core.errors import SampleError
from internvlx_jax.core.json_text import shorten

# How encoded images begin in base64. Those of the second line are too short to be told from a path
# or a word by themselves.
_CERTAIN = ("iVBORw0KGgo", "R0lGODlh", "R0lGODdh")
_LIKELY = ("/9j/", "UklGR", "Qk", "SUkq", "TU0AK")
_LONG = 200  # characters from which a likely beginning is looked at
_MAGIC = (b"\xff\xd8\xff", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_SPACE = re.compile(r"\s+")


def embedded_image(text: str) -> bytes | None:
    """Returns the encoded image that a text is; None for a path or a URL of another protocol.

    Line ends inside base64 do not count, and its padding may be missing.

    Raises:
        SampleError: "unreadable": a data: URL, or what begins as an image, cannot be decoded.
    """
    text = text.strip()
    if text[:5].lower() == "data:":
        return _data_url(text)
    if text.startswith(_CERTAIN):
        return _decoded(text)
    if text.startswith(_LIKELY) and len(text) >= _LONG:
        try:
            data = from_base64(text)
        except ValueError:
            return None  # a long path such as /9j/...
        return data if data.startswith(_MAGIC) else None
    return None


def from_base64(text: str) -> bytes:
    """Decodes base64 with or without line ends and padding. Raises ValueError for other text."""
    text = _SPACE.sub("", text).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def _decoded(text: str) -> bytes:
    try:
        return from_base64(text)
    except ValueError as error:
        raise SampleError(
            "unreadable",
            f"{shorten(text[:24])}... begins as an image in base64, but is none ({error}).",
            "Write the image to a file and name that, or encode it again.",
        ) from None


def _data_url(url: str) -> bytes:
    header, comma, payload = url.partition(",")
    try:
        if not comma:
            raise ValueError("no comma behind its media type")
        if header.lower().endswith(";base64"):
            return from_base64(urllib.parse.unquote(payload))
        return urllib.parse.unquote_to_bytes(payload)
    except ValueError as error:
        raise SampleError(
            "unreadable",
            f"the data: URL is not well formed ({error}): {shorten(url[:32])}",
            "Write data:image/png;base64, and the base64 text of the file.",
        ) from None
