"""Image file -> RGB image (design: data.md 7).

Pillow keeps two settings in module globals: the pixel limit, and whether damaged files are decoded.
Loader threads share them, so they are changed under a lock, only while a header is parsed and for
the second decoding of a file whose first one failed. The tolerance of damaged files holds in the
changing thread alone, so that the ordinary decodes of other threads, which take no lock, stay
strict.
"""

import base64
import binascii
import contextlib
import dataclasses
import io
import os
import re
import threading
import urllib.parse
from collections.abc import Iterator
from typing import BinaryIO, Protocol

import numpy as np
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from internvlx_jax.core.data_config import MAX_PIXELS
from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.json_text import shorten
from internvlx_jax.core.remote import StorageError
from internvlx_jax.data import storage
from internvlx_jax.data.png import png_metadata

_LOCK = threading.Lock()
_QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What differs between two runs, and would make their messages differ.
_ADDRESS = re.compile(r"<[^<>]* object at 0x[0-9a-f]+>| at 0x[0-9a-f]+")
CHECK_FILE = "Check the path or URL, and that it is an image file."
# How encoded images begin in base64. Those of the second line are too short to be told from a path
# or a word by themselves.
_CERTAIN = ("iVBORw0KGgo", "R0lGODlh", "R0lGODdh")
_LIKELY = ("/9j/", "UklGR", "Qk", "SUkq", "TU0AK")
_LONG = 200  # characters from which a likely beginning is looked at
_MAGIC = (b"\xff\xd8\xff", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_SPACE = re.compile(r"\s+")


class StoredImage(Protocol):
    """An image inside another file, such as a cell of a table; `str` of it says where."""

    def open(self) -> BinaryIO:
        """Returns the encoded file."""
        ...


# A path or URL, the encoded file itself, or where it is stored.
ImageSource = str | os.PathLike | bytes | StoredImage


@dataclasses.dataclass(frozen=True)
class ImageBytes:
    """An encoded image in memory, with a name for messages."""

    name: str
    data: bytes = dataclasses.field(repr=False)

    def open(self) -> BinaryIO:
        """Returns the encoded image as a file."""
        return io.BytesIO(self.data)

    def __str__(self) -> str:
        return self.name


def open_image(source: ImageSource) -> BinaryIO:
    """Opens the encoded bytes of an image file."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str):
        data = embedded_image(source)
        return storage.open_binary(source) if data is None else io.BytesIO(data)
    return storage.open_binary(source) if isinstance(source, os.PathLike) else source.open()


def image_size(source: ImageSource, *, apply_exif: bool = False) -> tuple[int, int]:
    """Returns (width, height) in pixels from the header, without decoding.

    Raises:
        SampleError: "unreadable".
    """
    with _opened(source) as image:
        turned = apply_exif and _orientation(image) in _QUARTER_TURNS
        width, height = image.size
        return (height, width) if turned else (width, height)


def load_image(
    source: ImageSource,
    *,
    max_pixels: int = MAX_PIXELS,
    apply_exif: bool = False,
    use_truncated: bool = True,
) -> Image.Image:
    """Returns the first frame of an image file as an RGB image; alpha is dropped.

    `info["counted"]` of the result names what deserves a counter: "truncated" (a damaged file,
    decoded as far as it goes), "16bit" (16-bit values shifted down to 8 bits).

    Args:
        source: the file.
        max_pixels: larger images are refused before they are decoded.
        apply_exif: whether an EXIF orientation turns the image; the release ignores it.
        use_truncated: whether a damaged file is used as far as it can be decoded.

    Raises:
        SampleError: "unreadable", "too_many_pixels", "unsupported_mode" (32-bit integers and
            floats have no agreed range), or "truncated" without `use_truncated`.
    """
    try:
        return _decode(source, max_pixels, apply_exif, tolerant=False)
    except SampleError as error:
        if error.reason != "unreadable":
            raise
        image = _decode(source, max_pixels, apply_exif, tolerant=True)
        if use_truncated:
            return image
        raise SampleError(
            "truncated",
            "the file is damaged; only a part of it can be decoded.",
            "Replace the file.",
            _name(source),
        ) from error


def check_pixels(size: tuple[int, int], max_pixels: int, source: ImageSource) -> None:
    """Refuses images of more than `max_pixels` pixels.

    Raises:
        SampleError: "too_many_pixels".
    """
    width, height = size
    if width * height > max_pixels:
        raise SampleError(
            "too_many_pixels",
            f"{width} x {height} pixels are more than max_pixels = {max_pixels}.",
            "Scale the image down.",
            _name(source),
        )


def _name(source: ImageSource) -> str:
    return "the encoded image" if isinstance(source, bytes) else shorten(str(source), 300)


def _decode(
    source: ImageSource, max_pixels: int, apply_exif: bool, *, tolerant: bool
) -> Image.Image:
    counted = ("truncated",) if tolerant else ()
    with _opened(source) as image:
        check_pixels(image.size, max_pixels, source)
        if image.mode in ("I", "F"):
            raise SampleError(
                "unsupported_mode",
                f'image mode "{image.mode}" has no defined range of values.',
                "Convert the file to 8-bit RGB or grayscale.",
                _name(source),
            )
        turn = _TURNS.get(_orientation(image) or 1) if apply_exif else None
        if isinstance(image, PngImagePlugin.PngImageFile):
            # The pixels are all that counts: text behind them may be large or damaged.
            image.load_end = lambda: None
        with pillow_globals() if tolerant else contextlib.nullcontext():
            image.load()
        if turn is not None:
            image = image.transpose(turn)
        if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255: white images
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            counted += ("16bit",)
        image.info.pop("transparency", None)  # convert() would warn that alpha is dropped
        # A conversion to the same mode would be a copy, 2 ms per megapixel.
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    rgb.info = {"counted": counted}
    return rgb


def _orientation(image: Image.Image) -> int | None:
    """Returns the EXIF orientation of an open file from its header; None where it is damaged.

    Pillow decodes a whole PNG to look for EXIF behind its pixels, so PNG files are looked through
    here.
    """
    try:
        if isinstance(image, PngImagePlugin.PngImageFile):
            assert image.fp is not None
            image = Image.open(io.BytesIO(png_metadata(image.fp)))
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF raises nearly anything, and says nothing about the pixels
        return None
    return found if isinstance(found, int) else None


def unreadable(source: ImageSource, error: Exception) -> SampleError:
    """Returns the error of an image that cannot be read; it repeats neither path nor payload."""
    return SampleError(
        "unreadable", f"the image cannot be read ({_reason(error)}).", CHECK_FILE, _name(source)
    )


def _reason(error: Exception) -> str:
    """Returns what an exception says, the same in every run."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a known format"
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    return f"{type(error).__name__}: {_ADDRESS.sub('', shorten(str(error)))}"


@contextlib.contextmanager
def _opened(source: ImageSource) -> Iterator[Image.Image]:
    """Opens an image file; whatever Pillow raises, also in the block, becomes "unreadable"."""
    try:
        with open_image(source) as file:
            with pillow_globals():
                image = Image.open(file)
            yield image
    # A store that does not answer says nothing about an image: the run stops, and goes on later.
    except (SampleError, ConfigError, StorageError, MemoryError):
        raise
    except Exception as error:  # damaged files make the decoders raise nearly anything
        raise unreadable(source, error) from error


class _TrueInThisThread:
    """A flag that is true in the thread that made it, and unchanged in all others."""

    def __init__(self, elsewhere: bool):
        self.thread, self.elsewhere = threading.get_ident(), elsewhere

    def __bool__(self) -> bool:
        return self.elsewhere or threading.get_ident() == self.thread


@contextlib.contextmanager
def pillow_globals() -> Iterator[None]:
    """Lifts Pillow's pixel limit, for check_pixels has its own, and tolerates damaged files."""
    with _LOCK:
        saved = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        text = PngImagePlugin.MAX_TEXT_MEMORY
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, _TrueInThisThread(saved[1])
        PngImagePlugin.MAX_TEXT_MEMORY = 2**30  # text in front of the pixels is no damage
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = saved
            PngImagePlugin.MAX_TEXT_MEMORY = text


# --- images inside a text field: data: URLs and plain base64 (design: data.md 2) ------------------


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
